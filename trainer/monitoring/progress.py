"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

PLAIN_LINE_EVERY_S = 15.0


class Progress:
    """Shows step, losses and samples per second; does nothing on ranks that are not `enabled`."""

    def __init__(self, steps: int, done: int, *, enabled: bool) -> None:
        self._steps = steps
        self._console = Console(stderr=True, quiet=not enabled)
        self._live = enabled and self._console.is_terminal
        self._said_at = 0.0
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

    def step(self, done: int, record: Mapping[str, Any]) -> None:
        """After each optimiser step."""
        values = f"loss {record['loss']:.3f}  {record['samples_per_s']:.0f} samples/s"
        if record["tpm_cl_loss"]:
            values += f"  tpm-cl {record['tpm_cl_loss']:.3f}"
        self._bar.update(self._task, completed=done, values=values)
        late = time.monotonic() - self._said_at > PLAIN_LINE_EVERY_S
        if not self._live and (late or done == self._steps):
            self._said_at = time.monotonic()
            self._say(f"step {done}/{self._steps}  {values}")

    def text(self, text: str) -> None:
        """A result, above the live line."""
        self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
