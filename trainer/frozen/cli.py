"""Command line of `tvr import-features`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.exit_reporting import run_training_command


def import_features(argv: Sequence[str]) -> int:
    """`tvr import-features`."""

    def arguments(
        *,
        data: str,
        files: Path,
        out: Path,
        name: str,
        num_frames: int = 12,
        max_words: int = 32,
        text_tower: str | None = None,
        stored: Literal["fp32", "fp16"] = "fp32",
        max_bad: int = 100,
    ) -> int:
        """Takes in features of clips that were computed elsewhere, for training without towers.

        A run reads them with --model.pretrained OUT and --data.features OUT, and trains projections
        of both sides to --model.towers.embed-width. Call it once for each data set of the run.

        Args:
            data: Packed data set, a folder or URL: keys, captions and their order are its own.
            files: Folder with a file for each clip, named by its key: KEY.npy with frames (F, D),
                or KEY.safetensors with frames, and perhaps words (A, T, W), word_mask, sentence.
            out: Folder of the features. It may hold those of other data sets by the same encoders.
            name: Name of the encoders, such as efficientnet-lite0. Another name in OUT is refused.
            num_frames: Most frames of a clip; of more, the middle ones of equal segments are taken.
            max_words: Word slots of a caption; longer ones are cut.
            text_tower: Folder of a text encoder in Hugging Face format, which encodes the captions
                here. None: words are in the files.
            stored: Type in which vectors are stored.
            max_bad: Largest number of clips with a missing or bad file, which are left out.
        """
        from tvr.trainer.frozen.import_files import import_features as take_in
        from tvr.trainer.frozen.progress import encoding_report

        left_out = take_in(
            data,
            files,
            out,
            name=name,
            num_frames=num_frames,
            max_words=max_words,
            text_tower=text_tower,
            stored=stored,
            max_bad=max_bad,
            report=encoding_report(prints=True),
        )
        if left_out:
            print(f"{left_out} clips have no good file and are left out", file=sys.stderr)
        print(out)
        return EXIT_DONE

    return run_training_command(
        "import-features", lambda: tyro.cli(arguments, prog="tvr import-features", args=list(argv))
    )
