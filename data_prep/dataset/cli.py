"""The command line of `tvr upgrade`.

Exit codes: 0 done; 2 bad usage, or no data set that can be upgraded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic.dataclasses import dataclass

from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.dataset.manifest import FORMAT_VERSION
from tvr.data_prep.dataset.upgrade import upgrade_dataset


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class UpgradeArguments:
    """Converts packed data sets of the previous format to this one. Samples are neither read nor
    changed, and keep their order. Repeat the command if it is interrupted."""

    urls: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders or fsspec URLs of data sets."""


def upgrade(argv: Sequence[str]) -> int:
    """Runs `tvr upgrade`; returns the exit code."""
    return run_command(
        "tvr upgrade", lambda: _upgrade(tyro.cli(UpgradeArguments, prog="tvr upgrade", args=argv))
    )


def _upgrade(arguments: UpgradeArguments) -> int:
    if not arguments.urls:
        raise ValueError("urls: name at least one data set")
    for url in arguments.urls:
        is_new = not upgrade_dataset(url)
        print(f"{url}: {'already' if is_new else 'upgraded to'} format version {FORMAT_VERSION}")
    return 0
