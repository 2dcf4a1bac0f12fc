"""Command lines of `tvr evaluate` and `tvr embed`."""

from __future__ import annotations

import json as json_format
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.evaluation.options import DEFAULTS, EvaluationOptions
from tvr.trainer.exit_reporting import run_training_command

if TYPE_CHECKING:
    from tvr.trainer.records import Evaluation

SECONDS_BETWEEN_LINES = 10.0

Source: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


def evaluate(argv: Sequence[str]) -> int:
    """`tvr evaluate`."""

    def arguments(
        *,
        run_dir: Path | None = None,
        model: Path | None = None,
        features: Path | None = None,
        data: str | None = None,
        checkpoint: str = "newest",
        num_frames: int | None = None,
        save_features: Path | None = None,
        json: Path | None = None,
        trec: Path | None = None,
        mmeb_v2: bool = False,
        protocol: tyro.conf.OmitArgPrefixes[EvaluationOptions] = DEFAULTS,
    ) -> int:
        """Evaluates a model: recall from text to video and from video to text.

        Give one of --run-dir, --model and --features.

        Args:
            run_dir: Folder of an existing run. The results on its own test set are stored there.
            model: Folder of `tvr export`, or of towers as model.pretrained takes them, which are
                the zero-shot baseline: the sentence with the mean of the frames. Needs --data.
            features: Folder that `tvr embed` or --save-features wrote; nothing is encoded.
            data: Test set to use instead of the run's; the results are printed, not stored.
            checkpoint: newest; best: that with the highest R@1, mean of both directions; or the
                number of a step.
            num_frames: Frames per video with --model. None: as it was trained; 12 for a plain
                folder.
            save_features: Also writes the features of --data, in fp32, to this folder, for
                --features. One process only.
            json: Also writes the results, with every query, to this file.
            trec: Also writes the --top-videos best videos of each caption as a run of TREC, and
                the right ones beside it as FILE.qrels.
            mmeb_v2: Also prints the score of MMEB-V2: Hit@1 of the first caption of each video,
                with 8 frames. A run's result is then not stored.
        """
        given = [name for name in (run_dir, model, features) if name is not None]
        if len(given) != 1:
            raise ValueError("give one of --run-dir, --model and --features")
        if model is not None and data is None:
            raise ValueError(f"--model {model} needs --data, the set to evaluate on")
        if features is not None and (data, save_features, checkpoint) != (None, None, "newest"):
            raise ValueError(
                "--features brings its data set: give no --data, --checkpoint or --save-features"
            )
        if num_frames is not None and model is None:
            raise ValueError(f"--num-frames {num_frames} needs --model")
        if save_features is not None and data is None:
            raise ValueError(f"--save-features {save_features} needs --data")
        if protocol.paragraphs and (features is not None or save_features is not None):
            raise ValueError("--paragraphs encodes captions anew: give no features")
        if protocol.qb_norm is not None and save_features is not None:
            raise ValueError("--qb-norm with --save-features: evaluate the features afterwards")
        if mmeb_v2:
            from tvr.trainer.comparison.mmeb import NUM_FRAMES, check_protocol

            check_protocol(protocol.equal_captions, protocol.paragraphs)
            frames = NUM_FRAMES if num_frames is None else num_frames
            if features is not None:
                from tvr.trainer.features.feature_set import FeatureSet

                frames = int(FeatureSet.open(features).info.settings["num_frames"])
            elif run_dir is not None and save_features is None:
                from tvr.trainer.run_dir import read_config

                # As a model of its own: the run's results are those with its own frames.
                data = data or read_config(run_dir).data.test
                if data is None:
                    raise ValueError(f"{run_dir} has no data.test: give --data")
                model, run_dir = run_dir, None
            if frames != NUM_FRAMES:
                raise ValueError(f"--mmeb-v2 takes {NUM_FRAMES} frames of a video, not {frames}")
            num_frames = None if features is not None else frames
        result = _result(
            run_dir, model, features, data, checkpoint, save_features, num_frames, protocol
        )
        if os.environ.get("RANK", "0") == "0":
            print(result.table())
            document = result.document()
            if mmeb_v2:
                from tvr.trainer.comparison.mmeb import mmeb_v2_score

                score = mmeb_v2_score(result)
                print(score)
                document["mmeb_v2"] = asdict(score)
            if trec is not None:
                from tvr.trainer.comparison.trec import write_trec

                depth = protocol.top_videos
                qrels = write_trec(result.queries, trec, depth)
                print(f"the best {depth} videos of each caption: {trec}; the right ones: {qrels}")
            if json is not None:
                write_atomically(json, json_format.dumps(document, indent=1) + "\n")
        return EXIT_DONE

    return run_training_command(
        "evaluate", lambda: tyro.cli(arguments, prog="tvr evaluate", args=list(argv))
    )


