"""Set-up of every test: a CPU accelerator, one thread, fixed seeds, and the `gpu` mark."""

from __future__ import annotations

import gc
import os
import random
import sysconfig
from pathlib import Path

# Before anything imports torch or deepspeed: both read these once.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed starts `ninja`, which lies beside the interpreter of an environment not activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

import numpy as np
import pytest
import torch
from builders.exhaustive import ExhaustiveMark, examples
from builders.file_seconds import SecondsRecorder, order_and_mark
from hypothesis import settings

settings.register_profile("tvr", derandomize=True, deadline=None, database=None)
settings.load_profile("tvr")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_tiny_data`, which tests read only."""
    # Imported here: the tests of a GPU also run where the data's packages are not installed.
    from builders.tiny import make_tiny_data

    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder)
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "write the seconds of each test file to tests/file_seconds.json"
    parser.addoption("--record-seconds", action="store_true", help=help_text)
    fuzz = parser.getgroup("fuzz", "inputs of tests/data/test_fuzz.py")
    fuzz.addoption(
        "--fuzz-inputs", type=int, default=examples(10_000), help="number of damaged files"
    )
    fuzz.addoption("--fuzz-seed", type=int, default=0, help="seed of the damage")
    help_text = "no input starts after so many seconds; for a longer run, give more"
    fuzz.addoption("--fuzz-seconds", type=float, default=150.0, help=help_text)
    fuzz.addoption("--fuzz-replay", metavar="FILE", help="run the input in this file only")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    # The name of a test must not depend on its bytes: a gzip file holds the time at which it was
    # made, and the workers of pytest-xdist refuse to run tests that they do not name alike.
    return argname if isinstance(val, bytes) else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ExhaustiveMark(config))
    is_worker = hasattr(config, "workerinput")
    if config.getoption("--record-seconds") and not is_worker:
        config.pluginmanager.register(SecondsRecorder(config.rootpath))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First, so that `-m slow` finds the marks.
    order_and_mark(items)


def pytest_collection_finish() -> None:
    # The modules and tests hold over a million objects. Each training run collects garbage at its
    # start, which would visit them all and take longer than the run's steps.
    gc.collect()
    gc.freeze()
