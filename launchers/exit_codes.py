"""Exit codes of every `tvr` command. Launchers use them to decide whether a job restarts.

This is the project's only table of exit codes. It needs the standard library only, so every package
may import it.
"""

from __future__ import annotations

EXIT_DONE = 0
"""The command finished."""
EXIT_NOT_REACHED = 1
"""The command finished, and its result does not reach the number that it is compared with. Only
`tvr reproduce` ends so. A restart would end in the same way."""
EXIT_USAGE = 2
"""Bad usage, settings or input. A restart would fail in the same way."""
EXIT_FAILED = 3
"""The command failed, or could not start on these nodes. A restart may succeed."""
EXIT_PREEMPTED = 75
"""The command was preempted and saved a checkpoint (EX_TEMPFAIL). Start it again."""
