"""Command lines of `tvr demo`, `train`, `features`, `report`, `export` and `show-config`.

`tvr.launchers.exit_codes` lists their exit codes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro
from rich.console import Console

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.launchers.host_limits import host_cpus, host_line
from tvr.trainer.config import Config, from_json, merged, read_overrides, to_json
from tvr.trainer.exit_reporting import report_training_error, run_training_command
from tvr.trainer.recipes.recipes import RECIPES, recipe
from tvr.trainer.run_files import CONFIG

# Without a name, the sections' flags are --train.steps instead of --settings.train.steps.
Flags: TypeAlias = Annotated[Config, tyro.conf.arg(name="")]
RecipeName: TypeAlias = Annotated[
    str, tyro.conf.arg(help=f"Configuration to start from: {', '.join(RECIPES)}.")
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
            """Trains on packed data. `tvr launch` starts it on every rank; alone it is one rank.

            A recipe gives the settings; the --config file overrides the recipe, and flags override
            both. To resume a run that stopped, give the same command again: it continues from the
            newest whole checkpoint, also on another number of ranks or at another ZeRO stage.

            Args:
                run_dir: Folder of the run: configuration, log, checkpoints, results.
                config: JSON file with some or all settings, nested as in `tvr show-config`.
                resume: auto: resume from the newest checkpoint. never: refuse a run that has one.
                dry_run: Prints what the run would do, and runs one step on random data in this
                    process. Writes nothing to run_dir.
                ranks: Number of ranks that --dry-run assumes. None: 1.
                samples: Number of training samples that --dry-run assumes if there is no
                    training set yet.
                settings: All settings.
            """
            for name, value in (("ranks", ranks), ("samples", samples)):
                if value is not None and not dry_run:
                    raise ValueError(f"--{name} {value} needs --dry-run")
                if value is not None and value < 1:
                    raise ValueError(f"--{name} {value} must be at least 1")
            if dry_run:
                from tvr.trainer.dry_run.dry_run import dry_run as show

                show(settings, run_dir, ranks=ranks or 1, samples=samples, console=Console())
                return EXIT_DONE
            from tvr.trainer.loop import train as run

            run(settings, run_dir, resume=resume, report=report_training_error)
            return EXIT_DONE

        return tyro.cli(arguments, prog="tvr train", args=list(argv))

    return run_training_command("train", action)


def features(argv: Sequence[str]) -> int:
    """`tvr features`."""

    def action() -> int:
        base = _base(argv)

        def arguments(
            *, recipe: RecipeName = "demo", config: Path | None = None, settings: Flags = base
        ) -> int:
            """Stores the outputs of a run's frozen towers in --data.features, for its data sets.

            Training with the same settings reads them in place of videos and captions. It would
            make them itself; this command makes them beforehand. `tvr launch` starts it on several
            ranks, which share the work. The same command continues where one was stopped.

            Args:
                config: JSON file with some or all settings, nested as in `tvr show-config`.
                settings: All settings, as for `tvr train`.
            """
            from tvr.trainer.store_features import store_features

            print(store_features(settings))
            return EXIT_DONE

        return tyro.cli(arguments, prog="tvr features", args=list(argv))

    return run_training_command("features", action)


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
            """Prints the settings of `tvr train` as JSON, and hardware and code paths on stderr.

            Args:
                config: JSON file with some or all settings, nested as this command prints them.
                memory: Also estimates the memory of the similarity and its loss on one rank.
                ranks: Number of ranks that --memory assumes. None: 1.
                settings: All settings.
            """
            return settings, memory, ranks

        resolved, memory, ranks = tyro.cli(arguments, prog="tvr show-config", args=list(argv))
        if ranks is not None and not memory:
            raise ValueError(f"--ranks {ranks} needs --memory")
        if ranks is not None and ranks < 1:
            raise ValueError(f"--ranks {ranks} must be at least 1")
        sys.stdout.write(to_json(resolved))
        from tvr.data_prep.video.decoders import describe_decoder
        from tvr.trainer.data import mixture_line, order_line
        from tvr.trainer.engine.deepspeed_config import deepspeed_line, optimizer_line
        from tvr.trainer.engine.staging import staging_line
        from tvr.trainer.frozen.tower_outputs import features_line
        from tvr.trainer.memory.environment import device, device_line, similarity_line
        from tvr.trainer.monitoring.address import metrics_line
        from tvr.trainer.monitoring.flops import peak_line

        print(device_line(), file=sys.stderr)
        print(mixture_line(resolved.data, resolved.train), file=sys.stderr)
        print(order_line(resolved.data, resolved.train), file=sys.stderr)
        print(features_line(resolved), file=sys.stderr)
        print(optimizer_line(resolved.train, device()), file=sys.stderr)
        print(deepspeed_line(resolved.train, ranks or 1), file=sys.stderr)
        print(similarity_line(resolved), file=sys.stderr)
        print(describe_decoder(resolved.data.decoder), file=sys.stderr)
        print(peak_line(resolved.metrics, resolved.train), file=sys.stderr)
        print(staging_line(resolved.checkpoint), file=sys.stderr)
        print(metrics_line(resolved.metrics), file=sys.stderr)
        print(host_line(), file=sys.stderr)
        if memory:
            from tvr.trainer.memory.memory_table import memory_table

            Console(stderr=True).print(memory_table(resolved, ranks or 1))
        return EXIT_DONE

    return run_training_command("show-config", action)


def report(argv: Sequence[str]) -> int:
    """`tvr report`."""

    def arguments(*, run_dir: Path, checkpoint: str | None = None) -> int:
        """Writes RUN_DIR/report.html: results, curves, and test captions with their best videos.

        Args:
            run_dir: Folder of an existing run.
            checkpoint: Checkpoint whose results the page shows: newest, best, or the number of a
                step, which must be evaluated. None: the last evaluation.
        """
        print(_write_report(run_dir, checkpoint))
        return EXIT_DONE

    return run_training_command(
        "report", lambda: tyro.cli(arguments, prog="tvr report", args=list(argv))
    )


def export(argv: Sequence[str]) -> int:
    """`tvr export`."""

    def arguments(*, run_dir: Path, out: Path, checkpoint: str = "newest") -> int:
        """Exports a checkpoint of a run as a Hugging Face folder with a model card.

        Args:
            run_dir: Folder of an existing run.
            out: Folder to create. It holds towers, tokeniser and processor for transformers, and
                the heads in heads.safetensors.
            checkpoint: newest; best: that with the highest R@1, mean of both directions; or the
                number of a step.
        """
        from tvr.trainer.checkpoint.choice import parse_choice
        from tvr.trainer.evaluation.export import export_run

        step = export_run(run_dir, out, parse_choice(checkpoint))
        print(f"exported the checkpoint of step {step}", file=sys.stderr)
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
        """Renders captioned clips, packs them, trains a small CLIP, evaluates it, writes a report.

        The command reuses the stages that an earlier call completed.

        Args:
            out: Folder for clips, data, the run and its report.
            train_clips: Number of training clips.
            test_clips: Number of test clips, which no training clip resembles.
            ranks: Training processes, which share train.global-batch.
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

    sets = ("train", "train_sets", "test", "test_exchanged")
    given = [f"data.{n}" for n in sets if getattr(settings.data, n) != getattr(base.data, n)]
    if settings.model.tokenizer != base.model.tokenizer:
        given.append("model.tokenizer")
    if given:
        raise ValueError(
            f"{', '.join(given)}: the demo makes its own data; use `tvr train` instead"
        )

    def log(text: str) -> None:
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
        workers=host_cpus().usable,
        log=log,
    )
    run_dir = out / "run"
    if is_finished(run_dir, from_json(configuration.read_text(), where=str(configuration))):
        log("run: complete")
    else:
        log(f"training on {ranks} ranks; the very first start compiles a DeepSpeed extension")
        code = train_on_ranks(ranks, ["--config", str(configuration), "--run-dir", str(run_dir)])
        if code != EXIT_DONE:
            return code
    from tvr.trainer.evaluation.saved_run import stored_table

    log("done\n\n" + stored_table(run_dir))
    print(f"\nreport: {_write_report(run_dir)}")
    return EXIT_DONE


def _write_report(run_dir: Path, checkpoint: str | None = None) -> Path:
    from tvr.trainer.pages.report import write_report

    config = run_dir / CONFIG
    step = None if checkpoint is None else _step_of(run_dir, checkpoint)
    if not config.exists() or json.loads(config.read_text())["data"]["test"] is None:
        return write_report(run_dir, step=step)
    # Reading the frames of test clips imports torch.
    from tvr.trainer.evaluation.saved_run import thumbnail_reader

    return write_report(run_dir, thumbnails=thumbnail_reader(run_dir), step=step)


def _step_of(run_dir: Path, checkpoint: str) -> int:
    """The step of a run's checkpoint that --checkpoint names."""
    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.evaluation.saved_run import step_of

    return step_of(run_dir, parse_choice(checkpoint))


def _base(argv: Sequence[str]) -> Config:
    """Returns recipe and --config file merged: the defaults of the flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--config", type=Path, default=None)
    named, _ = parser.parse_known_args(list(argv))
    base = recipe(named.recipe)
    if named.config is None:
        return base
    return merged(base, read_overrides(named.config), where=f"--config {named.config}")
