"""The adapter for MTEB gives the evaluation's scores, to its protocol and to mteb itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.clip_files import numbered_video, read_number
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, make_tiny_data
from torchcodec.decoders import VideoDecoder

from tvr.kernels.ranking import ranks
from tvr.trainer.benchmarks.mteb_search import MtebSearch
from tvr.trainer.evaluation.model_source import SourceModel, load_source
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.tokenizer import load_tokenizer

VIDEOS = 6
TEXTS = [f"a {colour} number turns left" for colour in ("red", "blue", "green", "small", "big", "")]


class Rows(list):
    """Rows of a data set, as `datasets.Dataset` yields them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0]) if self else ["id", "text"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder, num_train=10)
    words = load_tokenizer(folder / "tokenizer", MAX_WORDS)
    save_clip(folder / "clip", words, width=16, image_size=IMAGE_SIZE)
    return load_source(folder / "clip", num_frames=NUM_FRAMES, interaction="att_ti")


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [numbered_video(12 + number, first=40 * number) for number in range(VIDEOS)]


def corpus_of(files: list[bytes]) -> Rows:
    return Rows({"id": f"d{n}", "video": VideoDecoder(one)} for n, one in enumerate(files))


def text_rows() -> Rows:
    return Rows({"id": f"q{n}", "text": text} for n, text in enumerate(TEXTS))


def expected(source: SourceModel, files: list[bytes]) -> torch.Tensor:
    """(texts, videos) similarities of the same frames."""
    frames = []
    for one in files:
        decoder = VideoDecoder(one)
        total = len(decoder)
        picked = [int((place + 0.5) * total / NUM_FRAMES) for place in range(NUM_FRAMES)]
        frames.append(decoder.get_frames_at(picked).data.permute(0, 2, 3, 1).numpy())
    texts, videos = source.encode_texts(TEXTS), source.encode_frames(frames)
    with torch.no_grad():
        return similarity_rows(texts, videos, source.config.model)


def test_scores_are_the_similarities(source: SourceModel, files: list[bytes]) -> None:
    table = expected(source, files)
    model = MtebSearch(source, batch=4)
    protocol: dict[str, Any] = dict.fromkeys(("task_metadata", "hf_split", "hf_subset", "num_proc"))
    protocol["encode_kwargs"] = {"batch_size": 2}
    model.index(corpus_of(files), **protocol)
    found = model.search(text_rows(), top_k=4, top_ranked=None, **protocol)
    assert list(found) == [f"q{n}" for n in range(len(TEXTS))]
    for row, of_query in enumerate(found.values()):
        best = table[row].topk(4)
        assert list(of_query) == [f"d{column}" for column in best.indices.tolist()]
        assert list(of_query.values()) == pytest.approx(best.values.tolist(), abs=1e-6)
    # From video to text, as queries of the same protocol.
    model.index(text_rows())
    back = model.search(corpus_of(files), top_k=100)
    for column, (key, of_query) in enumerate(back.items()):
        assert key == f"d{column}"
        assert [of_query[f"q{row}"] for row in range(len(TEXTS))] == pytest.approx(
            table[:, column].tolist(), abs=1e-6
        )


def test_tiles_and_blocks_change_nothing(
    source: SourceModel, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, dict[str, float]]:
        model = MtebSearch(source)
        model.index(corpus_of(files))
        return model.search(text_rows(), top_k=3)

    whole = found()
    monkeypatch.setattr("tvr.trainer.benchmarks.mteb_search.DOCUMENTS_PER_TILE", 2)
    monkeypatch.setattr("tvr.trainer.benchmarks.mteb_search.QUERIES_PER_BLOCK", 4)
    for key, of_query in found().items():
        assert list(of_query) == list(whole[key])
        assert list(of_query.values()) == pytest.approx(list(whole[key].values()), abs=1e-6)


def test_a_score_that_is_not_finite_is_refused(source: SourceModel, files: list[bytes]) -> None:
    model = MtebSearch(source)
    model.index(corpus_of(files))
    assert model._corpus is not None
    model._corpus.frames[2] = torch.nan
    with pytest.raises(ValueError, match="of query q0 with document d2 is nan"):
        model.search(text_rows(), top_k=4)


