"""The endpoint and the files through which a node's metrics are read.

    run_dir/metrics/HOST.json    address of the endpoint, in the format of Prometheus's file_sd;
                                 removed when the run ends without error, kept when it fails
    run_dir/metrics/HOST.prom    the last values, written every few seconds and at the end

With `metrics.endpoint` "rank" the files are named HOST-rank-N.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from tvr.data_prep.exporter.metrics_http import (
    HOST_RULE,
    MetricsEndpoint,
    job_label,
    write_scrape_target,
)
from tvr.data_prep.exporter.metrics_table import MetricArray, MetricTable
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.config import MetricsConfig
from tvr.trainer.errors import Fenced
from tvr.trainer.fencing import Attempt
from tvr.trainer.monitoring.address import listening_address, named_address

FOLDER = "metrics"
WRITE_EVERY_S = 5.0

log = logging.getLogger(__name__)


def remove_targets(run_dir: Path) -> None:
    """Removes the targets of earlier starts of the run, which may have used other hosts."""
    for path in (run_dir / FOLDER).glob("*.json"):
        # NFS may still list a file that another host has removed.
        path.unlink(missing_ok=True)


class MetricsServer:
    """Endpoint and files of the ranks whose values one process serves."""

    def __init__(
        self,
        metrics: MetricsConfig,
        run_dir: Path,
        attempt: Attempt,
        table: MetricTable,
        lines: Mapping[int, MetricArray],
        local_rank: int,
        machines: int,
    ) -> None:
        """Starts to serve.

        Args:
            table: The run's metrics.
            lines: Values of each served rank, in the places of `table`.
            local_rank: Added to `metrics.port`, so that ranks of a node use different ports.
            machines: Number of machines of the run.

        Raises:
            PortInUse: another process uses the port.
            ValueError: this host does not have the address.
        """
        self.has_changed = False
        """True if the file of the last values is out of date."""
        self._table, self._lines, self._attempt = table, lines, attempt
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        host = socket.gethostname()
        name = f"{host}-rank-{min(lines):05d}" if metrics.endpoint == "rank" else host
        self._target, self._last_values = folder / f"{name}.json", folder / f"{name}.prom"
        self._endpoint: MetricsEndpoint | None = None
        if metrics.endpoint != "none":
            port = metrics.port + local_rank if metrics.port else 0
            address, why = listening_address(metrics, machines=machines)
            self._endpoint = endpoint = MetricsEndpoint(self._text, address, port, metrics.host)
            labels = {"run": job_label(run_dir), "host": host, HOST_RULE: endpoint.host_rule}
            write_scrape_target(self._target, endpoint.target, labels)
            if machines > 1 and 0 in lines:
                log.warning(
                    "metrics are served on %s of each machine (%s), here as %s (%s)",
                    *(named_address(address), why, endpoint.target, endpoint.host_rule),
                )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="last-values", daemon=True)
        self._thread.start()

    def _text(self) -> bytes:
        return self._table.text(self._lines)

    def _write_often(self) -> None:
        while not self._closed.wait(WRITE_EVERY_S):
            self._write()

    def _write(self) -> None:
        if not self.has_changed:
            return
        self.has_changed = False
        try:
            self._attempt.check()
            write_atomically(self._last_values, self._text())
        except Fenced:
            pass  # the training thread raises it where it writes
        except OSError as error:
            log.warning("the last values of the metrics are not written: %s", error)

    def announce_end(self, *, succeeded: bool) -> None:
        """Declares the present values the last ones.

        The target of a run that succeeded is removed, so that no alert fires for it.
        """
        self.has_changed = True
        if succeeded:
            self._target.unlink(missing_ok=True)
        if self._endpoint is not None:
            self._endpoint.mark_final()

    def close(self) -> None:
        """Writes the last values and closes the endpoint, after a final scrape if it is scraped."""
        self._closed.set()
        self._thread.join()
        self._write()
        if self._endpoint is not None:
            self._endpoint.close()
