"""A fake root folder with the files of /proc and /sys/fs/cgroup that tell a process its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GB = 10**9
UNLIMITED_V1 = 9223372036854771712


def make_root(
    root: Path,
    *,
    own: str,
    mounts: str,
    files: Mapping[str, str | int],
    total: int = 100 * GB,
    available: int = 80 * GB,
) -> None:
    """Writes a machine with `total` and `available` bytes of memory.

    Args:
        own: Content of /proc/self/cgroup.
        mounts: Content of /proc/self/mountinfo.
        files: Content of the control groups' files, by path.
    """
    kb = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
    for path, text in {
        "proc/meminfo": kb,
        "proc/self/cgroup": own,
        "proc/self/mountinfo": mounts,
        **files,
    }.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
