"""The compiled CPU kernels: built by torch on first use, cached, loaded once in a process."""

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
SOURCES = [_FOLDER / "similarity_forward.cpp", _FOLDER / "similarity_backward.cpp"]
HEADERS = [_FOLDER / "similarity_vectors.h"]
# Named, not -march=native: the cache may lie on a disk that machines of several kinds share.
FLAGS_OF_CPU = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}

_found: tuple[str, str] | None = None
_loading = threading.Lock()


def backend() -> tuple[str, str]:
    """("compiled", where it lies), or ("torch", why the kernels could not be compiled or loaded).

    The first call in a process builds what is not in torch's folder of extensions yet (half a
    minute; other processes wait for it) and logs a failure once; every later call answers at once.
    """
    global _found
    with _loading:
        if _found is None:
            try:
                _found = ("compiled", str(_load()))
            # ImportError: the loader needs setuptools. RuntimeError: torch's for a failed build.
            # SubprocessError: a compiler that does not even tell its version.
            except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                _found = ("torch", _reason(error))
                logging.getLogger(__name__).warning(
                    "the similarity runs without its compiled kernels, several times slower: %s",
                    _found[1],
                )
        return _found


def _load() -> Path:
    """Builds and loads the library; the folder that holds it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise OSError(f"no C++ compiler: {compiler!r} is not on PATH (the variable CXX names it)")
    from torch.utils import cpp_extension

    # OpenMP for the compiler only: its library is the one that torch has loaded, or two runtimes
    # would each start a thread for every core.
    flags = ["-O3", "-std=c++20", "-Wno-psabi", "-fopenmp"]
    flags += FLAGS_OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    name = f"tvr_similarity_{_digest(flags)}"
    folder = Path(root) / name
    library, complete = folder / f"{name}.so", folder / "complete"
    if complete.exists():
        torch.ops.load_library(library)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with one_builder(folder), _ninja_on_path():
        cpp_extension.load(
            name,
            [str(source) for source in SOURCES],
            extra_cflags=flags,
            build_directory=str(folder),
            is_python_module=False,
        )
        complete.touch()
    return folder


def _digest(flags: list[str]) -> str:
    """Names the build: another source, torch, compiler or set of flags is another library."""
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = [*sources, torch.__version__, os.environ.get("CXX", ""), *flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def one_builder(folder: Path) -> Iterator[None]:
    """One process at a time builds an extension in its folder: a lock that the system releases when
    its holder dies, around torch's, which it does not."""
    with open(folder / "builders", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Nobody else builds here now, so torch's own lock file is a dead builder's.
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """`ninja` lies beside the interpreter of an environment that may not be activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _reason(error: Exception) -> str:
    """One line: the compiler's first error where there is one, else the message's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    return (telling or lines or [type(error).__name__])[0]
