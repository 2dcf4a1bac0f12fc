"""A cluster of real SLURM daemons on this machine: loopback only, without root and systemd."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
TIMEOUT_S = 300.0

# A requeued job waits `cred_expire` seconds for its next start. Nodes share this machine and claim
# more cores than it has (config_overrides).
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=3
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
JobRequeue=1
MinJobAge=86400
FirstJobId={first_job}
PropagateResourceLimits=NONE
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000"
    " Gres=gpu:2 State=UNKNOWN\n"
)


class Cluster:
    """Nodes n1, n2, ... with nominally eight CPUs and two GPUs each."""

    def __init__(self, folder: Path, num_nodes: int, daemons: ExitStack) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = daemons
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        munge = self.folder / "munge"
        for name in (munge, self.folder / "state", self.folder / "spool"):
            name.mkdir(mode=0o700)
        key = munge / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge_files = [f"--{option}={munge}/munge.{name}" for option, name in files.items()]
        self._daemon(["munged", "--foreground", "--force", f"--key-file={key}", *munge_files])
        until(lambda: (munge / "munge.socket").exists(), "munged listens")
        host, ports = socket.gethostname(), free_ports(len(self.nodes) + 1)
        conf = CONF.format(
            host=host,
            port=ports[0],
            user=subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip(),
            folder=self.folder,
            # Ports derive from job IDs, and several clusters may share this machine.
            first_job=random.SystemRandom().randint(1, 10**6),
        )
        lines = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text(conf + "".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Nominal GPUs: empty files.
        for number in range(2):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        self._daemon(["slurmctld", "-D", "-c"])
        for node in self.nodes:
            self.start_node(node)
        self.until_idle(self.nodes)

    def start_node(self, node: str) -> None:
        self._slurmds[node] = self._daemon(["slurmd", "-D", "-N", node])

    def kill_node_daemon(self, node: str) -> None:
        """Kills the daemon with SIGKILL; processes of jobs on the node keep running."""
        daemon = self._slurmds.pop(node)
        daemon.kill()
        daemon.wait()

    def until_idle(self, nodes: Sequence[str]) -> None:
        def idle() -> bool:
            ours = ["-n", ",".join(nodes), "-t", "idle"]
            listed = self.run("sinfo", "-h", "-N", "-o", "%N", *ours, check=False).split()
            return set(listed) == set(nodes)

        until(idle, f"{', '.join(nodes)} are idle")

    def kill_ranks(self) -> None:
        """Kills all processes of jobs, including those that no daemon manages any more."""
        found: list[int] = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self._is_of_a_job(folder):
                    found.append(int(folder.name))
            except OSError:
                continue  # exited meanwhile, or of another user
        # Only after the scan: processes open and close files as others are killed.
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_of_a_job(self, process: Path) -> bool:
        environment = (process / "environ").read_bytes().split(b"\0")
        if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environment:
            return any(variable.startswith(b"SLURM_JOB_ID=") for variable in environment)
        if not (process / "cmdline").read_bytes().startswith(b"slurmstepd"):
            return False
        # slurmstepd has cleared its environment, but has the log of its node's daemon open.
        files = [os.readlink(file) for file in (process / "fd").iterdir()]
        return any(file.startswith(f"{self.folder}/") for file in files)

    def run(self, *line: str, check: bool = True) -> str:
        """Runs a SLURM command and returns its stdout."""
        ended = subprocess.run(line, env=self.environment, capture_output=True, text=True)
        assert not check or ended.returncode == 0, (line, ended.stderr)
        return ended.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id, check=False).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def until_ended(self, job_id: str, timeout_s: float = TIMEOUT_S) -> str:
        """Waits for the end of a job and returns its final state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job(job_id)["JobState"] in final, f"job {job_id} ends", timeout_s)
        return self.job(job_id)["JobState"]

    def _daemon(self, line: Sequence[str]) -> subprocess.Popen[bytes]:
        log = self._daemons.enter_context((self.folder / f"{line[0]}.out").open("ab"))
        process = subprocess.Popen(line, env=self.environment, stdout=log, stderr=log)
        self._daemons.callback(_stop, process)
        return process


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Cluster]:
    """Starts a cluster. Without SLURM, the test is skipped, or fails in CI."""
    missing = [name for name in (*DAEMONS, *CLIENTS) if shutil.which(name, path=PATH) is None]
    if missing:
        # CI installs SLURM, so no test may be skipped there.
        report = pytest.fail if os.environ.get("TVR_CI") else pytest.skip
        report(f"SLURM is not installed: no {', '.join(missing)}")
    # Not pytest's folder: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, ExitStack() as daemons:
        cluster = Cluster(Path(folder), num_nodes, daemons)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill_ranks()


def rank_pid(run_dir: Path, rank: int) -> int | None:
    """Process ID of a rank of the run's job; None if it does not run."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # exited meanwhile, or of another user
        # The command lines of srun and of the batch shell contain that of the ranks.
        if line[1:3] == [b"-m", b"tvr.launchers.slurm.task_main"] and os.fsencode(run_dir) in line:
            if b"SLURM_PROCID=%d" % rank in environment:
                found[int(folder.name)] = parent
    return process_of_a_rank(found)


def process_of_a_rank(parents: Mapping[int, int]) -> int | None:
    """The rank among the processes with its command line: loader workers are forks of it.

    Args:
        parents: Process IDs, each with that of its parent.
    """
    return next((pid for pid, parent in parents.items() if parent not in parents), None)


def until(done: Callable[[], bool], condition: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
