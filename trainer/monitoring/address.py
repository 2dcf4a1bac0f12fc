"""Where a run serves its metrics, and under which address Prometheus finds them.

The metrics of a run are open to everyone who reaches the port. So a run on one machine serves them
on loopback, unless a setting or the launcher says otherwise.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from tvr.data_prep.exporter.target_host import ALL_INTERFACES, target_host
from tvr.trainer.config import MetricsConfig

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
ADDRESS_VARIABLE = "TVR_METRICS_ADDRESS"
"""Set by a launcher whose job is scraped from other machines: `tvr launch slurm --targets`."""


class ListeningAddress(NamedTuple):
    """Address that an endpoint listens on, and why."""

    address: str
    rule: str


def listening_address(metrics: MetricsConfig, *, machines: int) -> ListeningAddress:
    """Selects the address that the endpoints of a run listen on.

    Args:
        metrics: Settings.
        machines: Number of machines of the run.
    """
    if metrics.address is not None:
        return ListeningAddress(metrics.address, "set by metrics.address")
    given = os.environ.get(ADDRESS_VARIABLE)
    if given:
        return ListeningAddress(given, f"set by the launcher ({ADDRESS_VARIABLE})")
    if machines == 1:
        return ListeningAddress(LOOPBACK, "one machine; metrics.address changes it")
    return ListeningAddress(EVERYWHERE, f"{machines} machines; metrics.address changes it")


def named_address(address: str) -> str:
    """The address as a text for people."""
    return f"all interfaces ({address or '*'})" if address in ALL_INTERFACES else address


def metrics_line(metrics: MetricsConfig) -> str:
    """One line that names the addresses of a run, and how Prometheus finds this machine."""
    if not metrics.enabled or metrics.endpoint == "none":
        return "metrics: no endpoint"
    one, several = (listening_address(metrics, machines=n) for n in (1, 2))
    host, host_rule = target_host(several.address, metrics.host)
    found = f"Prometheus finds this machine as {host} ({host_rule})"
    if one == several:
        return f"metrics: served on {named_address(one.address)}, {one.rule}; {found}"
    return (
        f"metrics: a run on one machine serves them on {one.address}, one on several machines on"
        f" {named_address(several.address)}: {found}; metrics.address and metrics.host change it"
    )
