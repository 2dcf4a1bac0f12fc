"""Asks an endpoint again and again, as Prometheus does, until it is gone: for benchmarks.

python -m tvr_bench.scraper URL TIMES_A_SECOND    prints how often it was answered
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request


class Scraper:
    """A process of its own that does this, and can be held."""

    def __init__(self, url: str, times_a_second: float) -> None:
        line = [sys.executable, "-m", __name__, url, str(times_a_second)]
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        self._since: float | None = time.monotonic()
        self.seconds = 0.0
        """For which it was not held."""

    def hold(self, on: bool) -> None:
        """Holds it, or lets it go on."""
        now = time.monotonic()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = None if on else now
        self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def count(self) -> int:
        """How often it was answered, once the endpoint is gone."""
        printed, _ = self._process.communicate()
        return int(printed)


def scrape(url: str, times_a_second: float) -> int:
    """How often the endpoint answered before it was gone."""
    pause_s, count = 1 / times_a_second, 0
    due = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                answer.read()
        except OSError:
            return count
        count += 1
        # What it could not ask for while it was held is not made up for.
        due, now = due + pause_s, time.monotonic()
        if due > now:
            time.sleep(due - now)
        else:
            due = now


if __name__ == "__main__":
    os.nice(19)  # Prometheus has a machine of its own: what it computes is no cost of the run's
    print(scrape(sys.argv[1], float(sys.argv[2])))
