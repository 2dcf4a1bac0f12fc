"""Memory and CPUs that this process may use: the machine's, or less where a control group says so.

A container or a batch job sees the memory and the cores of the whole node in /proc. The kernel
ends the process, or stops it for a part of each period, at the limits of its control group. Both
versions of control groups are read, and all levels: the smallest limit of the process's own group
and of the groups above it holds.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Folder that holds `proc`, and below which the control groups are mounted.
MACHINE = Path("/")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the host, in bytes."""

    total: int
    """Memory of the machine, or the limit of a control group if that is less."""
    available: int
    """Memory that can be allocated without swapping; page cache counts as available."""
    limited_by: str | None
    """File of the control group that limits `total`; None if the machine does."""


@dataclass(frozen=True, slots=True)
class HostCpus:
    """CPUs of the host that this process may use."""

    usable: int
    """CPUs on which the process may run, or the whole CPUs of its quota if these are fewer."""
    on_machine: int
    """CPUs on which the process may run, whatever its quota."""
    limited_by: str | None
    """File of the control group whose quota limits `usable`; None if no quota does."""


def host_memory() -> HostMemory:
    """Reads total and available memory."""
    root = MACHINE
    machine = _numbers(root / "proc/meminfo")
    total, available = machine["MemTotal:"] * 1024, machine["MemAvailable:"] * 1024
    limited_by = None
    for folder in _groups(root, "memory"):
        for version in (_V2, _V1):
            limits = [(_number(folder / name), folder / name) for name in version.limits]
            known = [(limit, path) for limit, path in limits if limit is not None]
            if not known:
                continue
            limit, path = min(known)
            if limit < total:
                total, limited_by = limit, _shown(path, root)
            used = _number(folder / version.usage)
            if used is not None:
                kinds = _numbers(folder / "memory.stat")
                cached = sum(kinds.get(kind, 0) for kind in version.page_cache)
                available = min(available, limit - max(0, used - cached))
    return HostMemory(total, max(0, min(available, total)), limited_by)


def host_cpus() -> HostCpus:
    """Reads the number of CPUs.

    A quota of 2.5 CPUs counts as 2: a third thread would be stopped for half of the time, and the
    others would wait for it.
    """
    root = MACHINE
    on_machine = len(os.sched_getaffinity(0))
    usable, limited_by = on_machine, None
    for folder in _groups(root, "cpu"):
        for path, quota in ((folder / name, read(folder)) for name, read in _QUOTAS.items()):
            if quota is not None and max(1, int(quota)) < usable:
                usable, limited_by = max(1, int(quota)), _shown(path, root)
    return HostCpus(usable, on_machine, limited_by)


def host_line() -> str:
    """One line that names the memory and the CPUs, and the control groups that limit them."""
    memory, cpus = host_memory(), host_cpus()
    limits = [
        f"{what} limited by {path}"
        for what, path in (("memory", memory.limited_by), ("CPUs", cpus.limited_by))
        if path is not None
    ]
    why = "; ".join(limits) if limits else "no control group sets a lower limit"
    return (
        f"host: {memory.available / 1e9:.3g} of {memory.total / 1e9:.3g} GB of memory free,"
        f" {cpus.usable} of {cpus.on_machine} CPUs ({why})"
    )


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    """Names of one version of control groups. All values include the groups below."""

    limits: tuple[str, ...]
    usage: str
    page_cache: tuple[str, ...]
    """Lines of memory.stat whose memory the kernel frees when the group reaches its limit."""


_V2 = _MemoryFiles(
    # Above memory.high the kernel does not end the process, but lets it hardly run.
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    page_cache=("inactive_file", "active_file", "slab_reclaimable"),
)
_V1 = _MemoryFiles(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    page_cache=("total_inactive_file", "total_active_file"),
)


def _quota_v2(folder: Path) -> float | None:
    text = _text(folder / "cpu.max")
    quota, _, period = (text or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = _number(folder / "cpu.cfs_quota_us")
    period = _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


_QUOTAS = {"cpu.max": _quota_v2, "cpu.cfs_quota_us": _quota_v1}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's groups with a controller, and of the groups above."""
    own = _own_groups(root, controller)
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        mounted, point = (_unescaped(field) for field in left.split()[3:5])
        kind, _, options = right.split(maxsplit=2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version not in own or (version == 1 and controller not in options.split(",")):
            continue
        top, below = root / point.lstrip("/"), PurePosixPath(own[version])
        # In a container the mount may show a group other than the root, or not this process's.
        names = below.relative_to(mounted).parts if below.is_relative_to(mounted) else ()
        names = () if ".." in names else names
        for depth in range(len(names), -1, -1):
            yield top.joinpath(*names[:depth])


def _own_groups(root: Path, controller: str) -> dict[int, str]:
    """Paths of this process's groups that can have a controller, by version."""
    own = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    return own


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _shown(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root)}"


def _text(path: Path) -> str | None:
    """The content of a file of the kernel; None where this kernel or container has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file, or it says `max`, no limit."""
    text = _text(path)
    return None if text is None or text == "max" else int(text)


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = (line.split() for line in (_text(path) or "").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
