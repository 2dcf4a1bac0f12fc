"""A server in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

START_TIMEOUT_S = 60.0


@contextmanager
def server_port(program: str) -> Iterator[int]:
    """Runs a server that ends with the block, or with this process; yields its port.

    Args:
        program: Python code that starts the server, prints its port, and reads standard input to
            the end.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    try:
        port = process.stdout.readline().strip()
        timer.cancel()
        assert port, "the server did not start; install the extra 'dev'"
        yield int(port)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
