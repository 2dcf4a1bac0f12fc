"""Command line of `tvr launch`: starts jobs locally or on a cluster, and inspects them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_USAGE
from tvr.launchers.job import (
    Container,
    Job,
    captured_environment,
    command_run_dir,
    read_job,
    without_gpu_selection,
)
from tvr.launchers.kubernetes import pytorch_job
from tvr.launchers.restart_loop import run_with_restarts
from tvr.launchers.restart_policy import NO_RESTARTS, RestartPolicy
from tvr.launchers.run_status import DEFAULT_NOTICE_S
from tvr.launchers.sbatch_options import gpus_per_node as gpus_in
from tvr.launchers.sbatch_options import read_sbatch_options
from tvr.launchers.slurm.environment import adopted_options, unused_variables
from tvr.launchers.slurm.nodelist import expand_nodes
from tvr.launchers.slurm.script import sbatch_script
from tvr.launchers.slurm.submission import new_record_name
from tvr.launchers.slurm.submit import (
    cancel_jobs,
    read_logs,
    resubmit_job,
    run_report,
    submit_job,
    with_measured_notice,
)
from tvr.launchers.ssh.launch import read_hosts, run_on_hosts
from tvr.launchers.torchrun.launch import run_local

USAGE_LINE = (
    "tvr launch {local,slurm,deepspeed,kubernetes} [options] -- COMMAND ...\n"
    "       tvr launch {status,logs,cancel,resume} RUN\n"
    "       tvr launch monitor [options]"
)
SBATCH = "--sbatch"
# A container image has its own programs and libraries.
HOST_VARIABLES = {
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CC",
    "CXX",
}


def launch(argv: list[str]) -> int:
    """Runs `tvr launch ...` and returns the exit code."""
    if argv[:1] == ["monitor"]:
        from tvr.launchers.monitoring.write import monitor

        return monitor(argv[1:])
    arguments, command = _split(argv)
    arguments = _joined(arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; the ranks' command goes after `--`")
    if options.starts and not command:
        parser.error("the ranks' command is missing; it goes after `--`")
    if not options.starts and command:
        parser.error(f"{options.where} takes no command: {' '.join(command)}")
    try:
        return options.action(options, command)
    except ValueError as error:
        print(f"tvr launch {options.where}: error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tvr launch",
        usage=USAGE_LINE,
        description="Starts a job on this machine or on a cluster, inspects it, or monitors it.",
    )
    where = parser.add_subparsers(dest="where", required=True, metavar="WHERE")

    def add(name: str, action: Callable[..., int], text: str) -> argparse.ArgumentParser:
        starts = action in (_local, _slurm, _deepspeed, _kubernetes)
        usage = f"tvr launch {name} [options] -- COMMAND ..." if starts else None
        # No abbreviations: a later option could change their meaning.
        child = where.add_parser(name, help=text, description=text, usage=usage, allow_abbrev=False)
        child.set_defaults(action=action, starts=starts)
        return child

    local = add("local", _local, "run a job on this machine")
    local.add_argument("--ranks", type=int, required=True, metavar="N", help="number of processes")
    _add_policy_options(local, NO_RESTARTS)
    _add_cluster_options(add("slurm", _slurm, "submit a job to a SLURM cluster"))
    hosts = add("deepspeed", _deepspeed, "run a job over ssh on the hosts of a DeepSpeed hostfile")
    text = "file with one `HOST slots=RANKS` a line"
    hosts.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help=text)
    text = "host name of the rendezvous (default: the first host)"
    hosts.add_argument("--master-addr", metavar="HOST", help=text)
    text = "port of the rendezvous (default: 29500)"
    hosts.add_argument("--master-port", type=int, default=29500, metavar="N", help=text)
    _add_policy_options(hosts, NO_RESTARTS)
    text = "print a PyTorchJob manifest for `kubectl apply -f -` (experimental)"
    _add_cluster_options(add("kubernetes", _kubernetes, text))
    for name, action, text in (
        ("status", _status, "show a run's job, attempts and progress"),
        ("logs", _logs, "print the output of a run's job"),
        ("cancel", _cancel, "cancel a run's jobs"),
        ("resume", _resume, "submit a run's last job again, after it has ended"),
    ):
        child = add(name, action, text)
        child.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
        if name == "logs":
            child.add_argument("--rank", type=int, help="default: the batch shell, then rank 0")
            child.add_argument("--job", help="job ID (default: the job with the newest output)")
    # Listed for --help only: `monitor` has its own parser.
    where.add_parser("monitor", help="write configuration files for Prometheus and Grafana")
    return parser


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **settings: object) -> None:
        parser.add_argument(name, help=text, **settings)  # type: ignore[arg-type]

    size, text = {"type": int, "metavar": "N"}, {"metavar": "TEXT"}
    add("--nodes", "number of nodes (default: 1)", default=1, **size)
    add("--gpus-per-node", "GPUs per node (default: 0)", default=0, **size)
    add("--ranks-per-node", "processes per node (default: one per GPU, at least 1)", **size)
    add("--cpus-per-rank", "cores per rank, for its loader workers and threads", **size)
    add("--mem", "memory per node, in the form of sbatch --mem", dest="memory", **text)
    for name in ("partition", "account", "qos", "exclude", "dependency"):
        add(f"--{name}", f"same as sbatch --{name}", **text)
    add("--time", "same as sbatch --time", dest="time_limit", **text)
    sbatch = "an option for sbatch, such as --constraint=a100; may be repeated, in quotes"
    add(SBATCH, sbatch, action="append", default=[], metavar="OPTION")
    array = "task numbers such as 0-7; %%a in the command is replaced by a task's number"
    add("--array", array, **text)
    add("--name", "job name (default: the name of the run folder)", **text)
    add("--run-dir", "run folder (default: --run-dir of the command)", **text)
    notice = "seconds before the time limit at which ranks save and exit (default: measured)"
    add("--notice", notice, **size)
    grace = "seconds for which preempted ranks wait for each other at the end (default: 2, and 0.05"
    add("--exit-grace", f"{grace} a rank, up to 30)", type=float, metavar="S")
    add("--interface", "network interface of NCCL and gloo", **text)
    add("--container", "image in which the ranks run", metavar="IMAGE")
    runtimes = ["pyxis", "apptainer"]
    add("--container-runtime", "default: pyxis", choices=runtimes, default="pyxis")
    mounts = "SOURCE:TARGET,... in addition to the run folder and the working directory; for"
    mounts += " Kubernetes CLAIM:PATH,..."
    add("--container-mounts", mounts, default="")
    python = "interpreter in the image (default: python3)"
    add("--container-python", python, default="python3")
    add("--targets", "folder for Prometheus's file_sd target files", metavar="FOLDER")
    add("--print", "print the script or manifest, submit nothing", action="store_true", dest="show")
    _add_policy_options(parser, RestartPolicy())


def _add_policy_options(parser: argparse.ArgumentParser, policy: RestartPolicy) -> None:
    def add(name: str, text: str, default: float) -> None:
        text = f"{text} (default: {default:g})"
        parser.add_argument(name, type=type(default), default=default, metavar="N", help=text)

    failures = "stop after this many failures without a new checkpoint"
    add("--max-failures", failures, policy.max_failures)
    add("--max-restarts", "stop after this many restarts", policy.max_restarts)
    back_off = "seconds before a restart after a failure; doubles with each further failure"
    add("--back-off", back_off, policy.back_off_s)


def _policy(options: argparse.Namespace) -> RestartPolicy:
    return RestartPolicy(
        max_failures=options.max_failures,
        max_restarts=options.max_restarts,
        back_off_s=options.back_off,
    )


def _local(options: argparse.Namespace, command: list[str]) -> int:
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks} must be at least 1")
    run_dir = command_run_dir(command)
    return run_local(
        command,
        ranks=options.ranks,
        policy=_policy(options),
        run_dir=Path(run_dir) if run_dir else None,
    )


def _deepspeed(options: argparse.Namespace, command: list[str]) -> int:
    source = f"--hostfile {options.hostfile}"
    try:
        hosts = read_hosts(options.hostfile.read_text(), source=source)
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    address = options.master_addr or hosts[0].name
    run_dir = command_run_dir(command)
    return run_with_restarts(
        lambda: run_on_hosts(command, hosts, address=address, port=options.master_port),
        _policy(options),
        Path(run_dir) if run_dir else None,
    )


def _slurm(options: argparse.Namespace, command: list[str]) -> int:
    job = _with_adopted_options(_job(options, command))
    _name_unused_variables(job)
    if options.show:
        sys.stdout.write(sbatch_script(job, job.record_path(new_record_name())))
    else:
        print(submit_job(job))
    return EXIT_DONE


def _kubernetes(options: argparse.Namespace, command: list[str]) -> int:
    if not options.show:
        raise ValueError("give --print, and pipe the output to `kubectl apply -f -`")
    sys.stdout.write(pytorch_job(_job(options, command)))
    return EXIT_DONE


def _job(options: argparse.Namespace, command: list[str]) -> Job:
    given = options.run_dir or command_run_dir(command)
    if given is None:
        raise ValueError("--run-dir is missing: the folder for the script and all output")
    run_dir = Path(given).absolute()
    environment = without_gpu_selection(captured_environment(os.environ))
    container = None
    if options.container is not None:
        environment = {k: v for k, v in environment.items() if k not in HOST_VARIABLES}
        container = Container(
            image=options.container,
            runtime=options.container_runtime,
            mounts=tuple(filter(None, options.container_mounts.split(","))),
            python=options.container_python,
        )
    ranks_per_node, notice_s = options.ranks_per_node, options.notice
    sbatch = read_sbatch_options(options.sbatch)
    gpus_per_node: int = options.gpus_per_node or gpus_in(sbatch) or 0
    job = Job(
        command=tuple(command),
        run_dir=str(run_dir),
        directory=os.getcwd(),
        python=sys.executable,
        name=options.name or run_dir.name,
        nodes=options.nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=max(1, gpus_per_node) if ranks_per_node is None else ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        memory=options.memory,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        time_limit=options.time_limit,
        exclude=tuple(expand_nodes(options.exclude)) if options.exclude else (),
        dependency=options.dependency,
        array=options.array,
        notice_s=DEFAULT_NOTICE_S if notice_s is None else notice_s,
        notice_given=notice_s is not None,
        exit_grace_s=options.exit_grace,
        interface=options.interface,
        environment=environment,
        container=container,
        targets=str(Path(options.targets).absolute()) if options.targets else None,
        sbatch=sbatch,
        policy=_policy(options),
    )
    return with_measured_notice(job)


def _status(options: argparse.Namespace, command: list[str]) -> int:
    print(run_report(options.run_dir.absolute()))
    return EXIT_DONE


def _logs(options: argparse.Namespace, command: list[str]) -> int:
    for text in read_logs(options.run_dir.absolute(), options.job, options.rank):
        sys.stdout.write(text)
    return EXIT_DONE


def _cancel(options: argparse.Namespace, command: list[str]) -> int:
    print(f"cancelled: {cancel_jobs(options.run_dir.absolute())}")
    return EXIT_DONE


def _resume(options: argparse.Namespace, command: list[str]) -> int:
    _name_unused_variables(read_job(options.run_dir.absolute()))
    print(resubmit_job(options.run_dir.absolute()))
    return EXIT_DONE


def _with_adopted_options(job: Job) -> Job:
    """Takes the place of the job from SBATCH_* variables where no option gives it."""
    adopted = adopted_options(os.environ)
    taken = {option.partition("=")[0] for option in job.sbatch}
    fields = {name: adopted.pop(name, None) for name in ("account", "partition", "qos")}
    changes = {
        name: value
        for name, value in fields.items()
        if value and getattr(job, name) is None and name not in taken
    }
    further = tuple(f"{name}={value}" for name, value in adopted.items() if name not in taken)
    return replace(job, **changes, sbatch=(*job.sbatch, *further))


def _name_unused_variables(job: Job) -> None:
    given = {name: getattr(job, name) for name in ("account", "partition", "qos")}
    given |= dict(option.split("=", 1) for option in job.sbatch if "=" in option)
    for line in unused_variables(os.environ, given):
        print(f"tvr launch: {line}", file=sys.stderr)


def _joined(arguments: list[str]) -> list[str]:
    """Joins `--sbatch` with its value, which argparse would take for an option."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] == SBATCH:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits the launcher's arguments from the command after `--`."""
    if "--" not in argv:
        return argv, []
    border = argv.index("--")
    return argv[:border], argv[border + 1 :]
