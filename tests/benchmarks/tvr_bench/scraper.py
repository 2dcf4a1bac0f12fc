"""Scrapes a metrics endpoint like Prometheus, until the endpoint closes: for benchmarks.

python -m tvr_bench.scraper URL TIMES_A_SECOND    prints the number of answers
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request

from tvr_bench.harness import child_environment


class Scraper:
    """Scrapes an endpoint from a process of its own, which can be paused."""

    def __init__(self, url: str, times_a_second: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvr_bench.scraper", url, str(times_a_second)],
            env=child_environment(os.environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running_since: float | None = time.monotonic()
        self.seconds = 0.0
        """Seconds in which it was not paused."""

    def pause(self) -> None:
        """Stops the process until `resume`."""
        if self._running_since is not None:
            self.seconds += time.monotonic() - self._running_since
        self._running_since = None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets the process run again."""
        now = time.monotonic()
        if self._running_since is not None:
            self.seconds += now - self._running_since
        self._running_since = now
        self._process.send_signal(signal.SIGCONT)

    def count(self) -> int:
        """Waits until the endpoint closes; returns the number of answers."""
        printed, _ = self._process.communicate()
        return int(printed)


def scrape(url: str, times_a_second: float) -> int:
    """Scrapes until the endpoint closes; returns the number of answers."""
    pause_s, count = 1 / times_a_second, 0
    due = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                answer.read()
        except OSError:
            return count
        count += 1
        # Scrapes missed during a pause are not made up for.
        due, now = due + pause_s, time.monotonic()
        if due > now:
            time.sleep(due - now)
        else:
            due = now


if __name__ == "__main__":
    os.nice(19)  # a real Prometheus runs on another machine: its own work must not slow the run
    print(scrape(sys.argv[1], float(sys.argv[2])))
