"""Runs the steps of a plan. A finished step is recorded, and skipped by the next call.

The record of a step is written after the command has ended with 0, in one piece. A step without a
record is run again: each command goes on where it was stopped (`tvr pack`, `tvr train`), or is
short (`tvr evaluate`). So a call may be killed at any time.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from tvr.launchers.process import child_set_up
from tvr.trainer.reproduction.plan import ReproductionPlan, ReproductionStep

RunCommand = Callable[[Sequence[str]], int]
"""Runs a command that begins with `tvr`, to its exit code."""


def run_as_child(command: Sequence[str]) -> int:
    """Runs `tvr ...` as a process, which ends if this one dies; returns its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tvr.launchers.cli", *command[1:]],
        preexec_fn=child_set_up(signal.SIGTERM),
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the command got the interrupt too, and saves what it must


def record_of(out: Path, step: ReproductionStep) -> Path:
    """The file that says that a step is finished."""
    return out / "steps" / f"{step.name}.json"


def is_done(out: Path, step: ReproductionStep) -> bool:
    """True if a step is recorded as finished and its product is there.

    Raises:
        ValueError: it was finished with other settings.
    """
    record = record_of(out, step)
    if not record.is_file() or not step.product.exists():
        return False
    identity = json.loads(record.read_text())["identity"]
    if identity != list(step.identity):
        differ = [f"{one} -> {two}" for one, two in zip(identity, step.identity) if one != two]  # noqa: B905
        change = "; ".join(differ) or "more or fewer options"
        raise ValueError(
            f"step {step.name} in {out} was finished with other settings ({change}): give another"
            f" --out, or delete {record} and {step.product.parent} to do it again"
        )
    return True


def run_steps(
    plan: ReproductionPlan, run: RunCommand = run_as_child, log: Callable[[str], None] = print
) -> int:
    """Runs all steps that are not finished, in order.

    With `options.slurm`, the commands of unfinished trainings are printed for submission, and not
    run.

    Returns:
        0 if all steps are finished; 75 if trainings wait for SLURM or a step was preempted; else
        the exit code of the step that failed.

    Raises:
        ValueError: another call works in the folder, or a finished step has other settings.
    """
    out = plan.options.out
    out.mkdir(parents=True, exist_ok=True)
    with _only_call(out):
        done = [is_done(out, step) for step in plan.steps]  # all settings before any work
        waiting: list[ReproductionStep] = []
        for number, (step, finished) in enumerate(zip(plan.steps, done, strict=True), start=1):
            place = f"[{number}/{len(plan.steps)}] {step.name}"
            if finished:
                log(f"{place}: complete")
                continue
            if plan.options.slurm is not None and step.kind == "train":
                if not _is_trained(plan, step):
                    waiting.append(step)
                    log(f"{place}: submit it with\n    {step.line}")
                    continue
            elif plan.options.slurm is not None and step.kind == "evaluate" and waiting:
                log(f"{place}: waits for the trainings")
                continue
            else:
                code = _timed(place, step, run, log)
                if code != EXIT_DONE:
                    return code
            identity = {"identity": step.identity, "command": step.command}
            write_atomically(record_of(out, step), json.dumps(identity, indent=1) + "\n")
        if waiting:
            log("start the same command again when these jobs are finished")
            return EXIT_PREEMPTED
    return EXIT_DONE


def _timed(place: str, step: ReproductionStep, run: RunCommand, log: Callable[[str], None]) -> int:
    """Runs a step and tells its time; its own command shows the progress within it."""
    log(f"{place}:\n    {step.line}")
    started = time.monotonic()
    code = run(step.command)
    seconds = time.monotonic() - started
    if code == EXIT_DONE and not step.product.exists():
        log(f"{place}: the command ended with 0, but {step.product} is not there")
        return EXIT_FAILED
    ended = "done" if code == EXIT_DONE else f"ended with exit code {code}"
    log(f"{place}: {ended} in {seconds:,.0f} s")
    # A negative code is the signal that killed it.
    return code if code >= 0 else EXIT_FAILED


def _is_trained(plan: ReproductionPlan, step: ReproductionStep) -> bool:
    """True if the run of a step was trained and evaluated to its last step, by whichever job.

    Raises:
        ValueError: it was trained with settings of another result.
    """
    from tvr.trainer.checkpoint.resume_rules import named_settings, rule_of
    from tvr.trainer.run_dir import is_finished, read_config

    run_dir = step.product.parent
    if not step.product.exists():
        return False
    stored = read_config(run_dir)
    found, planned = (dict(named_settings(asdict(each))) for each in (stored, plan.config))
    planned["model.pretrained"] = str(plan.options.pretrained)
    differ = [
        f"{name} {found[name]} -> {value}"
        for name, value in planned.items()
        if name in found and found[name] != value and name != "train.seed"
        if rule_of(name).kind in ("effect", "refused") or name == "model.pretrained"
    ]
    if differ:
        raise ValueError(
            f"{run_dir} was trained with other settings ({'; '.join(differ)}): give another --out,"
            f" or delete {run_dir} to train it again"
        )
    return is_finished(run_dir, stored)


@contextmanager
def _only_call(out: Path) -> Iterator[None]:
    """Holds the folder: two calls would run the same command at the same time."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out}: another `tvr reproduce` works there") from None
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
