"""Search in two stages: it finds what the whole similarity finds, and reads nothing damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from builders.file_damage import cut, flip
from torch import Tensor

from tvr.data_prep.records import ShardCorrupt
from tvr.kernels.numerics import unit
from tvr.launchers.cli import main
from tvr.trainer.config import ModelConfig
from tvr.trainer.features.feature_set import (
    DataSource,
    FeatureHeader,
    FeatureSet,
    FeatureWriter,
    StoredType,
    VideoSource,
)
from tvr.trainer.features.stored_file import write_array
from tvr.trainer.index.coarse import query_vectors, video_vectors
from tvr.trainer.index.index import Hit, Index, build_index
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

WIDTH, FRAMES, WORDS, PER_BLOCK, BLOCKS = 24, 4, 5, 40, 6
VIDEOS = PER_BLOCK * BLOCKS
METHODS = ("exact", "ivf", "hnsw")
Interaction = Literal["ti", "wti", "att_ti", "att_wti"]


def header(
    stored: StoredType = "fp32", interaction: Interaction = "att_wti", one_way: bool = False
) -> FeatureHeader:
    return FeatureHeader(
        model="planted",
        fingerprint="a" * 64,
        settings=({"matching": "words_to_frames"} if one_way else {})
        | {
            "interaction": interaction,
            "neighbour_frames": True,
            "num_frames": FRAMES,
            "max_words": WORDS,
            "image_size": 16,
            "frame_spacing": "time",
            "mean_of_frames": False,
        },
        stored=stored,
        num_frames=FRAMES,
        num_words=WORDS,
        width=WIDTH,
        has_logits=True,
    )


def planted(seed: int) -> Features:
    """A block of videos of two scenes each, with a caption of the first scene of every video."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=made) / WIDTH**0.5

    theme = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(99)) / WIDTH**0.5
    scenes = theme[torch.arange(PER_BLOCK) % 8][:, None] + noise(PER_BLOCK, 2)
    frames = unit(scenes.repeat_interleave(FRAMES // 2, dim=1) + 0.4 * noise(PER_BLOCK, FRAMES))
    frame_mask = torch.ones(PER_BLOCK, FRAMES, dtype=torch.long)
    frame_mask[::5, -1] = 0
    said = unit(scenes[:, 0])
    word_mask = torch.tensor([[2, 1, 1, 1, 0]] * PER_BLOCK)
    return Features(
        sentence=unit(said + 1.5 * noise(PER_BLOCK)),
        words=unit(said[:, None] + 2.5 * noise(PER_BLOCK, WORDS)),
        word_mask=word_mask,
        frames=frames,
        frame_mask=frame_mask,
        word_logits=torch.randn(PER_BLOCK, WORDS, generator=made),
        frame_logits=torch.randn(PER_BLOCK, FRAMES, generator=made),
        margin_hinge=None,
    )


def data_source(number: int) -> DataSource:
    return DataSource(
        url=f"data/{number}", kind="packed", content=f"{number:064x}", num_blocks=BLOCKS
    )


def write_features(folder: Path, own: FeatureHeader, number: int = 0) -> FeatureSet:
    writer = FeatureWriter(folder, own, data_source(number))
    for block in range(BLOCKS):
        writer.write(
            block,
            planted(100 * number + block),
            keys=[f"v{block}_{row}" for row in range(PER_BLOCK)],
            captions=[f"caption {block} {row}" for row in range(PER_BLOCK)],
            caption_video=torch.arange(PER_BLOCK),
            sources=[VideoSource(row=PER_BLOCK * block + row) for row in range(PER_BLOCK)],
        )
    assert writer.publish()
    return FeatureSet.open(folder)


def build(folder: Path, method: Any, **more: Any) -> Index:
    built = build_index(FeatureSet.open(folder), method=method, blocks_per_segment=2, **more)
    assert built
    return Index.open(folder, verify=True)


def exhaustive(features: FeatureSet, texts: Features) -> Tensor:
    settings = features.info.settings
    model = ModelConfig(
        interaction=settings["interaction"],
        matching=settings.get("matching", "two_way"),
        neighbour_frames=settings["neighbour_frames"],
    )
    return similarity_rows(texts, features.videos(), model)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features with an index of each method, in folders of its name."""
    folder = tmp_path_factory.mktemp("index")
    write_features(folder / "exact", header())
    for method in METHODS[1:]:
        shutil.copytree(folder / "exact", folder / method)
    for method in METHODS:
        build(folder / method, method)
    return folder


@pytest.mark.parametrize("interaction", get_args(Interaction))
@pytest.mark.parametrize("stored", get_args(StoredType))
def test_exact_search_that_reranks_all_is_the_exhaustive_ranking(
    tmp_path: Path, stored: StoredType, interaction: Interaction
) -> None:
    features = write_features(tmp_path, header(stored, interaction))
    index = build(tmp_path, "exact")
    assert (len(index), index.unindexed, index.method) == (VIDEOS, 0, "exact")
    texts = features.texts(range(0, VIDEOS, 60))
    scores = exhaustive(features, texts)
    for row, expected in enumerate(scores):
        one = Features(*(None if each is None else each[row : row + 1] for each in texts))
        hits = index.search_features(one, k=VIDEOS, rerank=VIDEOS)
        assert [hit.rank for hit in hits] == list(range(1, VIDEOS + 1))
        assert sorted(hit.video for hit in hits) == list(range(VIDEOS))
        own = torch.tensor([hit.similarity for hit in hits])
        best = expected.sort(descending=True).values
        assert torch.allclose(own, best, rtol=0, atol=1e-5)
        found = expected[[hit.video for hit in hits]]
        assert torch.allclose(found, best, rtol=0, atol=1e-5)


def test_words_to_frames_are_stored_searched_and_ranked_one_way(tmp_path: Path) -> None:
    features = write_features(tmp_path, header(one_way=True))
    assert features.info.matching == "words_to_frames"
    assert not list(tmp_path.rglob("frame_logits*"))
    assert features.videos().frame_logits is None
    index, texts = build(tmp_path, "exact"), features.texts()
    scores = exhaustive(features, texts)
    other = similarity_rows(texts, _weighted(features), ModelConfig())
    assert (scores - other).abs().max() > 0.1
    right = scores[torch.arange(VIDEOS), features.caption_video]
    whole = (scores > right[:, None]).sum(1) < 10
    found, rows = 0, range(0, VIDEOS, 6)
    for row in rows:
        hits = index.search_features(features.texts([row]), k=10, rerank=60)
        for hit in hits:
            assert hit.similarity == pytest.approx(float(scores[row, hit.video]), abs=1e-5)
        found += int(features.caption_video[row]) in [hit.video for hit in hits]
    assert found >= 0.9 * int(whole[list(rows)].sum()) > 10
    # A video as the query: its frames are words of equal weight.
    own = features.videos([5])
    shown = own.frame_mask.float()[..., None]
    mean = unit((shown * own.frames).sum(1))
    query = own._replace(sentence=mean, words=own.frames, word_mask=own.frame_mask)
    query = query._replace(word_logits=torch.ones(1, FRAMES))
    expected = exhaustive(features, query)[0]
    expected[5] = -torch.inf
    best = index.search_key(features.keys[5], k=1, rerank=VIDEOS)[0]
    assert best.video == int(expected.argmax())
    assert best.similarity == pytest.approx(float(expected.max()), abs=1e-5)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("words_to_frames", "frames_to_words"))
    with pytest.raises(ShardCorrupt, match="two_way, words_to_frames"):
        FeatureSet.open(tmp_path)


def _weighted(features: FeatureSet) -> Features:
    videos = features.videos()
    return videos._replace(frame_logits=torch.zeros_like(videos.frame_mask, dtype=torch.float32))


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_find_what_the_whole_similarity_finds(written: Path, method: str) -> None:
    index = Index.open(written / method)
    features = index.features
    texts = features.texts()
    scores = exhaustive(features, texts)
    right = scores[torch.arange(VIDEOS), features.caption_video]
    whole = (scores > right[:, None]).sum(1) < 10
    assert 0.5 < whole.float().mean() < 0.99  # neither trivial nor hopeless
    found = []
    rows = range(0, VIDEOS, 3)
    for row in rows:
        hits = index.search_features(features.texts([row]), k=10, rerank=60)
        found.append(int(features.caption_video[row]) in [hit.video for hit in hits])
    assert sum(found) >= 0.97 * int(whole[list(rows)].sum())


def test_the_words_of_a_query_bring_more_of_the_best_among_the_candidates(written: Path) -> None:
    features = FeatureSet.open(written / "exact")
    texts, videos = features.texts(), features.videos()
    best = exhaustive(features, texts).topk(10).indices

    def kept(queries: Tensor, vectors: Tensor) -> float:
        found = (queries @ vectors.T).topk(20).indices
        return (best[:, :, None] == found[:, None]).any(2).float().mean().item()

    queries, vectors = query_vectors(texts, "att_wti"), video_vectors(videos, "att_wti")
    logits = videos.frame_logits
    assert logits is not None
    weights = torch.where(videos.frame_mask > 0, logits, -torch.inf).softmax(1)
    mean = (weights[..., None] * videos.frames).sum(1)
    assert torch.allclose(unit(mean), vectors, atol=1e-6)
    assert kept(queries, vectors) > kept(unit(texts.sentence), vectors) + 0.04


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_adding_keeps_the_old_segments_and_gives_the_same_search(
    written: Path, tmp_path: Path, method: str
) -> None:
    added = tmp_path / "added"
    shutil.copytree(written / method, added)
    before = content(added / "index")
    features = write_features(added, header(), number=1)
    with Index.open(added) as index:
        assert (len(index), index.unindexed) == (VIDEOS, VIDEOS)
        assert max(hit.video for hit in index.search_features(features.texts([3]))) < VIDEOS
    index = build(added, "auto")
    after = content(added / "index")
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: value for name, value in before.items() if name != "index.json"
    }
    if method == "exact":
        shutil.copytree(added, tmp_path / "once")
        shutil.rmtree(tmp_path / "once" / "index")
        build(tmp_path / "once", "exact")
        assert content(tmp_path / "once") == content(added)
    assert (len(index), index.unindexed) == (2 * VIDEOS, 0)
    # A caption whose best video has been added.
    best_of_each = exhaustive(features, features.texts()).argmax(1)
    caption = int((best_of_each >= VIDEOS).nonzero()[0])
    best = int(best_of_each[caption])
    (hit,) = index.search_features(features.texts([caption]), k=1)
    assert (hit.video, hit.data) == (best, "data/1")
    with pytest.raises(ValueError, match="several data sets"):
        index.search_key("v0_0")
    assert index.row("v0_0", "data/1") == VIDEOS


def test_tasks_in_any_order_give_the_files_of_one(written: Path, tmp_path: Path) -> None:
    write_features(tmp_path, header())
    features = FeatureSet.open(tmp_path)
    assert not build_index(features, method="exact", blocks_per_segment=2, task=(1, 2))
    with pytest.raises(FileNotFoundError, match="holds no index"):
        Index.open(tmp_path)
    assert build_index(features, method="exact", blocks_per_segment=2, task=(0, 2))
    assert content(tmp_path) == content(written / "exact")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_index as t
from tvr.trainer.index import build
real = build.write_array
for limit in (1, 5, 99):  # in the centres, in the second segment, before index.json
    # A child of a process that has started no threads yet.
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        continue
    calls = 0
    def write(path, array):
        global calls
        calls += 1
        if calls == limit:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, array)
    build.write_array = write
    build.write_atomically = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
    t.build(Path(sys.argv[1]), "ivf")
"""


def test_a_killed_build_goes_on_to_the_same_files(written: Path, tmp_path: Path) -> None:
    write_features(tmp_path, header())
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    line = [sys.executable, "-c", KILLED, str(tmp_path), *paths]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "index" / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("vectors.bin")}
    assert len(kept) == BLOCKS // 2
    build(tmp_path, "ivf")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    own, other = (
        {name: found for name, found in content(folder).items() if not is_hidden(name)}
        for folder in (tmp_path, written / "ivf")
    )
    assert own == other


def is_hidden(name: str) -> bool:
    """True for what a killed build left, and for the lock of publishing."""
    return Path(name).name.startswith(".")


FILES = {
    "exact": ("*/segment-00000002/vectors.bin",),
    "ivf": ("*/segment-00000002/lists.bin", "centroids.bin"),
    "hnsw": tuple(f"*/segment-00000002/{name}.bin" for name in ("levels", "neighbours", "entry")),
}


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("method", METHODS)
def test_damaged_files_are_named_and_built_again(
    written: Path, tmp_path: Path, method: str, damage: Callable[[Path], None]
) -> None:
    for number, name in enumerate(FILES[method]):
        copy = tmp_path / str(number)
        shutil.copytree(written / method, copy)
        (path,) = (copy / "index").glob(name)
        damage(path)
        # Vectors are hashed if asked for: they cannot lead anywhere but to a worse ranking.
        with pytest.raises(ShardCorrupt, match=f"{path.name}: "):
            Index.open(copy, verify=path.stem == "vectors")
        if path.stem != "centroids":
            assert len(build(copy, "auto")) == VIDEOS


def edited(folder: Path, where: tuple[str | int, ...], value: object) -> None:
    path = folder / "index" / "index.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("segments", 0, "source"), "../../etc"),
        (("segments", 0, "source"), "set-0000000000000000\n"),
        (("segments", 0, "first_block"), -1),
        (("segments", 0, "first_block"), 2),
        (("segments", 0, "end_block"), 0),
        (("segments", 0, "videos"), 1 << 40),
        (("segments", 0, "videos"), 79),
        (("segments", 0, "videos"), True),
        (("segments", 0, "files", "vectors", "num_bytes"), 4),
        (("segments", 0, "files", "../x"), {}),
        (("segments", 0, "files"), {}),
        (("segments", 0, "centroids"), "0" * 64),
        (("centroids",), {"num_bytes": 4, "sha256": "0" * 64}),
        (("header", "width"), 1 << 30),
        (("header", "method"), "pickle"),
        (("header", "num_lists"), 1 << 30),
        (("header", "format"), "other"),
        (("header", "more"), 1),
        (("model",), {"path": "", "step": None}),
        (("segments",), None),
    ],
    ids=str,
)
def test_hostile_manifests_are_refused(
    written: Path, tmp_path: Path, where: tuple[str | int, ...], value: object
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written / "ivf", copy)
    edited(copy, where, value)
    with pytest.raises(ShardCorrupt, match=r"index\.json: damaged or edited"):
        Index.open(copy)