def test_given_documents_alone_are_ranked(source: SourceModel, files: list[bytes]) -> None:
    table = expected(source, files)
    model = MtebSearch(source)
    model.index(corpus_of(files))
    given = {f"q{row}": [f"d{row}", f"d{(row + 2) % VIDEOS}"] for row in range(len(TEXTS))}
    found = model.search(text_rows(), top_k=10, top_ranked=given)
    for row, (key, of_query) in enumerate(found.items()):
        assert set(of_query) == set(given[key])
        assert of_query[f"d{row}"] == pytest.approx(float(table[row, row]), abs=1e-6)


def test_frames_are_those_of_our_own_reading(source: SourceModel, files: list[bytes]) -> None:
    model = MtebSearch(source)
    frames = model._frames({"id": "d2", "video": VideoDecoder(files[2])})
    total = 14
    wanted = [80 + int((place + 0.5) * total / NUM_FRAMES) for place in range(NUM_FRAMES)]
    assert [read_number(frame) for frame in frames] == wanted
    short = model._frames({"id": "x", "video": VideoDecoder(numbered_video(NUM_FRAMES - 1))})
    assert [read_number(frame) for frame in short] == list(range(NUM_FRAMES - 1))
    decoded = VideoDecoder(files[2])[:]
    assert np.array_equal(
        model._frames({"id": "d2", "video": decoded})[0], decoded[wanted[0] - 80].permute(1, 2, 0)
    )


def test_texts_are_joined_as_in_mteb(source: SourceModel, files: list[bytes]) -> None:
    model = MtebSearch(source)
    model.index(corpus_of(files))
    plain = model.search(Rows([{"id": "q", "text": "a red car turns left"}]), top_k=2)
    parts = {"id": "q", "title": "a red", "text": "car", "instruction": " turns left "}
    assert model.search(Rows([parts]), top_k=2)["q"] == pytest.approx(plain["q"], abs=1e-6)


def test_other_tasks_are_refused(source: SourceModel, files: list[bytes]) -> None:
    model = MtebSearch(source)
    with pytest.raises(ValueError, match="index the corpus before"):
        model.search(text_rows(), top_k=1)
    with pytest.raises(ValueError, match="there are no documents"):
        model.index(Rows())
    both = Rows([{"id": "d", "text": "a", "video": VideoDecoder(files[0])}])
    with pytest.raises(ValueError, match="must have text or video"):
        model.index(both)
    sound = Rows([{"id": "d", "video": VideoDecoder(files[0]), "audio": None}])
    with pytest.raises(ValueError, match="audio"):
        model.index(sound)
    with pytest.raises(ValueError, match="must be a VideoDecoder"):
        model.index(Rows([{"id": "d", "video": "clip.mp4"}]))
    with pytest.raises(ValueError, match="same id"):
        model.index(Rows([*text_rows(), *text_rows()]))
    model.index(text_rows())
    with pytest.raises(ValueError, match="both texts"):
        model.search(text_rows(), top_k=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
def test_mteb_evaluates_it(source: SourceModel, files: list[bytes], tmp_path: Path) -> None:
    """A task of mteb's own kind, with its videos, its qrels and its metrics."""
    mteb = pytest.importorskip("mteb", reason="needs pip install 'tvr[mteb]'")
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import SearchProtocol

    class Numbers(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="NumbersT2V",
            description="Numbered videos.",
            dataset={"path": "local/numbers", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2v",
            modalities=["text", "video"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **_: Any) -> None:
            ids = [str(number) for number in range(VIDEOS)]
            corpus = Dataset.from_dict({"id": ids, "video": [{"bytes": one} for one in files]})
            self.dataset = {
                "default": {
                    "test": {
                        "queries": Dataset.from_dict({"id": ids, "text": TEXTS}),
                        "corpus": corpus.cast_column("video", Video()),
                        "relevant_docs": {one: {one: 1} for one in ids},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    model = MtebSearch(source, name="tvr/tiny")
    assert isinstance(model, SearchProtocol)
    result = mteb.evaluate(model, Numbers(), cache=None, co2_tracker=False)
    scores = result.task_results[0].scores["test"][0]
    rank = ranks(expected(source, files), torch.arange(VIDEOS)).text_to_video.numpy()
    assert scores["ndcg_at_10"] == pytest.approx(np.mean(1 / np.log2(1 + rank)), abs=1e-5)
    assert scores["hit_rate_at_1"] == pytest.approx(np.mean(rank == 1), abs=1e-5)
    assert scores["recall_at_5"] == pytest.approx(np.mean(rank <= 5), abs=1e-5)
    meta = model.mteb_model_meta
    assert (meta.name, meta.modalities) == ("tvr/tiny", ["text", "video"])
    assert meta.revision == source.fingerprint[:16]
