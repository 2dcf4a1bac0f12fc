"""Where the numbers of a node's ranks are to be had.

    run_dir/metrics/HOST.json    the endpoint's address, as Prometheus's file_sd reads it; it goes
                                 when the run ends as it should, and stays when it breaks
    run_dir/metrics/HOST.prom    the last values, every few seconds and at the end

HOST-rank-N with `metrics.endpoint` rank.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from tvr.data_prep.exporter.metrics_http import MetricsEndpoint, job_label, write_scrape_target
from tvr.data_prep.exporter.metrics_table import MetricArray
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.config import MetricsConfig
from tvr.trainer.errors import Fenced
from tvr.trainer.fencing import Attempt
from tvr.trainer.monitoring.metrics import TRAINING

FOLDER = "metrics"
WRITE_EVERY_S = 5.0

log = logging.getLogger(__name__)


def forget_targets(run_dir: Path) -> None:
    """What an earlier start of the run left, maybe on other hosts."""
    for path in (run_dir / FOLDER).glob("*.json"):
        # One that another host has removed may be listed for a while, on NFS.
        path.unlink(missing_ok=True)


class MetricsServer:
    """Endpoint and files of the ranks that one process speaks for."""

    def __init__(
        self,
        metrics: MetricsConfig,
        run_dir: Path,
        attempt: Attempt,
        lines: Mapping[int, MetricArray],
        local_rank: int,
    ) -> None:
        """Raises PortInUse, or ValueError where it can never serve."""
        self.has_news = False
        self._lines, self._attempt = lines, attempt
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        host = socket.gethostname()
        name = f"{host}-rank-{min(lines):05d}" if metrics.endpoint == "rank" else host
        self._target, self._last = folder / f"{name}.json", folder / f"{name}.prom"
        self._endpoint: MetricsEndpoint | None = None
        if metrics.endpoint != "none":
            port = metrics.port + local_rank if metrics.port else 0
            self._endpoint = endpoint = MetricsEndpoint(self._text, metrics.address, port)
            labels = {"run": job_label(run_dir), "host": host}
            write_scrape_target(self._target, endpoint.target, labels)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="last-values", daemon=True)
        self._thread.start()

    def _text(self) -> bytes:
        return TRAINING.text(self._lines)

    def _keep(self) -> None:
        while not self._over.wait(WRITE_EVERY_S):
            self._write()

    def _write(self) -> None:
        if not self.has_news:
            return
        self.has_news = False
        try:
            self._attempt.check()
            write_atomically(self._last, self._text())
        except Fenced:
            pass  # the run's own thread hears of it where it writes
        except OSError as error:
            log.warning("the last values of the metrics are not written: %s", error)

    def leave(self, *, well: bool) -> None:
        """The values are the last ones. Nobody is missed who ends `well`."""
        self.has_news = True
        if well:
            self._target.unlink(missing_ok=True)
        if self._endpoint is not None:
            self._endpoint.mark_final()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._write()
        if self._endpoint is not None:
            self._endpoint.close()