def replaced(folder: Path, name: str, array: np.ndarray) -> None:
    """Puts another array in place of a file, with a record that fits it."""
    (path,) = (folder / "index").glob(f"*/segment-00000002/{name}.bin")
    stored = write_array(path, array)
    edited(folder, ("segments", 1, "files", name), {**asdict(stored)})


def test_hostile_graphs_and_lists_are_refused(written: Path, tmp_path: Path) -> None:
    # Their hashes are right: whoever writes the files writes the record, too.
    (place,) = (written / "hnsw" / "index").glob("*/segment-00000002")
    levels, edges, entry = (
        np.fromfile(place / f"{name}.bin", "<i4") for name in ("levels", "neighbours", "entry")
    )
    low, high = int(np.flatnonzero(levels == 1)[0]), int(np.flatnonzero(levels == 2)[0])
    # A vector has 64 edges at the bottom and 32 on each level above.
    first = int((levels[:high] + 1).sum()) * 32 + 64
    assert edges[first] >= 0
    assert levels[edges[first]] > 1
    upper, far, negative = edges.copy(), edges.copy(), edges.copy()
    upper[first], far[0], negative[0] = low, len(levels), -2
    cases = [
        ("hnsw", "neighbours", upper, "leads to a vector without it"),
        ("hnsw", "neighbours", far, "must be -1 to 79"),
        ("hnsw", "neighbours", negative, "must be -1 to 79"),
        ("hnsw", "neighbours", edges[:-32], "edges; the levels have"),
        ("hnsw", "levels", levels * 0, "levels must be 1 to"),
        ("hnsw", "levels", levels + 40, "levels must be 1 to"),
        ("hnsw", "entry", entry + 80, "the highest"),
        ("hnsw", "entry", entry + np.array([0, 1]), "the highest"),
        ("ivf", "lists", np.full(80, 1 << 20, "<i4"), "lists must be 0 to"),
        ("ivf", "lists", np.full(80, -1, "<i4"), "lists must be 0 to"),
    ]
    for number, (method, name, array, message) in enumerate(cases):
        copy = tmp_path / str(number)
        shutil.copytree(written / method, copy)
        replaced(copy, name, array.astype("<i4"))
        with pytest.raises(ShardCorrupt, match=message):
            Index.open(copy)


