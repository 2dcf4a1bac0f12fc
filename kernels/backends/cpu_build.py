"""Builds the compiled CPU kernels on first use, caches the library and loads it once a process."""

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

_DIR = Path(__file__).parent
SOURCES = [_DIR / "similarity_forward.cpp", _DIR / "similarity_backward.cpp"]
HEADERS = [_DIR / "similarity_vectors.h"]
# Explicit flags instead of -march=native: machines of several kinds may share the cache folder.
CPU_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}

_result: tuple[str, str] | None = None
_load_lock = threading.Lock()


def available_backend() -> tuple[str, str]:
    """Loads the compiled kernels, and builds them first if needed.

    A build takes half a minute; other processes wait for it. Later calls in a process return the
    first result. A failure is logged once.

    Returns:
        ("compiled", folder of the library), or ("torch", reason why it cannot be built or loaded).
    """
    global _result
    with _load_lock:
        if _result is None:
            try:
                _result = ("compiled", str(_load()))
            # ImportError: setuptools is missing. RuntimeError: the build failed.
            # SubprocessError: the compiler did not report its version.
            except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                _result = ("torch", _error_line(error))
                logging.getLogger(__name__).warning(
                    "the similarity is several times slower without its compiled kernels: %s",
                    _result[1],
                )
        return _result


def _load() -> Path:
    """Builds and loads the library; returns its folder."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise OSError(f"no C++ compiler: {compiler!r} is not on PATH (the variable CXX names it)")
    from torch.utils import cpp_extension

    # -fopenmp is for the compiler only. Linking would load a second OpenMP library beside torch's,
    # and each would start a thread per core.
    flags = ["-O3", "-std=c++20", "-Wno-psabi", "-fopenmp"]
    flags += CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    name = f"tvr_similarity_{_digest(flags)}"
    folder = Path(root) / name
    library, complete = folder / f"{name}.so", folder / "complete"
    if complete.exists():
        torch.ops.load_library(library)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with build_lock(folder), ninja_on_path():
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
    """Cache key of the build: sources, torch version, compiler and flags."""
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = [*sources, torch.__version__, os.environ.get("CXX", ""), *flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Serialises builds of a torch extension in `folder` over processes.

    The kernel releases this lock when its holder dies. torch's own lock file stays behind and would
    block every later build.
    """
    with open(folder / "builders", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # No other process is building here, so torch's lock file is left over from a killed build.
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Puts the environment's scripts folder, which holds `ninja`, first on PATH.

    Not last: another version of ninja takes the log of this one for damaged and compiles anew.
    """
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _error_line(error: Exception) -> str:
    """The compiler's first error line, or else the first line of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    compiler_errors = [line for line in lines if "error:" in line]
    return (compiler_errors or lines or [type(error).__name__])[0]