def _result(
    run_dir: Path | None,
    model: Path | None,
    features: Path | None,
    data: str | None,
    checkpoint: str,
    save_features: Path | None,
    num_frames: int | None,
    options: EvaluationOptions,
) -> Evaluation:
    from tvr.trainer.checkpoint.choice import parse_choice

    choice = parse_choice(checkpoint)
    if save_features is not None or features is not None:
        from tvr.trainer.distributed.world import join_world
        from tvr.trainer.evaluation.stored_features import evaluate_features
        from tvr.trainer.features.feature_set import MANIFEST, FeatureSet

        step = None
        if save_features is not None:
            from tvr.trainer.evaluation.embed import embed
            from tvr.trainer.evaluation.model_source import load_source

            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise ValueError("--save-features runs in one process; use `tvr embed` on several")
            if (save_features / MANIFEST).exists():
                raise ValueError(f"--save-features {save_features} holds features already")
            source = load_source(run_dir or model or "", choice, num_frames=num_frames)
            embed(source, data or "", save_features, stored="fp32")
            step = source.step
        with join_world() as world:
            found = FeatureSet.open(save_features or features or "", verify=True)
            return replace(evaluate_features(found, options=options, world=world), step=step)
    lines: ProgressLines | None = None

    def report(done: int) -> None:
        nonlocal lines
        # The time before the first batch is that of loading, and no part of the rate.
        lines = lines or ProgressLines(done)
        if os.environ.get("RANK", "0") == "0" and lines.is_due():
            ranks = os.environ.get("WORLD_SIZE", "1")
            lines.write(f"encoded {done:,} videos on rank 0 of {ranks}", done)

    if run_dir is not None:
        from tvr.trainer.evaluation.saved_run import evaluate_run

        return evaluate_run(run_dir, data, choice, options, report)
    from tvr.trainer.evaluation.stored_features import evaluate_source

    return evaluate_source(
        model or "", data or "", choice, num_frames=num_frames, options=options, report=report
    )


class ProgressLines:
    """Lines of progress on stderr, at most one in SECONDS_BETWEEN_LINES."""

    def __init__(self, done: int = 0) -> None:
        self._started = self._last = time.monotonic()
        self._done = done

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS_BETWEEN_LINES

    def write(self, text: str, done: int, more: str = "") -> None:
        self._last = time.monotonic()
        rate = (done - self._done) / max(self._last - self._started, 1e-9)
        print(f"{text}, {rate:.1f} a second{more}", file=sys.stderr, flush=True)


def embed(argv: Sequence[str]) -> int:
    """`tvr embed`."""

    def arguments(
        source: Source,
        *,
        data: str,
        out: Path,
        checkpoint: str = "newest",
        dtype: Literal["fp32", "fp16", "int8"] = "fp16",
        task: str | None = None,
        num_frames: int | None = None,
        max_bad: int = 100,
    ) -> int:
        """Encodes a packed data set, or a folder of videos, into files for search and evaluation.

        The same command again continues where it was stopped. Another data set of the same model
        can be added to the same folder later.

        Args:
            source: Folder of a run, of `tvr export`, or of towers as model.pretrained takes them.
            data: Data set that `tvr pack` or `tvr adopt` wrote, or a folder of video files.
            out: Folder of the features.
            checkpoint: Of a run: newest, best, or the number of a step.
            dtype: Type of the stored vectors. int8 has one scale per vector.
            task: K/N: encodes every N-th block, as task K of N, from 0. None: all of them, or the
                share of this rank under `tvr launch`.
            num_frames: Frames per video. None: as the model was trained; 12 for a plain folder.
            max_bad: Largest number of unreadable videos, which are left out.
        """
        return _embed(source, data, out, checkpoint, dtype, task_of_rank(task), num_frames, max_bad)

    return run_training_command(
        "embed", lambda: tyro.cli(arguments, prog="tvr embed", args=list(argv))
    )


def _embed(
    folder: Path,
    data: str,
    out: Path,
    checkpoint: str,
    dtype: Literal["fp32", "fp16", "int8"],
    task: tuple[int, int],
    num_frames: int | None,
    max_bad: int,
) -> int:
    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.distributed.local_device import select_device, whole_number
    from tvr.trainer.distributed.world import World
    from tvr.trainer.evaluation.embed import embed as encode
    from tvr.trainer.evaluation.model_source import load_source

    # Tasks share nothing but the folder, so there is no process group.
    world = World(rank=0, world_size=1, device=select_device(whole_number("RANK", 0)))
    model = load_source(folder, parse_choice(checkpoint), num_frames=num_frames, world=world)
    lines = ProgressLines()
    who = "" if task[1] == 1 else f"task {task[0]}/{task[1]}: "

    def report(done: int, total: int, bad: int) -> None:
        if done == total or lines.is_due():
            lines.write(f"{who}embedded {done:,} of {total:,} videos", done, f", {bad} left out")

    whole = encode(model, data, out, stored=dtype, task=task, max_bad=max_bad, report=report)
    print(out if whole else f"{who}{out}: other tasks have not written all their parts yet")
    return EXIT_DONE


def task_of_rank(text: str | None) -> tuple[int, int]:
    """Reads `--task K/N`; None: this rank's share under `tvr launch`, or all.

    Raises:
        ValueError: the text is no K/N with K from 0 to N - 1.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--task {text} must be K/N with K from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])