def test_an_index_of_other_features_is_refused(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_features(other, header("fp16"))
    shutil.copytree(written / "exact" / "index", other / "index")
    with pytest.raises(ValueError, match="built from other features"):
        Index.open(other)
    with pytest.raises(ValueError, match="not those that it was built from"):
        build(other, "auto")
    with pytest.raises(ValueError, match="method=exact, not hnsw"):
        build(written / "exact", "hnsw")
    foreign = tmp_path / "foreign"
    write_features(foreign, replace(header(), fingerprint="b" * 64))
    shutil.copytree(written / "exact" / "index", foreign / "index")
    with pytest.raises(ValueError, match="features of another model"):
        Index.open(foreign)
    with pytest.raises(ValueError, match="fingerprint=aaa"):
        build(foreign, "auto")


@pytest.mark.parametrize("interaction", ["att_wti", "ti"])
def test_a_stored_video_as_the_query_is_its_frames_as_words(
    tmp_path: Path, interaction: Interaction
) -> None:
    features = write_features(tmp_path, header("fp32", interaction))
    index = build(tmp_path, "exact")
    row = 5  # its last frame is padding
    own = features.videos([row])
    logits = own.frame_logits if interaction == "att_wti" else torch.zeros(1, FRAMES)
    assert logits is not None
    weights = torch.where(own.frame_mask > 0, logits, -torch.inf).softmax(1)
    query = own._replace(
        sentence=unit((weights[..., None] * own.frames).sum(1)),
        words=own.frames,
        word_mask=own.frame_mask,
        word_logits=own.frame_logits,
    )
    expected = exhaustive(features, query)[0]
    hits = index.search_key(features.keys[row], k=VIDEOS - 1, rerank=VIDEOS)
    expected[row] = -torch.inf
    assert [hit.video for hit in hits] == expected.argsort(descending=True)[:-1].tolist()
    assert hits[0].similarity == pytest.approx(float(expected.max()), abs=1e-5)
    with pytest.raises(KeyError, match="no video with the key 'nothing'"):
        index.search_key("nothing")


def scored(hits: list[Hit]) -> list[tuple[int, float]]:
    return [(hit.video, hit.similarity) for hit in hits]


def test_searches_of_several_threads_are_those_of_one(written: Path) -> None:
    for method in METHODS:
        index = Index.open(written / method)
        keys = [index.features.keys[row] for row in range(0, VIDEOS, 12)]
        alone = [index.search_key(key, rerank=30) for key in keys]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(partial(index.search_key, rerank=30), keys))
        assert [scored(hits) for hits in found] == [scored(hits) for hits in alone]


