"""Searches the videos of a feature set by text or by example. The door of the package.

Two stages: FAISS finds the candidates whose coarse vectors (`coarse`) are nearest to that of the
query. Then DMAE compares the query's tokens with all frames of these candidates.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from tvr.data_prep.caption_text import clean_captions
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decoders import frame_sampler
from tvr.data_prep.video.images import fit_square
from tvr.trainer.checkpoint.choice import CheckpointChoice
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.index.build import build_index
from tvr.trainer.index.candidates import Candidates
from tvr.trainer.index.coarse import query_vectors
from tvr.trainer.index.encoder import NamedModel, load_model, named_model
from tvr.trainer.index.hit import Hit, hit_of
from tvr.trainer.index.keys import KeyTable
from tvr.trainer.index.layout import (
    FOLDER,
    MANIFEST,
    IndexManifest,
    Method,
    ModelPlace,
    read_record,
)
from tvr.trainer.index.media import Media, StoredVideos
from tvr.trainer.index.rerank import as_texts, similarities, similarity_settings
from tvr.trainer.index.segments import indexed_rows
from tvr.trainer.model.model import Features

__all__ = ["Hit", "Index", "Media", "ModelPlace", "build_index"]

DEFAULT_RERANK = 200
MAX_CHARACTERS = 10_000


class Index:
    """An opened index. All methods may be called from several threads.

    `open` opens it; it is also a context manager.
    """

    def __init__(
        self,
        features: FeatureSet,
        manifest: IndexManifest,
        *,
        model: NamedModel | None,
        device: torch.device,
        verify: bool,
    ) -> None:
        self.features = features
        """The feature set; hits name its rows."""
        self.method: Method = manifest.header.method
        self.rerank = DEFAULT_RERANK
        """Candidates that are re-ranked if a search does not say otherwise."""
        folder = features.folder / FOLDER
        self._rows = indexed_rows(features, manifest, folder / MANIFEST)
        self._settings = similarity_settings(features)
        first_rows = [each.start for each in self._rows]
        self._candidates = Candidates(folder, manifest, first_rows, verify=verify)
        self._videos = StoredVideos(features)
        self._named = named_model(manifest) if model is None else model
        self._device = device
        self._model: SourceModel | None = None
        self._keys = KeyTable(features, self._rows)
        self._lock = threading.Lock()
        self._encoding = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        model: Path | str | None = None,
        checkpoint: CheckpointChoice = "newest",
        device: torch.device | str | None = None,
        verify: bool = False,
    ) -> Index:
        """Opens the index of a feature set.

        Args:
            folder: Folder of the feature set, in which `tvr index` wrote the index.
            model: Folder of the model that encoded the features: a run, an export, or a plain CLIP
                or SigLIP; None = the one that `tvr index --model` named. It is loaded when it is
                first needed.
            checkpoint: Of a run that `model` names.
            device: For the model and for re-ranking; None = a GPU if there is one.
            verify: Also reads all files and compares their hashes.

        Raises:
            FileNotFoundError: there is no feature set, or no index in it.
            ShardCorrupt: a file is damaged, cut short or edited; names it.
            ValueError: the index was built from other features.
            ImportError: FAISS is missing.
        """
        features = FeatureSet.open(folder, verify=verify)
        path = features.folder / FOLDER / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no index: there is no {path}, which `tvr index` writes when all"
                " segments are there"
            )
        manifest = read_record(path, IndexManifest)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            features,
            manifest,
            model=None if model is None else NamedModel(Path(model), checkpoint),
            device=torch.device(device),
            verify=verify,
        )

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model; vectors are freed with the last reference to the index."""
        with self._lock:
            self._model = None

    def __len__(self) -> int:
        """Number of videos that a search can find."""
        return sum(map(len, self._rows))

    @property
    def unindexed(self) -> int:
        """Videos of the feature set that the index lacks: they were added after it was built."""
        return len(self.features) - len(self)

    @property
    def max_words(self) -> int:
        """Tokens after which a query is cut."""
        return int(self.features.info.settings["max_words"])

    @property
    def model(self) -> SourceModel:
        """The model, loaded on first use.

        Raises:
            ValueError: no model is named, or it is not the one that encoded the features.
            CheckpointDamaged, OSError: it cannot be read.
        """
        with self._lock:
            if self._model is None:
                self._model = load_model(self._named, self.features, self._device)
            return self._model

    def search(self, query: str, *, k: int = 10, rerank: int | None = None) -> list[Hit]:
        """Finds the k videos most similar to a caption.

        Args:
            query: Caption; cut after `max_words` tokens.
            k: Number of hits, at most `rerank`; fewer come back if there are fewer videos.
            rerank: Candidates of the first stage that DMAE compares; None = `self.rerank`.

        Returns:
            Hits by falling similarity; equal ones by their row.

        Raises:
            ValueError: the caption is empty or too long, `k` or `rerank` is out of range, or the
                model is not the one that encoded the features.
            ShardCorrupt: the features of a candidate are damaged.
        """
        if len(query) > MAX_CHARACTERS:
            raise ValueError(f"the query has {len(query)} characters; allowed are {MAX_CHARACTERS}")
        query.encode()  # raises ValueError for a half of a UTF-16 pair
        rerank = self._checked(k, rerank)
        if not clean_captions([query]):  # known before the model is loaded
            raise ValueError(f"the query {query!r:.100} has no visible character")
        model = self.model
        with self._encoding:  # the first call sets the tokeniser's length
            found = model.encode_texts([model.caption(query)])
        return self.search_features(found, k=k, rerank=rerank)

    def search_frames(
        self, frames: np.ndarray, *, k: int = 10, rerank: int | None = None
    ) -> list[Hit]:
        """Finds the k videos most similar to a video given by its frames.

        The query's frames stand for the words of a caption, with the frames' weights, and their
        weighted mean of unit length for the sentence. So each frame of the query meets its best
        frame of a video and the other way round, as words and frames do (with `words_to_frames`
        that way alone, and with equal weights).

        Args:
            frames: (F, H, W, 3) uint8, F from 1 to the model's `num_frames`.

        Raises:
            ValueError: frames of another form; else as `search`.
        """
        rerank = self._checked(k, rerank)
        model = self.model
        with self._encoding:
            found = model.encode_frames([frames])
        return self.search_features(as_texts(found, self._settings), k=k, rerank=rerank)

    def search_file(self, path: Path | str, *, k: int = 10, rerank: int | None = None) -> list[Hit]:
        """Finds the k videos most similar to a video file, as `search_frames`.

        Raises:
            ValueError: the file is no readable video; else as `search`.
        """
        rerank = self._checked(k, rerank)
        model = self.model
        try:
            frames, _ = frame_sampler(model.config.data.decoder)(
                str(path),
                model.num_frames,
                key=Path(path).name,
                finish=lambda picture: fit_square(picture[None], model.image_size)[0],
                spacing=model.config.data.frame_spacing,
            )
        except BadSample as error:
            raise ValueError(f"{path} cannot be searched for: {error}") from error
        return self.search_frames(frames, k=k, rerank=rerank)

    def search_key(
        self, key: str, *, data: str | None = None, k: int = 10, rerank: int | None = None
    ) -> list[Hit]:
        """Finds the k videos most similar to one of the index, which is left out itself.

        Similarity is as in `search_frames`. The stored features are the query: no model is loaded.

        Raises:
            KeyError: there is no such video.
            ValueError: several data sets have this key; else as `search`.
        """
        rerank = self._checked(k, rerank)
        row = self.row(key, data)
        query = as_texts(self.features.videos([row]), self._settings)
        return self.search_features(query, k=k, rerank=rerank, without=row)

    def search_features(
        self,
        texts: Features,
        *,
        k: int = 10,
        rerank: int | None = None,
        without: int | None = None,
    ) -> list[Hit]:
        """Finds the k videos most similar to one encoded caption.

        Args:
            texts: Features of one caption, as `SourceModel.encode_texts` gives them.
            without: Row of a video that is left out.

        Raises:
            ValueError, ShardCorrupt: as `search`.
        """
        rerank = self._checked(k, rerank)
        if len(texts.sentence) != 1:
            raise ValueError(f"{len(texts.sentence)} captions; a search takes one")
        vector = query_vectors(texts, self._settings.interaction)[0].cpu().numpy()
        rows = self._candidates.search(vector, rerank + (without is not None))
        rows = np.sort(rows[rows != without][:rerank])
        scores = similarities(texts, self.features, rows, self._settings, self._device)
        best = np.lexsort((rows, -scores))[:k]
        return [
            hit_of(self.features, int(rows[i]), at + 1, float(scores[i]))
            for at, i in enumerate(best)
        ]

    def row(self, key: str, data: str | None = None) -> int:
        """Row of a video.

        Args:
            data: URL of its data set; needed if several have this key.

        Raises:
            KeyError: there is no such video.
            ValueError: several data sets have this key.
        """
        return self._keys.row(key, data)

    def frames(self, video: int) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 of a row, as the model saw them; from the video itself.

        Raises:
            IndexError: there is no such row.
            BadSample, ShardCorrupt, OSError: see `media`.
        """
        return self._videos.frames(video)

    def media(self, video: int) -> Media:
        """What a browser can show of a row.

        Raises:
            IndexError: there is no such row.
            BadSample: the sample cannot be read.
            ShardCorrupt: the data set or the folder is not the one that was embedded.
            OSError: the video is gone.
        """
        return self._videos.media(video)

    def _checked(self, k: int, rerank: int | None) -> int:
        rerank = self.rerank if rerank is None else rerank
        most = max(self.rerank, len(self))
        if not 1 <= rerank <= most:
            raise ValueError(f"rerank={rerank} must be 1 to {most}")
        if not 1 <= k <= rerank:
            raise ValueError(f"k={k} must be 1 to {rerank}, the number of re-ranked candidates")
        return rerank
