"""A Google Cloud Storage server on the loopback interface, with one empty bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from builders.server_process import server_port

SERVER = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()  # until the parent closes it, or ends
"""


@contextmanager
def serve_gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the server in a process, and points gcsfs to it; yields its bucket's URL."""
    with server_port(SERVER) as port, monkeypatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # Otherwise gcsfs asks Google for the kind of the bucket.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield "gs://bucket"
