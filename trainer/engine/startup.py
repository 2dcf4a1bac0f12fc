"""What keeps DeepSpeed's start short: no unneeded import, and extensions compiled only once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvr.kernels.backends.cpu_build import build_lock, ninja_on_path
from tvr.trainer.config import TrainConfig
from tvr.trainer.engine.deepspeed_config import optimizer_builders


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
