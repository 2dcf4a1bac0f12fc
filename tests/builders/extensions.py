"""Compiles the C++ extensions before the tests start; `make test` runs it once.

Otherwise the first ranks that start would compile them: on a busy machine that takes minutes, in
which tests reach their time-outs, kill the ranks, and leave the build to the next ones.
"""

from __future__ import annotations

import os

# Before deepspeed is imported: it reads the variable once.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.accelerator import get_accelerator

from tvr.kernels.backends.cpu_build import available_backend, ninja_on_path


def main() -> None:
    """Builds what is missing: DeepSpeed's shared-memory extension and the similarity kernels."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():
        with ninja_on_path():
            builder.load(verbose=False)
    available_backend()


if __name__ == "__main__":
    main()
