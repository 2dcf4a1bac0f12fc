"""Worker processes end with their parent, also while they wait in a read that never ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tvr.launchers.process import PARENT_PID, is_running

LIMIT_S = 60.0

# A parent whose workers print their process ids, and then wait in a read of a FIFO that nobody
# writes to. The parent then waits for its workers.
LOADER = """
    import os, sys
    from torch.utils.data import DataLoader
    from tvr.data_prep.reading.worker_process import start_worker

    class Stuck:
        def __len__(self): return 8
        def __getitem__(self, row):
            os.write(1, f"{os.getpid()}\\n".encode())
            return os.read(os.open(sys.argv[1], os.O_RDONLY), 1)

    loader = DataLoader(
        Stuck(), num_workers=2, worker_init_fn=start_worker, multiprocessing_context="fork"
    )
"""
LOADERS = {
    "loader": LOADER + "    next(iter(loader))\n",
    # The kernel watches the thread that forked, so another thread needs another way.
    "loader in a thread": LOADER
    + "    import threading\n    threading.Thread(target=lambda: next(iter(loader))).start()\n",
    "packing": """
    import os, socket, sys
    from tvr.data_prep.limited_process import LimitedProcess
    from tvr.data_prep.packing import worker_pool
    from tvr.data_prep.packing.plan import PackSettings
    from tvr.data_prep.records import Clip

    if __name__ == "__main__":
        settings = PackSettings(
            layout="frames", num_frames=2, short_side=None, jpeg_quality=90, samples_per_shard=4,
            reencode=False, keyframe_interval=16, words=False,
        )
        server = socket.create_server(("127.0.0.1", 0))  # never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v.mp4"
        clips = [
            Clip(key=f"k{n}", video=f"{url}?{n}", captions=("x",), video_id="k") for n in range(4)
        ]
        make = LimitedProcess._start

        def start(process):
            make(process)
            print(process._process.pid, flush=True)

        LimitedProcess._start = start
        list(worker_pool.pack_clips(clips, settings, 2))
    """,
    "process pool": """
    import os, sys
    from concurrent.futures import ProcessPoolExecutor
    from tvr.launchers.process import end_with_parent

    def work(fifo):
        os.write(1, f"{os.getpid()}\\n".encode())
        os.read(os.open(fifo, os.O_RDONLY), 1)

    with ProcessPoolExecutor(2, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        list(pool.map(work, [sys.argv[1]] * 2))
    """,
}


def wait_until_gone(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + LIMIT_S
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def read_pids(process: subprocess.Popen[bytes], number: int) -> list[int]:
    assert process.stdout is not None
    pids, deadline = list[int](), time.monotonic() + LIMIT_S
    while len(pids) < number:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        line = process.stdout.readline() if ready else b""
        assert line, "the workers did not start"
        pids.append(int(line))
    return pids


@pytest.mark.parametrize("name", LOADERS)
def test_a_worker_in_a_read_ends_with_its_killed_parent(name: str, tmp_path: Path) -> None:
    script, fifo = tmp_path / "parent.py", tmp_path / "fifo"
    script.write_text(textwrap.dedent(LOADERS[name]))
    os.mkfifo(fifo)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(fifo)], stdout=subprocess.PIPE, bufsize=0
    )
    pids: list[int] = []
    try:
        pids = read_pids(parent, 2)
        time.sleep(0.5)  # for the read; a worker that has not begun it ends just as well
        parent.kill()
        parent.wait(LIMIT_S)
        assert wait_until_gone(pids) == []
    finally:
        assert parent.stdout is not None
        parent.stdout.close()
        parent.kill()
        parent.wait(LIMIT_S)
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_parent_that_died_before_the_request_counts() -> None:
    """A process whose real parent is another one than expected ends at once."""
    code = "import sys; from tvr.launchers.process import end_with_parent as e; e(int(sys.argv[1]))"
    for parent, expected in ((os.getpid(), 0), (2**22 + 1, -signal.SIGKILL)):
        command = [sys.executable, "-c", f"{code}; print('on')", str(parent)]
        done = subprocess.run(command, capture_output=True, timeout=LIMIT_S)
        assert (done.returncode, done.stdout) == (expected, b"" if expected else b"on\n")


def test_a_rank_checks_the_parent_that_its_launcher_names() -> None:
    code = "from tvr.launchers.rank_main import run_tvr; import os; run_tvr(['--help']);"
    code += f"print({PARENT_PID!r} in os.environ)"
    for parent, expected in ((os.getpid(), 0), (2**22 + 1, -signal.SIGKILL)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {PARENT_PID: str(parent)},
            capture_output=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == expected
        assert expected or done.stdout.endswith(b"False\n")
