"""The command lines of `tvr demo`, `train`, `evaluate`, `report`, `export` and `show-config`.

Exit codes: 0 done; 2 bad usage, settings or input; 3 training failed, or could not begin where it
was started; 75 preempted, with a checkpoint saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro
from rich.console import Console

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.config import Config, from_json, merged, read_overrides, to_json
from tvr.trainer.exit_reporting import report_training_error, run_training_command
from tvr.trainer.recipes.recipes import RECIPES, recipe

# The sections' flags stand at the top: --train.steps, not --settings.train.steps.
Flags: TypeAlias = Annotated[Config, tyro.conf.arg(name="")]
RecipeName: TypeAlias = Annotated[
    str, tyro.conf.arg(help=f"Full configuration to start from: {', '.join(RECIPES)}.")
]


def train(argv: Sequence[str]) -> int:
    """`tvr train`."""

    def action() -> int:
        base = _base(argv)

        def arguments(
            *,
            run_dir: Path,
            recipe: RecipeName = "demo",
            config: Path | None = None,
            resume: Literal["auto", "never"] = "auto",
            dry_run: bool = False,
            ranks: int | None = None,
            samples: int | None = None,
            settings: Flags = base,
        ) -> int:
            """Trains on packed data; started on every rank by `tvr launch` (alone: one rank).

            Settings come from the recipe, then the --config file, then flags; the last one wins.
            A run that stopped goes on from its newest whole checkpoint when the same line is given
            again, also on another number of ranks or at another ZeRO stage.

            Args:
                run_dir: Folder of the run: configuration, log, checkpoints, results.
                config: JSON file with (some) settings, nested as `tvr show-config` prints them.
                resume: auto goes on from the newest checkpoint; never refuses a run that has any.
                dry_run: Only prints what the run would do, and takes one step on random data, in
                    this process alone; run_dir is left as it is.
                ranks: Training processes that --dry-run reckons with; default: 1.
                samples: Size that --dry-run takes for a training set that is not there.
                settings: All settings.
            """
            for name, value in (("ranks", ranks), ("samples", samples)):
                if value is not None and not dry_run:
                    raise ValueError(f"--{name} {value} is for --dry-run, which is not given")
                if value is not None and value < 1:
                    raise ValueError(f"--{name} {value} must be at least 1")
            if dry_run:
                from tvr.trainer.dry_run import dry_run as show

                show(settings, run_dir, ranks=ranks or 1, samples=samples, console=Console())
                return EXIT_DONE
            from tvr.trainer.loop import train as run

            run(settings, run_dir, resume=resume, report=report_training_error)
            return EXIT_DONE

        return tyro.cli(arguments, prog="tvr train", args=list(argv))

    return run_training_command("train", action)


def show_config(argv: Sequence[str]) -> int:
    """`tvr show-config`."""

    def action() -> int:
        base = _base(argv)

        def arguments(
            *,
            recipe: RecipeName = "demo",
            config: Path | None = None,
            memory: bool = False,
            ranks: int | None = None,
            settings: Flags = base,
        ) -> tuple[Config, bool, int | None]:
            """Prints the settings that `tvr train` would use, as JSON, and what they would run on.

            Args:
                config: JSON file with (some) settings, nested as this command prints them.
                memory: Also estimates the memory of the similarity and its loss on one rank.
                ranks: Training processes, for --memory; default: 1.
                settings: All settings.
            """
            return settings, memory, ranks

        resolved, memory, ranks = tyro.cli(arguments, prog="tvr show-config", args=list(argv))
        if ranks is not None and not memory:
            raise ValueError(f"--ranks {ranks} is for --memory, which is not given")
        if ranks is not None and ranks < 1:
            raise ValueError(f"--ranks {ranks} must be at least 1")
        sys.stdout.write(to_json(resolved))
        from tvr.data_prep.video.decoders import describe_decoder
        from tvr.trainer.engine.deepspeed_config import optimizer_line
        from tvr.trainer.engine.staging import staging_line
        from tvr.trainer.memory.environment import device, device_line, similarity_line
        from tvr.trainer.monitoring.flops import peak_line

        print(device_line(), file=sys.stderr)
        print(optimizer_line(resolved.train, device()), file=sys.stderr)
        print(similarity_line(resolved), file=sys.stderr)
        print(describe_decoder(resolved.data.decoder), file=sys.stderr)
        print(peak_line(resolved), file=sys.stderr)
        print(staging_line(resolved.checkpoint), file=sys.stderr)
        if memory:
            from tvr.trainer.memory.memory_table import memory_table

            Console(stderr=True).print(memory_table(resolved, ranks or 1))
        return EXIT_DONE

    return run_training_command("show-config", action)


def evaluate(argv: Sequence[str]) -> int:
    """`tvr evaluate`."""

    def arguments(*, run_dir: Path, data: str | None = None) -> int:
        """Recall of a run's newest checkpoint, text to video and video to text.

        Args:
            run_dir: Folder of an existing run.
            data: Data set to evaluate on instead of the run's; its results are printed, not kept.
        """
        from tvr.trainer.evaluation.saved_run import evaluate_run

        result = evaluate_run(run_dir, data)
        if os.environ.get("RANK", "0") == "0":
            print(result.table())
        return EXIT_DONE

    return run_training_command(
        "evaluate", lambda: tyro.cli(arguments, prog="tvr evaluate", args=list(argv))
    )


def report(argv: Sequence[str]) -> int:
    """`tvr report`."""

    def arguments(*, run_dir: Path) -> int:
        """Writes report.html: results, curves, and test queries with their best videos.

        Args:
            run_dir: Folder of an existing run.
        """
        print(_write_report(run_dir))
        return EXIT_DONE

    return run_training_command(
        "report", lambda: tyro.cli(arguments, prog="tvr report", args=list(argv))
    )


def export(argv: Sequence[str]) -> int:
    """`tvr export`."""

    def arguments(*, run_dir: Path, out: Path) -> int:
        """Writes a run's newest checkpoint as a folder in Hugging Face format, with a model card.

        Args:
            run_dir: Folder of an existing run.
            out: Folder to make: towers, tokeniser and processor as transformers reads them, and
                the heads beside them.
        """
        from tvr.trainer.evaluation.export import export_run

        export_run(run_dir, out)
        print(out)
        return EXIT_DONE

    return run_training_command(
        "export", lambda: tyro.cli(arguments, prog="tvr export", args=list(argv))
    )


def demo(argv: Sequence[str]) -> int:
    """`tvr demo`."""
    base = recipe("demo")

    def arguments(
        *,
        out: Path = Path("runs/demo"),
        train_clips: int = 3000,
        test_clips: int = 256,
        ranks: int = 2,
        settings: Flags = base,
    ) -> int:
        """Renders captioned clips, packs them, trains a small CLIP on them, evaluates, reports.

        What an earlier call completed is used again.

        Args:
            out: Folder for clips, data, the run and its report.
            train_clips: Clips to train on.
            test_clips: Unseen clips to test on.
            ranks: Training processes; train.global-batch is shared out among them.
            settings: All settings of the training.
        """
        return _run_demo(out, train_clips, test_clips, ranks, settings)

    return run_training_command(
        "demo", lambda: tyro.cli(arguments, prog="tvr demo", args=list(argv))
    )


def _run_demo(out: Path, train_clips: int, test_clips: int, ranks: int, settings: Config) -> int:
    from tvr.trainer.demo import DemoPaths, prepare_demo, train_on_ranks
    from tvr.trainer.run_dir import is_finished

    base = recipe("demo")

    started = time.monotonic()

    places = ("train", "test", "test_exchanged")
    given = [f"data.{n}" for n in places if getattr(settings.data, n) != getattr(base.data, n)]
    if settings.model.tokenizer != base.model.tokenizer:
        given.append("model.tokenizer")
    if given:
        raise ValueError(f"{', '.join(given)}: the demo makes its own; use `tvr train` instead")

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    paths = DemoPaths(out)
    configuration = paths.write_settings(settings, ranks)
    prepare_demo(
        paths,
        train_clips=train_clips,
        test_clips=test_clips,
        num_frames=settings.data.num_frames,
        image_size=settings.model.towers.image_size,
        max_words=settings.data.max_words,
        workers=os.cpu_count() or 1,
        say=say,
    )
    run_dir = out / "run"
    if is_finished(run_dir, from_json(configuration.read_text(), where=str(configuration))):
        say("run: complete")
    else:
        say(f"training on {ranks} ranks; the first start ever compiles an extension of DeepSpeed")
        code = train_on_ranks(ranks, ["--config", str(configuration), "--run-dir", str(run_dir)])
        if code != EXIT_DONE:
            return code
    from tvr.trainer.evaluation.saved_run import stored_table

    say("done\n\n" + stored_table(run_dir))
    print(f"\nreport: {_write_report(run_dir)}")
    return EXIT_DONE


def _write_report(run_dir: Path) -> Path:
    from tvr.trainer.evaluation.saved_run import thumbnails_of
    from tvr.trainer.pages.report import write_report

    return write_report(run_dir, thumbnails=thumbnails_of(run_dir))


def _base(argv: Sequence[str]) -> Config:
    """Recipe and --config file, under the flags, which need their values as defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--config", type=Path, default=None)
    named, _ = parser.parse_known_args(list(argv))
    base = recipe(named.recipe)
    if named.config is None:
        return base
    return merged(base, read_overrides(named.config), where=f"--config {named.config}")
