"""What keeps DeepSpeed's start short: no unneeded import, and extensions compiled only once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvr.kernels.backends.cpu_build import build_lock, ninja_on_path
from tvr.trainer.config import TrainConfig
from tvr.trainer.engine.deepspeed_config import has_own_optimizer, optimizer_builders

MUON_MODULES = (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
# torch.compile returns a function as it is where this variable is "1".
COMPILER_OFF = "TORCHDYNAMO_DISABLE"
# Attribute of the modules that were imported so.
_IS_PLAIN = "_tvr_is_not_compiled"


@contextmanager
def not_importable(package: str) -> Iterator[None]:
    """Hides a package, if it is not loaded yet.

    DeepSpeed's autotuner imports mlflow where that is installed, and training never uses the
    autotuner. The import takes as long as all the rest of DeepSpeed's, on every rank.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # the import then raises ImportError
    try:
        yield
    finally:
        del sys.modules[package]


def import_muon(train: TrainConfig) -> None:
    """Imports DeepSpeed's Muon before it does so itself, without torch's compiler if it can.

    Every engine imports Muon in order to compare its optimiser with it, and Muon passes its
    functions to torch.compile. That imports torch's compiler, which takes a tenth of a rank's
    start. Only a run whose optimiser is DeepSpeed's own needs the compiled functions.
    """
    loaded = [sys.modules[name] for name in MUON_MODULES if name in sys.modules]
    if has_own_optimizer(train):
        if any(hasattr(module, _IS_PLAIN) for module in loaded):
            for name in MUON_MODULES:
                del sys.modules[name]  # DeepSpeed's next import compiles its functions
        return
    if loaded:
        return
    before = os.environ.get(COMPILER_OFF)
    os.environ[COMPILER_OFF] = "1"
    try:
        for name in MUON_MODULES:
            setattr(importlib.import_module(name), _IS_PLAIN, True)
    except ImportError:
        return  # a version of DeepSpeed without Muon, or with it elsewhere
    finally:
        if before is None:
            del os.environ[COMPILER_OFF]
        else:
            os.environ[COMPILER_OFF] = before


def build_extensions(deepspeed: Any, train: TrainConfig) -> None:
    """Compiles the extensions that DeepSpeed needs, which happens on the first start ever.

    DeepSpeed would compile them while the ranks wait for each other. A process killed during that
    build leaves a stale lock that blocks later starts; `build_lock` removes such a lock.
    """
    from torch.utils import cpp_extension

    for name in ("ShareMemCommBuilder", *optimizer_builders(train)):
        builder = deepspeed.accelerator.get_accelerator().create_op_builder(name)
        if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
            continue  # DeepSpeed runs without the extension, or raises an error that names it
        folder = cpp_extension._get_build_directory(builder.NAME, verbose=False)
        with build_lock(Path(folder)), ninja_on_path():
            builder.load(verbose=False)
