"""The command line of `tvr simulate`.

Exit codes: 0 done; 2 bad usage or no data set to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tyro

from tvr.data_prep.cli_errors import run_command
from tvr.data_prep.simulation.arguments import SimulateArguments
from tvr.launchers.atomic_write import write_atomically


def simulate(argv: Sequence[str]) -> int:
    """Runs `tvr simulate`; returns the exit code."""
    return run_command(
        "tvr simulate",
        lambda: _simulate(tyro.cli(SimulateArguments, prog="tvr simulate", args=argv)),
    )


def _simulate(arguments: SimulateArguments) -> int:
    # Imported here: `tvr simulate --help` needs none of it.
    from tvr.data_prep.simulation.inputs import data_of, network_of, run_of
    from tvr.data_prep.simulation.simulate import simulate as predict
    from tvr.data_prep.simulation.table import prediction_table

    run, network = run_of(arguments), network_of(arguments)
    data, index = data_of(arguments)
    prediction = predict(data, run, network, index, windows=arguments.windows)
    text = json.dumps({"inputs": asdict(arguments), **asdict(prediction)}, indent=1)
    if arguments.json == "-":
        print(text)
        return 0
    if arguments.json is not None:
        write_atomically(Path(arguments.json), text + "\n")
    print(prediction_table(data, run, prediction))
    return 0
