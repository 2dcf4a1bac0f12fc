"""The name or address under which Prometheus, on another machine, finds an endpoint.

A node's short name often means nothing there. So the target is, by default, the first of these:

1. the address that the endpoint listens on, if it listens on one only;
2. `fqdn`: the node's full name, if it has one that stands for more than this machine itself;
3. `ip`: the address of the interface with the default route, or else of the node's name;
4. `hostname`: the node's name.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from contextlib import closing

ALL_INTERFACES = ("", "0.0.0.0", "::")
AUTO, FQDN, IP, HOSTNAME = "auto", "fqdn", "ip", "hostname"
PLACEHOLDER = "{hostname}"
# A broken name server may not answer for half a minute.
LOOKUP_S = 3.0
# Addresses for documentation: nothing is sent, but the kernel chooses the interface.
OUTSIDE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
LOCAL_SUFFIXES = (".localdomain", ".localhost")


def target_host(address: str, host: str = AUTO) -> tuple[str, str]:
    """Selects the host part of a target, and names the rule.

    Args:
        address: Address that the endpoint listens on.
        host: `auto`, `fqdn`, `ip`, `hostname`, or text in which `{hostname}` stands for the node's
            name.
    """
    if host == HOSTNAME:
        return socket.gethostname(), HOSTNAME
    if host not in (AUTO, FQDN, IP):
        return host.replace(PLACEHOLDER, socket.gethostname()), "given"
    if host == AUTO and address not in ALL_INTERFACES:
        return address, "listens there only"
    rules = {FQDN: _full_name, IP: _own_address}
    for rule in (IP,) if host == IP else (FQDN, IP):
        found = _within_time(rules[rule])
        if found is not None:
            return found, rule
    return socket.gethostname(), f"{HOSTNAME}: neither a full name nor an address is known"


def bracketed(host: str) -> str:
    """The host as in HOST:PORT: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _full_name() -> str | None:
    name = socket.getfqdn()
    if "." not in name or name.endswith(LOCAL_SUFFIXES) or _as_address(name) is not None:
        return None
    # Some systems give the node's full name a loopback address in their own table of hosts.
    return name if _outer_addresses(name) else None


def _own_address() -> str | None:
    for family, outside in OUTSIDE:
        try:
            with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
                probe.connect((outside, 9))
                address = probe.getsockname()[0]
        except OSError:
            continue  # no route
        if _is_outer(address):
            return address
    return next(iter(_outer_addresses(socket.gethostname())), None)


def _outer_addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [address for entry in found if _is_outer(address := str(entry[4][0]))]


def _is_outer(address: str) -> bool:
    parsed = _as_address(address)
    return parsed is not None and not (
        parsed.is_loopback or parsed.is_unspecified or parsed.is_link_local
    )


def _as_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _within_time(look_up: Callable[[], str | None]) -> str | None:
    """Looks a name up; None if that takes too long."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(look_up()), daemon=True)
    thread.start()
    thread.join(LOOKUP_S)
    return found[0] if found else None
