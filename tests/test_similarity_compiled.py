"""The compiled kernels equal the reference, value and every gradient; without them torch serves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_similarity import FEATURES, assert_same, example, with_gradients
from torch import Tensor

from tvr.kernels import compiled, reference
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.packed import MOST_SLOTS
from tvr.kernels.similarity import dmae_similarity

# texts, videos, words, frames, width: one of everything; 16 and 64 videos make one group and one
# tile of them, 129 numbers one row of registers and a rest; the last has several tiles each way.
SIZES = [
    (1, 1, 1, 1, 1),
    (5, 4, 6, 4, 8),
    (3, 16, 2, 1, 129),
    (7, 21, 32, 12, 16),
    (70, 70, 9, 7, 24),
]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    name, reason = compiled.backend()
    assert name == "compiled", reason


def masks(kind: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """`example` has ragged masks with words of mask 2."""
    if kind == "doubled":
        return {}
    of_words, of_frames = arguments["word_mask"], arguments["frame_mask"]
    if kind == "ragged":
        return {"word_mask": of_words.clamp(max=1)}
    return {"word_mask": torch.ones_like(of_words), "frame_mask": torch.ones_like(of_frames)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["full", "ragged", "doubled"])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_equals_the_reference(
    interaction: str, neighbours: bool, kind: str, dtype: torch.dtype
) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    tolerance = TOLERANCES[dtype]
    for texts, videos, words, frames, width in SIZES:
        arguments = example(texts, videos, words, frames, width=width, dtype=dtype)
        arguments |= masks(kind, arguments)
        expected = with_gradients(reference.dmae_similarity, arguments, **options)
        found = with_gradients(dmae_similarity, arguments, backend="compiled", **options)
        assert_same(found, expected, rtol=tolerance, atol=tolerance)


def test_word_part_alone_equals_the_reference() -> None:
    arguments = example(20, 20)

    def scores(door, **options) -> dict[str, Tensor]:
        return with_gradients(lambda sentence, **rest: door(None, **rest, **options), arguments)

    assert_same(
        scores(dmae_similarity, backend="compiled"),
        scores(reference.dmae_similarity),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_pass_gradcheck(interaction: str, neighbours: bool) -> None:
    arguments = example(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        options = {"interaction": interaction, "neighbour_frames": neighbours}
        return dmae_similarity(**named, **options, backend="compiled")

    assert torch.autograd.gradcheck(scores, features)


@pytest.mark.parametrize("neighbours", [False, True])
def test_equal_entries_give_the_gradient_to_the_first(neighbours: bool) -> None:
    # Entries are small whole numbers, so that many maxima are equal and every sum is exact.
    arguments = example(20, 20, 6, 5, width=4)
    draw = torch.Generator().manual_seed(0)
    for name in ("sentence", "words", "frames"):
        arguments[name] = torch.randint(-1, 2, arguments[name].shape, generator=draw).double()
    options = {"interaction": "att_wti", "neighbour_frames": neighbours}
    expected = with_gradients(reference.dmae_similarity, arguments, **options)
    found = with_gradients(dmae_similarity, arguments, backend="compiled", **options)
    assert_same(found, expected, rtol=1e-10, atol=1e-10)


def test_features_without_gradient_and_strided_gradients() -> None:
    arguments = example(20, 18)
    leaf = arguments["frames"].clone().requires_grad_()
    found = dmae_similarity(**arguments | {"frames": leaf}, backend="compiled")
    expected = reference.dmae_similarity(**arguments | {"frames": leaf})
    weighting = torch.randn(18, 20, dtype=torch.float64).T
    (of_found,) = torch.autograd.grad(found, leaf, weighting)
    (of_expected,) = torch.autograd.grad(expected, leaf, weighting)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        again = dmae_similarity(**arguments | {"frames": leaf}, backend="compiled")
    assert torch.equal(again, found)


def test_not_a_number_reaches_every_pair_of_its_text_or_video() -> None:
    arguments = example(20, 20)
    arguments["words"][3, 0] = torch.nan
    arguments["frames"][17, 0] = torch.nan
    found = dmae_similarity(**arguments, backend="compiled").isnan()
    assert torch.equal(found, reference.dmae_similarity(**arguments).isnan())
    assert found.sum() == 20 + 20 - 1


def test_words_part_does_not_depend_on_the_threads() -> None:
    # To the last bit, unlike the sentence's plain matrix products.
    arguments = example(70, 70, 9, 7, width=24, dtype=torch.float32)

    def words_part(sentence: Tensor, **rest: Tensor) -> Tensor:
        return dmae_similarity(None, **rest, backend="compiled")

    before = torch.get_num_threads()
    one = with_gradients(words_part, arguments)
    torch.set_num_threads(3)
    try:
        three = with_gradients(words_part, arguments)
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        assert torch.equal(three[name], value), name


def saved_bytes(pairs: int, words: int, frames: int, valid: int) -> int:
    given = example(pairs, pairs, words, frames, dtype=torch.float32)
    given["word_mask"] = (torch.arange(words) < valid).long().repeat(pairs, 1)
    arguments = {n: x.requires_grad_(n in FEATURES) for n, x in given.items()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = dmae_similarity(**arguments, backend="compiled")
    assert scores.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("valid", [8, 3])
def test_a_pair_keeps_one_byte_for_each_maximum_and_none_for_padding(valid: int) -> None:
    words, frames = 8, 4
    small, large = (saved_bytes(pairs, words, frames, valid) for pairs in (64, 128))
    # What is kept is linear + quadratic: the second difference leaves the quadratic part.
    quadratic = (large - 2 * small) / (128**2 - 2 * 64**2)
    # The sentence keeps its best frame.
    assert quadratic == pytest.approx(valid + frames + 1, abs=0.1)


def test_more_slots_than_a_byte_counts_take_the_torch_tiles() -> None:
    most = example(2, 2, MOST_SLOTS, 3)
    more = example(2, 2, MOST_SLOTS + 1, 3)
    assert_same(
        with_gradients(dmae_similarity, most, backend="compiled"),
        with_gradients(reference.dmae_similarity, most),
        rtol=1e-10,
        atol=1e-10,
    )
    expected = reference.dmae_similarity(**more)
    torch.testing.assert_close(dmae_similarity(**more), expected)
    with pytest.raises(ValueError, match="256 words or frames are more than 255"):
        dmae_similarity(**more, backend="compiled")


def test_refused_options_are_named() -> None:
    with pytest.raises(ValueError, match="backend='cuda' must be one of compiled, torch"):
        dmae_similarity(**example(), backend="cuda")
    with pytest.raises(ValueError, match="chunk=2 is for backend='torch'"):
        dmae_similarity(**example(), backend="compiled", chunk=2)


# Run elsewhere: a process decides once which backend it has.
SCORE = """
import json, logging, torch
logging.basicConfig(format="%(message)s")
from tvr.kernels import compiled
from tvr.kernels.similarity import dmae_similarity
arguments = torch.load({path!r})
scores = [dmae_similarity(**arguments).tolist() for _ in range(2)]
print(json.dumps([compiled.backend(), scores]))
"""


def score_elsewhere(
    arguments: dict[str, Tensor], folder: Path, **environment: str
) -> subprocess.Popen[str]:
    path = folder / "arguments.pt"
    if not path.exists():
        torch.save(arguments, path)
    return subprocess.Popen(
        [sys.executable, "-c", SCORE.format(path=str(path))],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# A compiler that answers torch's questions but cannot compile; one that answers nothing.
FAILING = {
    "fails": 'case "$*" in *.cpp*) echo "x.cpp:1: error: no such machine" >&2; exit 1;; esac\n'
    'exec c++ "$@"',
    "mute": "exit 1",
}


@pytest.mark.parametrize(
    ("compiler", "telling"),
    [
        ("missing", "/missing' is not on PATH"),
        ("fails", "error: no such machine"),
        ("mute", "returned non-zero exit status 1"),
    ],
)
def test_without_a_compiler_torch_serves_and_says_why_once(
    compiler: str, telling: str, tmp_path: Path
) -> None:
    path = tmp_path / compiler
    if compiler in FAILING:
        path.write_text(f"#!/bin/sh\n{FAILING[compiler]}\n")
        path.chmod(0o755)
    arguments = example()
    out, err = score_elsewhere(arguments, tmp_path, CXX=str(path)).communicate(timeout=120)
    assert out, err
    (name, reason), scores = json.loads(out)
    assert name == "torch"
    assert telling in reason
    assert err.count(reason) == 1
    expected = reference.dmae_similarity(**arguments)
    for found in scores:
        torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=1e-6, atol=1e-6)


def test_processes_that_build_at_once_share_one_quiet_build(tmp_path: Path) -> None:
    # The folder of the build as a killed builder leaves it: torch's own lock would wait forever.
    built = Path(compiled.backend()[1])
    stale = tmp_path / "extensions" / built.name
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    arguments = example()
    started = [score_elsewhere(arguments, tmp_path) for _ in range(2)]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert err == ""
        (line,) = out.splitlines()
        (name, folder), _ = json.loads(line)
        assert (name, folder) == ("compiled", str(stale))
    assert not (stale / "lock").exists()
