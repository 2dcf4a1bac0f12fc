"""The command `tvr`. It imports the module of a sub-command only when that is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USAGE
from tvr.launchers.process import path_with_scripts


class Command(NamedTuple):
    target: str
    """`module:function` of a `def f(argv: list[str]) -> int`."""
    help: str


COMMANDS = {
    "demo": Command(
        "tvr.trainer.cli:demo", "render clips, train a small model on them, write a report"
    ),
    "pack": Command("tvr.data_prep.cli:pack", "pack videos and captions into shards"),
    "adopt": Command(
        "tvr.data_prep.adoption.cli:adopt", "index shards that other tools wrote, where they lie"
    ),
    "verify": Command("tvr.data_prep.check.cli:verify", "check a data set against its manifest"),
    "upgrade": Command(
        "tvr.data_prep.dataset.cli:upgrade", "convert data sets of the previous format to this one"
    ),
    "stats": Command(
        "tvr.data_prep.check.cli:stats", "write a page of statistics about a data set"
    ),
    "simulate": Command(
        "tvr.data_prep.simulation.cli:simulate",
        "predict what training asks of an object store: requests, bytes, waits",
    ),
    "features": Command(
        "tvr.trainer.cli:features", "store the outputs of frozen towers, for training"
    ),
    "import-features": Command(
        "tvr.trainer.frozen.cli:import_features", "take in features that you bring, for training"
    ),
    "train": Command("tvr.trainer.cli:train", "train on packed data"),
    "evaluate": Command(
        "tvr.trainer.evaluation.cli:evaluate",
        "compute the recall of a trained model, both directions",
    ),
    "compare": Command(
        "tvr.trainer.comparison.cli:compare",
        "compare results of several runs: intervals, queries won, paired tests",
    ),
    "reproduce": Command(
        "tvr.trainer.reproduction.cli:reproduce",
        "reproduce a benchmark's published row: pack, train, evaluate, compare",
    ),
    "embed": Command(
        "tvr.trainer.evaluation.cli:embed", "encode a data set or a folder of videos into files"
    ),
    "index": Command("tvr.trainer.index.cli:index", "make the videos of `tvr embed` searchable"),
    "search": Command("tvr.trainer.index.cli:search", "find videos by a caption, or by an example"),
    "serve": Command(
        "tvr.trainer.service.cli:serve", "serve an index over HTTP, with a search page"
    ),
    "explain": Command(
        "tvr.trainer.explanation.cli:explain", "write a page: why a video fits a caption, or not"
    ),
    "report": Command("tvr.trainer.cli:report", "write report.html of a run"),
    "dashboard": Command(
        "tvr.trainer.pages.cli:dashboard", "write a page that follows running and finished runs"
    ),
    "export": Command("tvr.trainer.cli:export", "write a run's model as a Hugging Face folder"),
    "metrics": Command(
        "tvr.trainer.monitoring.cli:metrics", "list the Prometheus metrics of a run"
    ),
    "show-config": Command("tvr.trainer.cli:show_config", "print the resolved configuration"),
    "bench": Command(
        "tvr.trainer.bench_cli:bench", "measure time and memory of kernels, data and steps"
    ),
    "launch": Command(
        "tvr.launchers.launch_cli:launch",
        "start a job here or on a cluster, inspect it, monitor it",
    ),
}

EPILOG = """\
`tvr COMMAND --help` describes a command.
exit codes: 0 done, 2 bad usage or configuration, 3 failed, 75 preempted: start it again"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code: 0, 2 or 3."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if arguments[:1] == ["--version"]:
        print(f"tvr {_version()}")
        return EXIT_DONE
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    # Parse the first word only: argparse would take `--help` away from the sub-command.
    name = parser.parse_args(arguments[:1]).command
    # DeepSpeed runs `ninja`, which is not in PATH if the virtual environment is not activated.
    os.environ["PATH"] = path_with_scripts(os.environ.get("PATH", ""))
    try:
        return _load(COMMANDS[name].target)(arguments[1:])
    except KeyboardInterrupt:
        print(f"tvr {name}: interrupted", file=sys.stderr)
        return EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in COMMANDS)
    lines = "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tvr",
        usage="tvr COMMAND ...",
        description=f"Distributed training for text-video retrieval.\n\ncommands:\n{lines}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _load(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _version() -> str:
    # A slow import, a third of the time of `tvr --help`.
    from importlib.metadata import version

    return version("tvr")


if __name__ == "__main__":
    sys.exit(main())
