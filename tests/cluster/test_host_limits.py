"""Memory and CPUs of the host: the smallest limit of the process's control groups holds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders.control_groups import GB, UNLIMITED_V1, make_root

from tvr.data_prep.packing.worker_pool import available_processes
from tvr.launchers import host_limits
from tvr.launchers.host_limits import HostCpus, host_cpus, host_line, host_memory
from tvr.launchers.slurm.task_main import torch_environment
from tvr.launchers.torchrun import launch as launch_file
from tvr.trainer.config import CheckpointConfig
from tvr.trainer.engine.staging import staging_line
from tvr.trainer.memory.rank_memory import free_bytes, total_bytes

ROOT = Path(__file__).resolve().parents[2]
PROC = "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
V2_MOUNT = PROC + "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    PROC
    + "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    + "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
)
SLURM_V1 = "9:cpu,cpuacct:/slurm/job_7/step_0\n4:memory:/slurm/job_7/step_0\n0::/init.scope"


@pytest.fixture(autouse=True)
def _machine_of_64_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(host_limits, "MACHINE", tmp_path)


def v2(root: Path, files: Mapping[str, str | int]) -> None:
    placed = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    make_root(root, own="0::/jobs/job/step", mounts=V2_MOUNT, files=placed)


def v1(root: Path, files: Mapping[str, str | int]) -> None:
    placed = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    make_root(root, own=SLURM_V1, mounts=V1_MOUNTS, files=placed)


def test_a_machine_without_control_groups_is_used_whole(tmp_path: Path) -> None:
    make_root(tmp_path, own="", mounts=PROC, files={})
    memory = host_memory()
    assert (memory.total, memory.available, memory.limited_by) == (
        100 * GB // 1024 * 1024,
        80 * GB // 1024 * 1024,
        None,
    )
    assert host_cpus() == HostCpus(64, 64, None)
    for name in ("cgroup", "mountinfo"):
        (tmp_path / "proc/self" / name).unlink()
    assert host_memory() == memory


@pytest.mark.parametrize("level", ["jobs/job/step", "jobs/job", "jobs"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_the_smallest_limit_of_version_2_at_any_level_holds(
    tmp_path: Path, level: str, name: str
) -> None:
    files: dict[str, str | int] = {
        f"{group}/{file}": "max"
        for group in ("jobs/job/step", "jobs/job", "jobs")
        for file in ("memory.max", "memory.high")
    }
    files |= {f"{level}/{name}": 8 * GB, f"{level}/memory.current": 6 * GB}
    files[f"{level}/memory.stat"] = (
        f"anon {GB}\ninactive_file {2 * GB}\nactive_file {GB}\nslab_reclaimable {GB}"
    )
    v2(tmp_path, files)
    memory = host_memory()
    assert memory.total == 8 * GB
    # Of 6 GB in use, 4 are page cache and the like, which the kernel gives back.
    assert memory.available == 6 * GB
    assert memory.limited_by == f"/sys/fs/cgroup/{level}/{name}"


@pytest.mark.parametrize("level", ["slurm/job_7/step_0", "slurm/job_7", "slurm"])
def test_the_smallest_limit_of_version_1_at_any_level_holds(tmp_path: Path, level: str) -> None:
    levels = ("slurm/job_7/step_0", "slurm/job_7", "slurm", ".")
    files: dict[str, str | int] = {
        f"memory/{name}/memory.limit_in_bytes": UNLIMITED_V1 for name in levels
    }
    files |= {f"cpu,cpuacct/{name}/cpu.cfs_quota_us": -1 for name in levels}
    files |= {f"cpu,cpuacct/{name}/cpu.cfs_period_us": 100_000 for name in levels}
    files |= {
        f"memory/{level}/memory.limit_in_bytes": 8 * GB,
        f"memory/{level}/memory.usage_in_bytes": 5 * GB,
        f"memory/{level}/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GB}\n"
        f"total_active_file {GB}",
        f"cpu,cpuacct/{level}/cpu.cfs_quota_us": 650_000,
    }
    v1(tmp_path, files)
    memory = host_memory()
    assert (memory.total, memory.available) == (8 * GB, 6 * GB)
    assert memory.limited_by == f"/sys/fs/cgroup/memory/{level}/memory.limit_in_bytes"
    path = f"/sys/fs/cgroup/cpu,cpuacct/{level}/cpu.cfs_quota_us"
    assert host_cpus() == HostCpus(6, 64, path)


def test_available_memory_is_bounded_by_every_level_and_never_negative(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "jobs/job/step/memory.max": 8 * GB,
        "jobs/job/step/memory.current": 1 * GB,
        # The other steps of the job leave less than this step's own limit.
        "jobs/job/memory.max": 20 * GB,
        "jobs/job/memory.current": 18 * GB,
    }
    v2(tmp_path, files)
    memory = host_memory()
    assert (memory.total, memory.available) == (8 * GB, 2 * GB)
    files["jobs/job/memory.current"] = 21 * GB
    v2(tmp_path, files)
    assert host_memory().available == 0


def test_a_limit_above_the_machine_changes_nothing(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"jobs/memory.max": 900 * GB, "jobs/memory.current": GB}
    v2(tmp_path, {**files, "jobs/cpu.max": "12800000 100000"})
    memory = host_memory()
    assert (memory.total, memory.limited_by) == (100 * GB // 1024 * 1024, None)
    assert host_cpus() == HostCpus(64, 64, None)


@pytest.mark.parametrize(
    ("quotas", "usable"),
    [
        ({"jobs/job/step": "max 100000"}, 64),
        ({"jobs/job/step": "250000 100000"}, 2),
        ({"jobs/job/step": "50000 100000"}, 1),
        ({"jobs/job/step": "max 100000", "jobs": "400000 50000"}, 8),
        ({"jobs/job/step": "800000 100000", "jobs/job": "300000 100000"}, 3),
    ],
    ids=str,
)
def test_cpus_are_the_whole_ones_of_the_smallest_quota(
    tmp_path: Path, quotas: Mapping[str, str], usable: int
) -> None:
    v2(tmp_path, {f"{group}/cpu.max": text for group, text in quotas.items()})
    cpus = host_cpus()
    assert (cpus.usable, cpus.on_machine) == (usable, 64)
    assert (cpus.limited_by is None) == (usable == 64)


@pytest.mark.parametrize(
    ("own", "mounted"),
    [
        ("0::/", "/"),  # a group namespace of its own: the container sees its group as the root
        ("0::/docker/abc", "/docker/abc"),  # the host's namespace, and the container's own mount
        ("0::/../other", "/"),  # a process that was moved in from elsewhere
        ("0::/init.scope", "/docker/abc"),  # the mount shows a group other than the process's
    ],
)
def test_the_container_s_own_mount_holds_its_limits(tmp_path: Path, own: str, mounted: str) -> None:
    mounts = f"31 23 0:28 {mounted} /sys/fs/cgroup ro - cgroup2 cgroup rw"
    files: dict[str, str | int] = {
        "sys/fs/cgroup/memory.max": 4 * GB,
        "sys/fs/cgroup/memory.current": GB,
        "sys/fs/cgroup/cpu.max": "300000 100000",
    }
    make_root(tmp_path, own=own, mounts=mounts, files=files)
    memory = host_memory()
    assert (memory.total, memory.available) == (4 * GB, 3 * GB)
    assert host_cpus().usable == 3


def test_a_mount_point_with_a_space_is_read(tmp_path: Path) -> None:
    mounts = "31 23 0:28 / /my\\040groups rw - cgroup2 none rw"
    files: dict[str, str | int] = {"my groups/job/cpu.max": "100000 100000"}
    make_root(tmp_path, own="0::/job", mounts=mounts, files=files)
    assert host_cpus() == HostCpus(1, 64, "/my groups/job/cpu.max")


def test_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "MACHINE", Path("/"))
    memory = host_memory()
    assert 0 < memory.available <= memory.total
    assert host_cpus().usable >= 1


def test_every_part_of_the_program_keeps_to_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, str | int] = {
        "jobs/job/memory.max": 8 * GB,
        "jobs/job/memory.current": 3 * GB,
        "jobs/job/step/cpu.max": "600000 100000",
    }
    v2(tmp_path, files)
    assert (total_bytes(), free_bytes()) == (8 * GB, 5 * GB)
    assert "(5 GB are free here" in staging_line(CheckpointConfig(background=True))
    assert available_processes() == 6
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    task["SLURM_NTASKS_PER_NODE"] = "2"
    assert torch_environment(task)["OMP_NUM_THREADS"] == "3"
    seen = []

    def run(line: Any, environment: Mapping[str, str], poll: Any) -> tuple[int, bool]:
        seen.append(environment["OMP_NUM_THREADS"])
        return 0, False

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch_file, "_run_forwarding_signals", run)
    launch_file.run_once(["true"], ranks=2)
    assert seen == ["3"]
    assert host_line() == (
        "host: 5 of 8 GB of memory free, 6 of 64 CPUs (memory limited by"
        " /sys/fs/cgroup/jobs/job/memory.max; CPUs limited by /sys/fs/cgroup/jobs/job/step/cpu.max)"
    )


def test_no_other_module_reads_the_machine_s_size() -> None:
    readers = [
        file.relative_to(ROOT).as_posix()
        for folder in ("data_prep", "kernels", "launchers", "trainer", "tests/benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"virtual_memory|cpu_count|sched_getaffinity|meminfo", file.read_text())
    ]
    assert readers == ["launchers/host_limits.py"]
