"""The compiled kernels: threads, limits, the build, and the torch backend as a fallback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.exhaustive import further
from builders.similarity_inputs import (
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends import cpu_build
from tvr.kernels.backends.cpu import MAX_SLOTS
from tvr.kernels.similarity import dmae_similarity


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    name, reason = cpu_build.available_backend()
    assert name == "compiled", reason


def test_word_part_does_not_depend_on_the_number_of_threads() -> None:
    # Bit for bit. The sentence part is a plain matrix product, which torch may split by threads.
    arguments = similarity_inputs(70, 70, 9, 7, width=24, dtype=torch.float32)

    def word_part(sentence: Tensor, **rest: Tensor) -> Tensor:
        return dmae_similarity(None, **rest, backend="compiled")

    before = torch.get_num_threads()
    one = scores_and_gradients(word_part, arguments)
    torch.set_num_threads(3)
    try:
        three = scores_and_gradients(word_part, arguments)
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        assert torch.equal(three[name], value), name


def test_more_slots_than_one_byte_can_index_use_the_torch_tiles() -> None:
    most = similarity_inputs(2, 2, MAX_SLOTS, 3)
    more = similarity_inputs(2, 2, MAX_SLOTS + 1, 3)
    assert_all_close(
        scores_and_gradients(dmae_similarity, most, backend="compiled"),
        scores_and_gradients(reference.dmae_similarity, most),
        rtol=1e-10,
        atol=1e-10,
    )
    expected = reference.dmae_similarity(**more)
    torch.testing.assert_close(dmae_similarity(**more), expected)
    with pytest.raises(ValueError, match="256 words or frames are more than 255"):
        dmae_similarity(**more, backend="compiled")


def test_errors_name_the_option() -> None:
    with pytest.raises(ValueError, match="backend='cuda' must be one of compiled, torch, dense"):
        dmae_similarity(**similarity_inputs(), backend="cuda")
    with pytest.raises(ValueError, match="chunk=2 is for backend='torch'"):
        dmae_similarity(**similarity_inputs(), backend="compiled", chunk=2)


# Runs in a subprocess, because a process selects its backend once.
SCORE = """
import json, logging, torch
logging.basicConfig(format="%(message)s")
from tvr.kernels.backends import cpu_build
from tvr.kernels.similarity import dmae_similarity
arguments = torch.load({path!r})
scores = [dmae_similarity(**arguments).tolist() for _ in range(2)]
print(json.dumps([cpu_build.available_backend(), scores]))
"""


def score_in_subprocess(
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


# A compiler that reports its version but cannot compile, and one that always fails.
FAILING = {
    "fails": 'case "$*" in *.cpp*) echo "x.cpp:1: error: no such machine" >&2; exit 1;; esac\n'
    'exec c++ "$@"',
    "silent": "exit 1",
}


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("fails", "error: no such machine"),
        *further(
            ("missing", "/missing' is not on PATH"), ("silent", "returned non-zero exit status 1")
        ),
    ],
)
def test_without_a_compiler_the_torch_backend_is_used_and_the_reason_logged_once(
    compiler: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / compiler
    if compiler in FAILING:
        path.write_text(f"#!/bin/sh\n{FAILING[compiler]}\n")
        path.chmod(0o755)
    arguments = similarity_inputs()
    out, err = score_in_subprocess(arguments, tmp_path, CXX=str(path)).communicate(timeout=120)
    assert out, err
    (name, reason), scores = json.loads(out)
    assert name == "torch"
    assert message in reason
    assert err.count(reason) == 1
    expected = reference.dmae_similarity(**arguments)
    for actual in scores:
        torch.testing.assert_close(torch.tensor(actual).double(), expected, rtol=1e-6, atol=1e-6)


def test_concurrent_processes_share_one_build_and_print_nothing(tmp_path: Path) -> None:
    # A killed build leaves torch's lock file, which would block every later build.
    built = Path(cpu_build.available_backend()[1])
    stale = tmp_path / "extensions" / built.name
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    arguments = similarity_inputs()
    started = [score_in_subprocess(arguments, tmp_path) for _ in range(2)]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert err == ""
        (line,) = out.splitlines()
        (name, folder), _ = json.loads(line)
        assert (name, folder) == ("compiled", str(stale))
    assert not (stale / "lock").exists()
