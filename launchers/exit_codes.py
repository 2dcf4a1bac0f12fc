"""Exit codes of every `tvr` command; launchers decide by them whether a job starts again.

The one table of the project. It needs the standard library only, so every package may import it.
"""

from __future__ import annotations

EXIT_DONE = 0
"""Finished."""
EXIT_USAGE = 2
"""Bad usage, settings or input. Starting again would end the same way."""
EXIT_FAILED = 3
"""The command failed, or could not begin on these nodes. Starting again may help."""
EXIT_PREEMPTED = 75
"""Its time or its nodes were taken, and it saved a checkpoint (EX_TEMPFAIL): start again."""
