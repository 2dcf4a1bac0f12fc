"""A model as a search model of MTEB (`mteb.models.models_protocols.SearchProtocol`, mteb 2.26).

MTEB compares most models by one vector a document. This project's similarity compares every word
with every frame, so the model searches by itself: `index` encodes the corpus, `search` scores all
of it with each query. MTEB's own code loads the task, and computes its metrics from the scores.

It serves tasks of MTEB's type Any2AnyRetrieval between texts and videos, in both directions, and
reranking of given documents. Sound is not used: a task whose queries or documents also hold audio
or pictures is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.video.frame_sampling import segment_frames
from tvr.kernels.ranking import check_finite
from tvr.trainer.evaluation.model_source import SourceModel, load_source
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

if TYPE_CHECKING:
    from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]: an extra

QUERIES_PER_BLOCK = 256
DOCUMENTS_PER_TILE = 1 << 14
_KINDS = {"text", "video"}
_OTHER_KINDS = ("image", "audio")


class Rows(Protocol):
    """What is used of a `datasets.Dataset`."""

    column_names: list[str]

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class MtebSearch:
    """A search model for `mteb.evaluate`.

    A document's score is the similarity, unscaled. MTEB breaks ties by the ids of documents.
    """

    def __init__(
        self, source: SourceModel | Path | str, *, name: str | None = None, batch: int = 32
    ) -> None:
        """Takes a model, or loads one.

        Args:
            source: A model, or what `load_source` takes: a run, an export, or a CLIP or SigLIP.
            name: Name in MTEB's results, as organisation/model; None: tvr/ and the model's name.
            batch: Texts or videos that are encoded at a time.

        Raises:
            ValueError: as `load_source`.
        """
        self.source = source if isinstance(source, SourceModel) else load_source(source)
        self._name = name or "tvr/" + re.sub(r"[^\w.-]+", "-", self.source.name).strip("-")
        self._batch = batch
        self._ids: list[str] = []
        self._kind = ""
        self._corpus: Features | None = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name, revision (from the fingerprint) and settings of the model.

        Raises:
            ValueError: mteb is not installed.
        """
        try:
            from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"MTEB needs a package: pip install 'tvr[mteb]' ({error})") from error
        parameters = sum(value.numel() for value in self.source.model.parameters())
        return ModelMeta(
            loader=None,
            name=self._name,
            revision=self.source.fingerprint[:16],
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=None,
            max_tokens=self.source.max_words,
            embed_dim=None,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=None,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "video"],
            model_type=["late-interaction"],
            experiment_kwargs=self.source.settings,
        )

    def index(self, corpus: Rows, **_: Any) -> None:
        """Encodes the documents.

        Args:
            corpus: Rows with "id", and either "text" (with "title" if it has one) or "video".

        Raises:
            ValueError: the documents are neither texts nor videos alone, or there are none.
        """
        self._ids, self._kind, self._corpus = self._encode(corpus, "documents")

    def search(
        self,
        queries: Rows,
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Finds the best documents of each query.

        Args:
            queries: Rows with "id", and either "text" (with "instruction" if it has one) or
                "video": the kind that the documents are not.
            top_k: Largest number of documents of a query.
            top_ranked: By query, the ids of the documents to rank; None: all.

        Returns:
            By id of the query, the scores of its best documents by their ids.

        Raises:
            ValueError: no corpus was indexed, queries and documents are of one kind, or a score is
                not finite.
        """
        if self._corpus is None:
            raise ValueError("index the corpus before searching it")
        ids, kind, features = self._encode(queries, "queries")
        if kind == self._kind:
            raise ValueError(
                f"queries and documents are both {kind}s; the model compares texts with videos"
            )
        place = {key: column for column, key in enumerate(self._ids)}
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(ids), QUERIES_PER_BLOCK):
            block = ids[start : start + QUERIES_PER_BLOCK]
            rows = slice(start, start + len(block))
            allowed = None
            if top_ranked is not None:
                allowed = [[place[key] for key in top_ranked[one]] for one in block]
            scores, columns = self._best(block, _part(features, rows, kind), kind, top_k, allowed)
            for one, values, which in zip(block, scores.tolist(), columns.tolist(), strict=True):
                pairs = zip(which, values, strict=True)
                found[one] = {self._ids[c]: value for c, value in pairs if value > -np.inf}
        return found

    def _best(
        self,
        ids: Sequence[str],
        queries: Features,
        kind: str,
        top_k: int,
        allowed: list[list[int]] | None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and columns of the best documents of some queries, best first."""
        assert self._corpus is not None
        tiles, columns, rows = [], [], _count(queries, kind)
        for start in range(0, len(self._ids), DOCUMENTS_PER_TILE):
            end = min(start + DOCUMENTS_PER_TILE, len(self._ids))
            documents = _part(self._corpus, slice(start, end), self._kind)
            model = self.source.config.model
            with torch.no_grad():
                if kind == "text":
                    scores = similarity_rows(queries, documents, model)
                else:
                    scores = similarity_rows(documents, queries, model).T
            names = partial(_names, ids, self._ids[start:end])
            check_finite(scores, names)  # topk would put NaN first
            if allowed is not None:
                mask = torch.zeros(rows, end - start, dtype=torch.bool, device=scores.device)
                for row, of_query in enumerate(allowed):
                    inside = [column - start for column in of_query if start <= column < end]
                    mask[row, inside] = True
                scores = scores.masked_fill(~mask, -torch.inf)
            best = scores.topk(min(top_k, end - start), dim=1)
            tiles.append(best.values)
            columns.append(best.indices + start)
        values, which = torch.cat(tiles, dim=1), torch.cat(columns, dim=1)
        best = values.topk(min(top_k, values.shape[1]), dim=1)
        return best.values.cpu(), which.gather(1, best.indices).cpu()

    def _encode(self, rows: Rows, what: str) -> tuple[list[str], str, Features]:
        kind = _kind(rows.column_names, what)
        ids: list[str] = []
        parts: list[Features] = []
        unread = iter(rows)
        while batch := list(islice(unread, self._batch)):
            ids += [str(row["id"]) for row in batch]
            if kind == "text":
                parts.append(self.source.encode_texts([_text(row) for row in batch]))
            else:
                frames = (self._frames(row) for row in batch)
                parts.append(self.source.encode_frames(frames, batch=self._batch))
        if not ids:
            raise ValueError(f"there are no {what}")
        if len(set(ids)) < len(ids):
            raise ValueError(f"two {what} have the same id")
        return ids, kind, concat_features(parts)

    def _frames(self, row: Mapping[str, Any]) -> np.ndarray:
        """The frames that the model takes, (F, H, W, 3), as in an evaluation of this project."""
        video = row["video"]
        wanted = self.source.num_frames
        if isinstance(video, torch.Tensor):  # (T, 3, H, W), decoded already
            frames = video[segment_frames(len(video), wanted)]
        elif hasattr(video, "get_frames_at"):
            frames = _decoded(video, wanted, self.source.config.data.frame_spacing)
        else:
            raise ValueError(
                f"the video of {row['id']!r} is {type(video).__name__}; it must be a VideoDecoder"
                " of torchcodec, or frames (T, 3, H, W) as a tensor"
            )
        return frames.permute(0, 2, 3, 1).cpu().numpy()


def _decoded(video: Any, wanted: int, spacing: str) -> Tensor:
    """Frames of a VideoDecoder: that of the middle of each segment of time, or of the numbers."""
    total = len(video)
    if spacing == "index" or total <= wanted:
        return video.get_frames_at(segment_frames(total, wanted)).data
    first, end = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
    # A frame begins at its time stamp: rounding must not choose the one before.
    moments = first + (np.arange(wanted) + 0.5) * (end - first) / wanted + 1e-6
    return video.get_frames_played_at(moments.tolist()).data


def _kind(columns: Iterable[str], what: str) -> str:
    names = set(columns)
    found = names & _KINDS
    if len(found) != 1 or names & set(_OTHER_KINDS):
        raise ValueError(
            f"the {what} have the columns {sorted(names)}; they must have text or video, not"
            " both, and no audio or image"
        )
    return found.pop()


def _text(row: Mapping[str, Any]) -> str:
    """A document is its title and its text, a query its text and its instruction, as in MTEB."""
    parts = (row.get("title"), row["text"], row.get("instruction"))
    return " ".join(part.strip() for part in parts if part and part.strip())


def _names(queries: Sequence[str], documents: Sequence[str], row: int, column: int) -> str:
    return f"query {queries[row]} with document {documents[column]}"


def _count(features: Features, kind: str) -> int:
    return len(features.words if kind == "text" else features.frames)


def _part(features: Features, rows: slice, kind: str) -> Features:
    """Some texts, or some videos."""
    if kind == "text":
        logits = features.word_logits
        return features._replace(
            sentence=features.sentence[rows],
            words=features.words[rows],
            word_mask=features.word_mask[rows],
            word_logits=None if logits is None else logits[rows],
        )
    logits = features.frame_logits
    return features._replace(
        frames=features.frames[rows],
        frame_mask=features.frame_mask[rows],
        frame_logits=None if logits is None else logits[rows],
    )
