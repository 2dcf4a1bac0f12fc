"""Runs damaged inputs in worker processes, each with a time limit, and collects what went wrong."""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from builders.fuzz.file_targets import Annotations, Benchmarks
from builders.fuzz.foreign_targets import ForeignTars
from builders.fuzz.record_targets import Checkpoints, Packings
from builders.fuzz.sample_targets import Columns, DataSets, Samples
from builders.fuzz.target import SEEDS, Target
from builders.fuzz.video_targets import Containers

TARGETS: tuple[type[Target], ...] = (
    *(Containers, Samples, DataSets, Columns, ForeignTars),
    *(Annotations, Benchmarks, Checkpoints, Packings),
)
BATCH = 25
INPUT_LIMIT_S = 60.0
"""Time of one input, on a machine that does other work, too; most take milliseconds."""
MEMORY_BYTES = 6 << 30
"""Address space of a worker."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input that gave neither a documented error nor a right result."""

    target: str
    seed: str
    index: int
    what: str
    path: Path
    """File that holds the input."""

    def __str__(self) -> str:
        return f"{self.target}, {self.seed}, input {self.index}: {self.what}\n  in {self.path}"


@dataclass(kw_only=True)
class FuzzReport:
    """What came of all inputs."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Number of inputs by outcome, by target."""
    findings: list[Finding] = field(default_factory=list)
    crashes: list[Finding] = field(default_factory=list)
    """Inputs that ended their process, also among the findings unless the decoder crashed."""
    milliseconds: Counter[str] = field(default_factory=Counter)
    """Time of all inputs by target, in the workers."""

    @property
    def num_inputs(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    def table(self) -> str:
        """Returns a line a target: inputs, milliseconds an input, and outcomes."""
        lines = []
        for target, counts in self.outcomes.items():
            total = sum(counts.values())
            each = self.milliseconds[target] / max(1, total)
            shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            lines.append(f"{target}: {total} inputs, {each:.1f} ms each: {shown}")
        return "\n".join(lines)


def make_seeds(folder: Path) -> None:
    """Writes the whole files of all targets."""
    for target in TARGETS:
        (folder / target.name / SEEDS).mkdir(parents=True)
        target.make(folder / target.name)


def damaged_input(target: Target, seed: int, index: int) -> tuple[str, bytes]:
    """Returns the name of the whole file, and the damaged content, of one input."""
    chance = Random(f"{seed}/{target.name}/{index}")
    name = chance.choice(list(target.seeds))
    return name, target.mutate(name, chance)


def file_name(target: str, name: str, seed: int, index: int) -> str:
    """Returns the name of a file with an input, from which `replay` knows what it is."""
    return f"{target}--{name}--{seed}-{index}.bin"


def replay(path: Path, seeds: Path) -> str:
    """Checks the input in a file of `file_name` in this process. Raises as `Target.check`."""
    target_name, name, _ = path.name.split("--")
    (kind,) = (each for each in TARGETS if each.name == target_name)
    with tempfile.TemporaryDirectory() as scratch:
        target = kind(seeds / target_name, Path(scratch))
        return target.check(name, path.read_bytes())


def run_fuzz(
    num_inputs: int,
    *,
    seed: int,
    seeds: Path,
    failures: Path,
    workers: int = 2,
    max_s: float = 180.0,
    targets: Sequence[type[Target]] = TARGETS,
) -> FuzzReport:
    """Checks at least `num_inputs` inputs, or as many as fit into `max_s` seconds.

    Args:
        seeds: Folder of `make_seeds`.
        failures: Folder for the inputs that went wrong.
    """
    batches = deque(_batches(num_inputs, targets))
    report, deadline_s = FuzzReport(), time.monotonic() + max_s
    pool = [_Worker(seed, seeds, failures) for _ in range(workers)]
    try:
        while True:
            for worker in pool:
                if worker.batch is None and batches and time.monotonic() < deadline_s:
                    worker.submit(batches.popleft())
            busy = {worker.connection: worker for worker in pool if worker.batch is not None}
            if not busy:
                return report
            for connection in wait(list(busy), timeout=1.0):
                busy[connection].receive(report, batches)  # type: ignore[index]
            for worker in busy.values():
                worker.end_if_stuck(report, batches)
    finally:
        for worker in pool:
            worker.stop()


def _batches(num_inputs: int, targets: Sequence[type[Target]]) -> Iterable[tuple[str, int, int]]:
    """Yields (target, first input, end), the targets in turn."""
    total = sum(target.share for target in targets)
    parts = []
    for target in targets:
        count = ceil(num_inputs * target.share / total)
        num_parts = ceil(count / BATCH)
        for number in range(num_parts):
            place = (number + 0.5) / num_parts
            parts.append((place, target.name, number * BATCH, min(count, (number + 1) * BATCH)))
    return [part[1:] for part in sorted(parts)]


class _Worker:
    """A process that checks inputs one after another, replaced when it dies or is stuck."""

    def __init__(self, seed: int, seeds: Path, failures: Path) -> None:
        self._seed, self._seeds, self._failures = seed, seeds, failures
        self.batch: tuple[str, int, int] | None = None
        self._start()

    def submit(self, batch: tuple[str, int, int]) -> None:
        self.batch, self._next = batch, batch[1]
        self._since_s = time.monotonic()
        self.connection.send(batch)

    def receive(self, report: FuzzReport, batches: deque[tuple[str, int, int]]) -> None:
        assert self.batch is not None
        target, _, end = self.batch
        try:
            name, outcome, what, milliseconds = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._fail(report, batches, f"its process ended with {how}", is_crash=True)
            return
        report.outcomes[target][outcome] += 1
        report.milliseconds[target] += milliseconds
        if what:
            path = self._failures / file_name(target, name, self._seed, self._next)
            finding = Finding(target=target, seed=name, index=self._next, what=what, path=path)
            report.findings.append(finding)
        self._next, self._since_s = self._next + 1, time.monotonic()
        if self._next == end:
            self.batch = None

    def end_if_stuck(self, report: FuzzReport, batches: deque[tuple[str, int, int]]) -> None:
        """Kills the process if its input takes too long."""
        if self.batch is not None and time.monotonic() - self._since_s > INPUT_LIMIT_S:
            self._fail(report, batches, f"no result within {INPUT_LIMIT_S:.0f} s", is_crash=False)

    def _fail(
        self,
        report: FuzzReport,
        batches: deque[tuple[str, int, int]],
        what: str,
        *,
        is_crash: bool,
    ) -> None:
        assert self.batch is not None
        target, _, end = self.batch
        (path,) = self._failures.glob(f"{target}--*--{self._seed}-{self._next}.bin")
        name = path.name.split("--")[1]
        finding = Finding(target=target, seed=name, index=self._next, what=what, path=path)
        report.outcomes[target]["crashed" if is_crash else "stuck"] += 1
        (report.crashes if is_crash else report.findings).append(finding)
        if self._next + 1 < end:
            batches.appendleft((target, self._next + 1, end))
        self.batch = None
        self.stop()
        self._start()

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_worker_main,
            args=(theirs, self._seed, self._seeds, self._failures),
            daemon=True,
        )
        self._process.start()
        theirs.close()


def _worker_main(connection: Connection, seed: int, seeds: Path, failures: Path) -> None:
    """Checks the inputs of batches from the pipe until the parent closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    kinds = {kind.name: kind for kind in TARGETS}
    targets: dict[str, Target] = {}
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=failures.parent))
    try:
        while True:
            name, start, end = connection.recv()
            if name not in targets:
                (scratch / name).mkdir()
                targets[name] = kinds[name](seeds / name, scratch / name)
            for index in range(start, end):
                connection.send(_checked(targets[name], seed, index, failures))
    except (EOFError, OSError):
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(target: Target, seed: int, index: int, failures: Path) -> tuple[str, str, str, float]:
    """Returns the name of the whole file, the outcome, what is wrong, and the milliseconds."""
    start_s = time.perf_counter()
    name, content = damaged_input(target, seed, index)
    path = failures / file_name(target.name, name, seed, index)
    path.write_bytes(content)  # before the check, which may end the process
    what = ""
    try:
        outcome = target.check(name, content)
    except Exception as error:
        outcome, what = f"FINDING {type(error).__name__}", traceback.format_exc(limit=-4)
    else:
        path.unlink()
    return name, outcome, what, 1000 * (time.perf_counter() - start_s)