def test_arguments_out_of_range_are_named(written: Path, tmp_path: Path) -> None:
    with Index.open(written / "exact") as index:
        one = index.features.texts([0])
        for k, rerank, message in (
            (0, None, "k=0 must be 1 to 200"),
            (201, None, "k=201 must be 1 to 200"),
            (10, 9, "k=10 must be 1 to 9"),
            (10, VIDEOS + 1, "rerank=241 must be 1 to 240"),
            (1, 0, "rerank=0 must be"),
        ):
            with pytest.raises(ValueError, match=message):
                index.search_features(one, k=k, rerank=rerank)
        for query in ("", " \t\n", "\u200b"):
            with pytest.raises(ValueError, match="no visible character"):
                index.search(query)
        with pytest.raises(ValueError, match="10001 characters"):
            index.search("x" * 10_001)
        with pytest.raises(ValueError, match="does not name the model that encoded it, planted"):
            index.search("a dog")
    write_features(tmp_path, header())
    with pytest.raises(ValueError, match="task 2 of 2"):
        build(tmp_path, "exact", task=(2, 2))
    # Fewer videos than candidates: all come back.
    assert len(build(tmp_path, "exact").search_features(one, k=200)) == 200


def test_without_faiss_the_extra_is_named(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for line in (["search", str(written / "exact"), "a dog"], ["index", str(written / "exact")]):
        assert main(line) == 2
        assert "pip install 'tvr[search]'" in capsys.readouterr().err


def test_damaged_features_are_no_ranking(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written / "exact", copy)
    (path,) = copy.glob("set-*/block-00000000/frames.bin")
    values = np.fromfile(path, "<f4")
    values[:WIDTH] = np.nan
    values.tofile(path)
    index = Index.open(copy)
    with pytest.raises(ShardCorrupt, match="v0_0 is not finite"):
        index.search_features(index.features.texts([1]), rerank=VIDEOS)
    (path,) = copy.glob("set-*/block-00000000/frame_mask.bin")
    np.zeros(PER_BLOCK * FRAMES, "|u1").tofile(path)
    with pytest.raises(ShardCorrupt, match="damaged features: frame_mask"):
        index.search_features(index.features.texts([1]), rerank=VIDEOS)
