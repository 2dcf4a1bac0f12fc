"""Progress of a run on stderr: a live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from tvr.trainer.monitoring.step_record import StepRecord

PLAIN_LINE_EVERY_S = 15.0


class Progress:
    """Shows step, losses and samples per second; silent on ranks that are not `enabled`."""

    def __init__(self, steps: int, done: int, *, enabled: bool) -> None:
        self._steps = steps
        self._console = Console(stderr=True, quiet=not enabled)
        self._live = enabled and self._console.is_terminal
        self._last_line_at = 0.0
        self._bar = Bar(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, values="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, done: int, record: StepRecord) -> None:
        """Shows the values of step `done`."""
        values = f"loss {record.loss:.3f}  {record.samples_per_s:.0f} samples/s"
        if record.tpm_cl_loss:
            values += f"  tpm-cl {record.tpm_cl_loss:.3f}"
        self._bar.update(self._task, completed=done, values=values)
        late = time.monotonic() - self._last_line_at > PLAIN_LINE_EVERY_S
        if not self._live and (late or done == self._steps):
            self._last_line_at = time.monotonic()
            self.text(f"step {done}/{self._steps}  {values}")

    def text(self, text: str) -> None:
        """Prints text above the live line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
