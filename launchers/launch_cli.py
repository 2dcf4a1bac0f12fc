"""The command line of `tvr launch`: where the ranks of a job run, and what became of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_USAGE
from tvr.launchers.job import Container, Job, captured, run_dir_of, without_devices
from tvr.launchers.kubernetes import pytorch_job
from tvr.launchers.restart_loop import run_again
from tvr.launchers.restart_policy import ONCE, Policy
from tvr.launchers.run_status import notice_for, read_progress
from tvr.launchers.slurm import submit as runs
from tvr.launchers.slurm.nodelist import expand_nodes
from tvr.launchers.slurm.script import sbatch_script
from tvr.launchers.ssh.launch import read_hosts, run_on_hosts
from tvr.launchers.torchrun.launch import run_local

USAGE_LINE = (
    "tvr launch {local,slurm,deepspeed,kubernetes} [options] -- COMMAND ...\n"
    "       tvr launch {status,logs,cancel,resume} RUN\n"
    "       tvr launch monitor [options]"
)
# With an image of their own ranks have other programs and libraries.
OF_THE_HOST = {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CC", "CXX"}


def launch(argv: list[str]) -> int:
    """`tvr launch ...`: returns the exit code."""
    if argv[:1] == ["monitor"]:
        from tvr.launchers.monitoring.write import monitor

        return monitor(argv[1:])
    ours, command = _split(argv)
    parser = _parser()
    options, unknown = parser.parse_known_args(ours)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; the command of the ranks goes after `--`")
    if options.starts and not command:
        parser.error("the command of the ranks is missing; it goes after `--`")
    if not options.starts and command:
        parser.error(f"{options.where} takes no command: {' '.join(command)}")
    try:
        return options.action(options, command)
    except ValueError as error:
        print(f"tvr launch {options.where}: error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tvr launch", usage=USAGE_LINE)
    where = parser.add_subparsers(dest="where", required=True, metavar="WHERE")

    def add(name: str, action: Callable[..., int], text: str) -> argparse.ArgumentParser:
        starts = action in (_local, _slurm, _deepspeed, _kubernetes)
        usage = f"tvr launch {name} [options] -- COMMAND ..." if starts else None
        # Abbreviations would mean something else once there are more options.
        child = where.add_parser(name, help=text, description=text, usage=usage, allow_abbrev=False)
        child.set_defaults(action=action, starts=starts)
        return child

    local = add("local", _local, "processes on this machine")
    local.add_argument("--ranks", type=int, required=True, metavar="N", help="processes to start")
    _add_policy(local, ONCE)
    _add_cluster_options(add("slurm", _slurm, "a batch job on a SLURM cluster"))
    hosts = add("deepspeed", _deepspeed, "processes on the hosts of a hostfile, through ssh")
    text = "lines `HOST slots=RANKS`, as DeepSpeed has them"
    hosts.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help=text)
    hosts.add_argument("--master-addr", metavar="HOST", help="default: the first one")
    text = "where ranks meet (default: 29500)"
    hosts.add_argument("--master-port", type=int, default=29500, metavar="N", help=text)
    _add_policy(hosts, ONCE)
    text = "a PyTorchJob for `kubectl apply -f -`; mounts are CLAIM:PATH"
    _add_cluster_options(add("kubernetes", _kubernetes, text))
    for name, action, text in (
        ("status", _status, "how a run's job is doing"),
        ("logs", _logs, "what its ranks said"),
        ("cancel", _cancel, "end its job"),
        ("resume", _resume, "submit it again, after its job has ended"),
    ):
        child = add(name, action, text)
        child.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")
        if name == "logs":
            child.add_argument("--rank", type=int, help="default: the batch shell, then rank 0")
            child.add_argument("--job", help="number of the job; default: the last one started")
    # Has a parser of its own.
    where.add_parser("monitor", help="files for Prometheus and Grafana to watch over runs")
    return parser


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **settings: object) -> None:
        parser.add_argument(name, help=text, **settings)  # type: ignore[arg-type]

    size, batch = {"type": int, "metavar": "N"}, {"metavar": "TEXT"}
    add("--nodes", "nodes (default: 1)", default=1, **size)
    add("--gpus-per-node", "GPUs of a node (default: 0)", default=0, **size)
    add("--ranks-per-node", "processes on a node (default: one for each GPU, at least 1)", **size)
    add("--cpus-per-rank", "cores of a rank, for its loader workers and threads", **size)
    add("--mem", "memory of a node, as sbatch takes it", dest="memory", **batch)
    for name in ("partition", "account", "qos", "exclude", "dependency"):
        add(f"--{name}", f"as sbatch --{name}", **batch)
    add("--time", "as sbatch --time", dest="time_limit", **batch)
    add("--array", "numbers of tasks such as 0-7; %%a in the command is a task's own", **batch)
    add("--name", "of the job (default: the run's folder)", **batch)
    add("--run-dir", "of the run (default: the --run-dir that the command has)", **batch)
    notice = "seconds before the time is up at which ranks save (default: as measured)"
    add("--notice", notice, **size)
    add("--interface", "network interface of NCCL and gloo", **batch)
    add("--container", "image in which ranks run", metavar="IMAGE")
    add("--container-runtime", "default: pyxis", choices=["pyxis", "apptainer"], default="pyxis")
    add("--container-mounts", "SOURCE:TARGET,... beside run and working folder", default="")
    add("--container-python", "interpreter inside (default: python3)", default="python3")
    add("--targets", "folder for Prometheus's file_sd", metavar="FOLDER")
    add("--print", "only show what would be submitted", action="store_true", dest="show")
    _add_policy(parser, Policy())


def _add_policy(parser: argparse.ArgumentParser, policy: Policy) -> None:
    def add(name: str, text: str, default: float) -> None:
        text = f"{text} (default: {default:g})"
        parser.add_argument(name, type=type(default), default=default, metavar="N", help=text)

    add("--max-failures", "failures without a new checkpoint that end it", policy.max_failures)
    add("--max-restarts", "restarts in all", policy.max_restarts)
    add("--back-off", "seconds before a restart; twice as long each time", policy.back_off_s)


def _policy(options: argparse.Namespace) -> Policy:
    return Policy(
        max_failures=options.max_failures,
        max_restarts=options.max_restarts,
        back_off_s=options.back_off,
    )


def _local(options: argparse.Namespace, command: list[str]) -> int:
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks} must be at least 1")
    run_dir = run_dir_of(command)
    return run_local(
        command,
        ranks=options.ranks,
        policy=_policy(options),
        run_dir=Path(run_dir) if run_dir else None,
    )


def _deepspeed(options: argparse.Namespace, command: list[str]) -> int:
    try:
        hosts = read_hosts(options.hostfile.read_text(), where=f"--hostfile {options.hostfile}")
    except OSError as error:
        raise ValueError(f"--hostfile {options.hostfile}: {error.strerror}") from None
    address = options.master_addr or hosts[0].name
    run_dir = run_dir_of(command)
    return run_again(
        lambda: run_on_hosts(command, hosts, address=address, port=options.master_port),
        _policy(options),
        Path(run_dir) if run_dir else None,
    )


def _slurm(options: argparse.Namespace, command: list[str]) -> int:
    job = _job(options, command)
    if options.show:
        sys.stdout.write(sbatch_script(job, job.record(runs.new_name())))
    else:
        print(runs.submit(job))
    return EXIT_DONE


def _kubernetes(options: argparse.Namespace, command: list[str]) -> int:
    if not options.show:
        raise ValueError("give --print, and what it prints to `kubectl apply -f -`")
    sys.stdout.write(pytorch_job(_job(options, command)))
    return EXIT_DONE


def _job(options: argparse.Namespace, command: list[str]) -> Job:
    given = options.run_dir or run_dir_of(command)
    if given is None:
        raise ValueError("--run-dir, the folder for script and output, is not given")
    run_dir = Path(given).absolute()
    environment = without_devices(captured(os.environ))
    container = None
    if options.container is not None:
        environment = {k: v for k, v in environment.items() if k not in OF_THE_HOST}
        container = Container(
            image=options.container,
            runtime=options.container_runtime,
            mounts=tuple(filter(None, options.container_mounts.split(","))),
            python=options.container_python,
        )
    ranks_per_node = options.ranks_per_node
    return Job(
        command=tuple(command),
        run_dir=str(run_dir),
        directory=os.getcwd(),
        python=sys.executable,
        name=options.name or run_dir.name,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=max(1, options.gpus_per_node) if ranks_per_node is None else ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        memory=options.memory,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        time_limit=options.time_limit,
        exclude=tuple(expand_nodes(options.exclude)) if options.exclude else (),
        dependency=options.dependency,
        array=options.array,
        notice_s=notice_for(read_progress(run_dir)) if options.notice is None else options.notice,
        notice_given=options.notice is not None,
        interface=options.interface,
        environment=environment,
        container=container,
        targets=str(Path(options.targets).absolute()) if options.targets else None,
        policy=_policy(options),
    )


def _status(options: argparse.Namespace, command: list[str]) -> int:
    print(runs.status(options.run_dir.absolute()))
    return EXIT_DONE


def _logs(options: argparse.Namespace, command: list[str]) -> int:
    for text in runs.logs(options.run_dir.absolute(), options.job, options.rank):
        sys.stdout.write(text)
    return EXIT_DONE


def _cancel(options: argparse.Namespace, command: list[str]) -> int:
    print(f"cancelled: {runs.cancel(options.run_dir.absolute())}")
    return EXIT_DONE


def _resume(options: argparse.Namespace, command: list[str]) -> int:
    print(runs.resume(options.run_dir.absolute()))
    return EXIT_DONE


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    border = argv.index("--")
    return argv[:border], argv[border + 1 :]
