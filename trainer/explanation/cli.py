"""The command line of `tvr explain`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.exit_reporting import run_training_command

DEFAULT_PAGE = Path("explanation.html")


def explain(argv: Sequence[str]) -> int:
    """`tvr explain`."""

    def arguments(
        source: tyro.conf.Positional[Path],
        caption: tyro.conf.Positional[str | None] = None,
        *,
        video: Path | None = None,
        data: str | None = None,
        key: str | None = None,
        checkpoint: str = "newest",
        out: Path = DEFAULT_PAGE,
        json: Path | None = None,
    ) -> int:
        """Writes a page that explains why a video has its similarity to a caption.

        The video is a file (--video) or a sample of a packed data set (--data and --key).

        Args:
            source: Folder of a run, of `tvr export`, or of a Hugging Face CLIP or SigLIP.
            caption: The text. None: the first caption of the sample.
            video: Video file.
            data: Data set that `tvr pack` or `tvr adopt` wrote. None: the test set of the run.
            key: Key of the sample in the data set.
            checkpoint: Of a run: newest, best, or the number of a step.
            out: The page to write.
            json: Also writes all numbers to this file.
        """
        content = _explain(source, caption, video, data, key, checkpoint, out)
        if json is not None:
            _write_json(json, content)
        print(out)
        return EXIT_DONE

    return run_training_command(
        "explain", lambda: tyro.cli(arguments, prog="tvr explain", args=list(argv))
    )


def _explain(
    folder: Path,
    caption: str | None,
    video: Path | None,
    data: str | None,
    key: str | None,
    checkpoint: str,
    out: Path,
) -> dict[str, Any]:
    if (video is None) == (key is None):
        raise ValueError("give --video FILE, or --key KEY with --data SET")
    if video is not None and (data is not None or caption is None):
        raise ValueError(f"--video {video} needs a CAPTION, and takes no --data")
    from tvr.data_prep.records import Caption
    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.evaluation.model_source import load_source
    from tvr.trainer.explanation.explanation import explain as explained
    from tvr.trainer.explanation.explanation import explanation_page
    from tvr.trainer.explanation.videos import frames_of_file, sample_of, test_set_of

    source = load_source(folder, parse_choice(checkpoint))
    if video is not None:
        title, text = video.name, Caption(text=caption or "")
        frames, times = frames_of_file(source, video)
    else:
        sample = sample_of(source, test_set_of(source, data), key or "")
        # A caption of the sample itself brings its words, which a model may need.
        own = [each for each in sample.captions if caption in (None, each.text)]
        text = own[0] if own else Caption(text=caption or "")
        title, frames, times = sample.key, sample.frames, sample.frame_times_s
    found = explained(source, text, frames, frame_times=times)
    write_atomically(out, explanation_page(found, frames, title=title))
    for part, value in {"similarity": found.score, **found.parts}.items():
        print(f"{part.replace('_', ' '):<20}{value:8.4f}")
    return found.to_json()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
