"""Where metrics are served, and under which name Prometheus finds them."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.scraping import scrape
from builders.tiny import tiny_config

from tvr.data_prep.exporter import target_host as rules
from tvr.data_prep.exporter.metrics_http import MetricsEndpoint
from tvr.data_prep.exporter.target_host import target_host
from tvr.launchers.job import METRICS_ADDRESS, Job, job_environment
from tvr.trainer.config import MetricsConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.monitoring.address import ADDRESS_VARIABLE, listening_address, metrics_line
from tvr.trainer.monitoring.metrics import training_table
from tvr.trainer.monitoring.monitor import NodeMonitor
from tvr.trainer.monitoring.server import MetricsServer

OUTER, OWN_NAME_ONLY = "10.1.2.3", "127.0.1.1"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what this machine knows of its names and addresses."""

    def known(full_name: str, addresses: dict[str, str], routed: str | None) -> None:
        def look_up(name: str, *rest: object, **options: object) -> list[object]:
            if name not in addresses:
                raise socket.gaierror("Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[name], 0))]

        class Probe:
            def __init__(self, family: int, kind: int) -> None:
                if routed is None or family != socket.AF_INET:
                    raise OSError("Network is unreachable")

            def connect(self, address: object) -> None: ...

            def getsockname(self) -> tuple[str | None, int]:
                return routed, 5

            def close(self) -> None: ...

        monkeypatch.setattr(socket, "gethostname", lambda: "n1")
        monkeypatch.setattr(socket, "getfqdn", lambda: full_name)
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(rules.socket, "socket", Probe)

    return known


@pytest.mark.parametrize(
    ("full_name", "addresses", "routed", "expected"),
    [
        ("n1.cluster.org", {"n1.cluster.org": OUTER}, OUTER, ("n1.cluster.org", "fqdn")),
        # The name server does not know the name, or this machine's own table says loopback.
        ("n1.cluster.org", {}, OUTER, (OUTER, "ip")),
        ("n1.cluster.org", {"n1.cluster.org": OWN_NAME_ONLY}, OUTER, (OUTER, "ip")),
        ("n1", {"n1": OWN_NAME_ONLY}, OUTER, (OUTER, "ip")),
        ("localhost.localdomain", {"localhost.localdomain": OUTER}, OUTER, (OUTER, "ip")),
        # No route to other networks.
        ("n1", {"n1": OUTER}, None, (OUTER, "ip")),
        (
            "n1",
            {"n1": OWN_NAME_ONLY},
            None,
            ("n1", "hostname: neither a full name nor an address is known"),
        ),
    ],
)
def test_prometheus_gets_a_name_that_means_something_elsewhere(
    full_name: str,
    addresses: dict[str, str],
    routed: str | None,
    expected: tuple[str, str],
    node: Callable[..., None],
) -> None:
    node(full_name, addresses, routed)
    assert target_host("0.0.0.0") == target_host("") == target_host("::") == expected
    # An endpoint that listens on one address is found there only.
    assert target_host("10.9.9.9") == ("10.9.9.9", "listens there only")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fqdn", ("n1.cluster.org", "fqdn")),
        ("ip", (OUTER, "ip")),
        ("hostname", ("n1", "hostname")),
        ("{hostname}-ib.cluster.org", ("n1-ib.cluster.org", "given")),
        ("gateway.org", ("gateway.org", "given")),
    ],
)
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_the_host_can_be_given(
    given: str, expected: tuple[str, str], address: str, node: Callable[..., None]
) -> None:
    node("n1.cluster.org", {"n1.cluster.org": OUTER}, OUTER)
    assert target_host(address, given) == expected


