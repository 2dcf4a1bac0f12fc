"""The compiled kernels equal the reference, value and every gradient; without them torch serves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_similarity import assert_same, example, with_gradients
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends import cpu_build
from tvr.kernels.backends.cpu import MOST_SLOTS
from tvr.kernels.similarity import dmae_similarity


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    name, reason = cpu_build.available_backend()
    assert name == "compiled", reason


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
from tvr.kernels.backends import cpu_build
from tvr.kernels.similarity import dmae_similarity
arguments = torch.load({path!r})
scores = [dmae_similarity(**arguments).tolist() for _ in range(2)]
print(json.dumps([cpu_build.available_backend(), scores]))
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
    built = Path(cpu_build.available_backend()[1])
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
