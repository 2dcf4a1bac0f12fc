"""Command lines of `tvr index` and `tvr search`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.evaluation.cli import ProgressLines, task_of_rank
from tvr.trainer.exit_reporting import run_training_command

if TYPE_CHECKING:
    from tvr.trainer.index.index import Hit, Index

Features: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURES")]
Query: TypeAlias = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]


def index(argv: Sequence[str]) -> int:
    """`tvr index`."""

    def arguments(
        features: Features,
        *,
        method: Literal["auto", "exact", "ivf", "hnsw"] = "auto",
        model: Path | None = None,
        checkpoint: str = "newest",
        task: str | None = None,
    ) -> int:
        """Makes the videos of a feature set searchable: writes an index into its folder.

        The same command again continues where it was stopped, or adds the videos of data sets that
        `tvr embed` has added since.

        Args:
            features: Folder that `tvr embed` wrote.
            method: exact compares all vectors, ivf those of the nearest lists, hnsw follows a
                graph. auto keeps the method of an index that is there; a new one is exact below
                100,000 videos, and ivf from there.
            model: Folder of the model that encoded the features: a run, an export, a CLIP or a
                SigLIP. It is noted in the index, for `tvr search` and `tvr serve`.
            checkpoint: Of a run: newest, best, or the number of a step.
            task: K/N: builds every N-th segment, as task K of N, from 0. None: all of them, or the
                share of this rank under `tvr launch`.
        """
        return _index(features, method, model, checkpoint, task_of_rank(task))

    return run_training_command(
        "index", lambda: tyro.cli(arguments, prog="tvr index", args=list(argv))
    )


def _index(
    folder: Path,
    method: Literal["auto", "exact", "ivf", "hnsw"],
    model: Path | None,
    checkpoint: str,
    task: tuple[int, int],
) -> int:
    import torch

    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.features.feature_set import FeatureSet
    from tvr.trainer.index.build import chosen_method
    from tvr.trainer.index.encoder import NamedModel, load_model
    from tvr.trainer.index.index import Index, ModelPlace, build_index
    from tvr.trainer.index.layout import FOLDER

    features = FeatureSet.open(folder)
    choice, place = parse_choice(checkpoint), None
    if model is not None:
        found = load_model(NamedModel(model, choice), features, torch.device("cpu"))
        place = ModelPlace(path=str(model.absolute()), step=found.step)
    elif choice != "newest":
        raise ValueError(f"--checkpoint {checkpoint} needs --model, the run that it belongs to")
    lines = ProgressLines()

    def report(done: int, total: int) -> None:
        if done == total or lines.is_due():
            lines.write(f"indexed {done:,} of {total:,} videos", done)

    if not build_index(features, method=method, model=place, task=task, report=report):
        print(f"{folder}: other tasks have not built all their segments yet")
        return EXIT_DONE
    with Index.open(folder) as opened:
        print(f"{folder}: {len(opened):,} videos, {opened.method}")
        usual = chosen_method(len(opened))
        if method == "auto" and opened.method == "exact" != usual:
            text = f"{usual} would be faster now: remove {folder / FOLDER} to build it anew"
            print(text, file=sys.stderr)
    return EXIT_DONE


def search(argv: Sequence[str]) -> int:
    """`tvr search`."""

    def arguments(
        index: Features,
        query: Query = None,
        *,
        video: Path | None = None,
        key: str | None = None,
        data: str | None = None,
        k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10,
        rerank: int = 200,
        model: Path | None = None,
        checkpoint: str = "newest",
        json: bool = False,
        verify: bool = False,
    ) -> int:
        """Searches the videos of an index by text, by a video file, or by a video of the index.

        Give one of QUERY, --video and --key.

        Args:
            index: Folder of the feature set that `tvr index` made searchable.
            query: Caption, such as "a red car turns left".
            video: Video file; finds videos like it.
            key: Key of a video of the index; finds others like it.
            data: Data set of --key, if several have this key.
            k: Number of videos to print, at most --rerank.
            rerank: Candidates that the similarity compares token by token.
            model: Model that encoded the features, if `tvr index --model` did not name it.
            checkpoint: Of a run with --model: newest, best, or the number of a step.
            json: Print JSON.
            verify: Read all files of the index first, and compare their hashes.
        """
        from tvr.trainer.checkpoint.choice import parse_choice
        from tvr.trainer.index.index import Index

        given = [each for each in (query, video, key) if each is not None]
        if len(given) != 1:
            raise ValueError("give one of QUERY, --video and --key")
        if data is not None and key is None:
            raise ValueError(f"--data {data} needs --key")
        choice = parse_choice(checkpoint)
        if model is None and choice != "newest":
            raise ValueError(f"--checkpoint {checkpoint} needs --model")
        with Index.open(index, model=model, checkpoint=choice, verify=verify) as opened:
            if opened.unindexed:
                text = f"{opened.unindexed:,} videos of {index} are not indexed: run `tvr index`"
                print(text, file=sys.stderr)
            if query is not None:
                hits = opened.search(query, k=k, rerank=rerank)
            elif video is not None:
                hits = opened.search_file(video, k=k, rerank=rerank)
            else:
                hits = _by_key(opened, key or "", data, k, rerank)
            print(_json(opened, hits) if json else _table(opened, hits))
        return EXIT_DONE

    return run_training_command(
        "search", lambda: tyro.cli(arguments, prog="tvr search", args=list(argv))
    )


def _by_key(opened: Index, key: str, data: str | None, k: int, rerank: int) -> list[Hit]:
    try:
        return opened.search_key(key, data=data, k=k, rerank=rerank)
    except KeyError as error:
        raise ValueError(error.args[0]) from error


def _table(opened: Index, hits: Sequence[Hit]) -> str:
    rows = [("rank", "similarity", "key", "video", "cut")]
    for hit in hits:
        cut = "" if _whole(hit) else f"{hit.start_s:.2f} s to {_end(hit)}"
        rows.append((str(hit.rank), f"{hit.similarity:.4f}", hit.key, _video(opened, hit), cut))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        number, similarity, *texts, cut = row
        cells = [number.rjust(widths[0]), similarity.rjust(widths[1])]
        cells += [text.ljust(width) for text, width in zip(texts, widths[2:], strict=True)]
        lines.append("  ".join([*cells, cut]).rstrip())
    return "\n".join(lines)


def _json(opened: Index, hits: Sequence[Hit]) -> str:
    found = []
    for hit in hits:
        content = asdict(hit) | {"file": opened.features.source(hit.video)[1].file or None}
        content["end_s"] = None if hit.end_s != hit.end_s else hit.end_s
        found.append(content)
    return json.dumps(found, indent=1)


def _video(opened: Index, hit: Hit) -> str:
    """The file of a video, or its row in a data set; control characters are not printed."""
    source = opened.features.source(hit.video)[1]
    text = os.path.join(hit.data, source.file) if source.file else f"{hit.data}, row {source.row}"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _whole(hit: Hit) -> bool:
    return hit.start_s == 0 and hit.end_s != hit.end_s


def _end(hit: Hit) -> str:
    return "the end" if hit.end_s != hit.end_s else f"{hit.end_s:.2f} s"