def test_a_name_server_that_does_not_answer_holds_nothing_up(
    node: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    node("n1.cluster.org", {}, OUTER)
    released = threading.Event()
    monkeypatch.setattr(socket, "getfqdn", lambda: released.wait(60) and "n1.cluster.org")
    monkeypatch.setattr(rules, "LOOKUP_S", 0.05)
    try:
        assert target_host("0.0.0.0", "fqdn") == (OUTER, "ip")
    finally:
        released.set()


@pytest.mark.parametrize("host", ["a b", "a/b", "", "a;b", "a\nb"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        MetricsConfig(host=host)


def test_one_machine_serves_on_loopback_and_several_on_all_interfaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    default = MetricsConfig()
    assert listening_address(default, machines=1).address == "127.0.0.1"
    assert listening_address(default, machines=2).address == "0.0.0.0"
    given = MetricsConfig(address="10.0.0.1")
    assert {listening_address(given, machines=n).address for n in (1, 2)} == {"10.0.0.1"}


def test_a_job_with_a_folder_for_targets_is_scraped_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(command=("x",), run_dir="/r", directory="/", python="p", name="x", targets="/t")
    assert METRICS_ADDRESS == ADDRESS_VARIABLE
    monkeypatch.setenv(ADDRESS_VARIABLE, job_environment(job)[ADDRESS_VARIABLE])
    address, rule = listening_address(MetricsConfig(), machines=1)
    assert (address, rule) == ("0.0.0.0", "set by the launcher (TVR_METRICS_ADDRESS)")
    assert listening_address(MetricsConfig(address="::1"), machines=1).address == "::1"


def test_show_config_names_the_addresses(
    node: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    node("n1", {}, OUTER)
    line = metrics_line(MetricsConfig())
    assert "one machine serves them on 127.0.0.1" in line
    assert f"all interfaces (0.0.0.0): Prometheus finds this machine as {OUTER} (ip)" in line
    given = metrics_line(MetricsConfig(address="10.0.0.1", host="hostname"))
    assert given == (
        "metrics: served on 10.0.0.1, set by metrics.address; Prometheus finds this machine as n1"
        " (hostname)"
    )
    assert metrics_line(MetricsConfig(endpoint="none")) == "metrics: no endpoint"


def test_a_run_on_one_machine_listens_on_loopback(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    world = World(rank=0, world_size=1, device=torch.device("cpu"))
    monitor = NodeMonitor(tiny_config(data), tmp_path, world)
    monitor.start(begin_attempt(tmp_path), 0)
    try:
        (path,) = (tmp_path / "metrics").glob("*.json")
        (group,) = json.loads(path.read_text())
        (target,) = group["targets"]
        assert target.startswith("127.0.0.1:")
        assert group["labels"]["__meta_tvr_host"] == "listens there only"
        assert "tvr_train_step" in scrape(f"http://{target}/metrics")
        assert monitor._server is not None
        assert monitor._server._endpoint is not None
        assert monitor._server._endpoint._server.server_address[0] == "127.0.0.1"
    finally:
        monitor.close(succeeded=True)


def test_a_run_on_several_machines_says_where_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    metrics = MetricsConfig(host="{hostname}.cluster.org")
    with caplog.at_level(logging.WARNING):
        server = MetricsServer(
            *(metrics, tmp_path, begin_attempt(tmp_path), training_table()),
            *({0: []}, 0, 2),  # type: ignore[arg-type]
        )
    server._lines = {}
    server.close()
    target = f"{socket.gethostname()}.cluster.org"
    (message,) = caplog.messages
    assert "metrics are served on all interfaces (0.0.0.0) of each machine (2 machines" in message
    assert f"here as {target}:" in message
    (path,) = (tmp_path / "metrics").glob("*.json")
    assert json.loads(path.read_text())[0]["labels"]["__meta_tvr_host"] == "given"


def test_an_ipv6_address_is_in_brackets() -> None:
    try:
        endpoint = MetricsEndpoint(lambda: b"x 1\n", "::1", 0)
    except ValueError:
        pytest.skip("this machine has no IPv6")
    try:
        assert endpoint.target.startswith("[::1]:")
        assert scrape(f"http://{endpoint.target}/metrics") == "x 1\n"
    finally:
        endpoint.close()
