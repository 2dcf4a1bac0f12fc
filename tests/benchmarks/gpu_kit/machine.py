"""The card, its driver, and the versions that numbers belong to."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

# In a process of its own: the kit's process must not hold memory of the card.
TORCH = """
import json, torch
card = None
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    card = {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "l2_mib": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
        "count": torch.cuda.device_count(),
    }
versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
try:
    import triton
    versions["triton"] = triton.__version__
except ImportError:
    pass
print(json.dumps({"card": card, "versions": versions}))
"""
DRIVER_FIELDS = ("driver_version", "clocks.max.sm", "power.limit")


def describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """The card (None without CUDA), its driver, versions, and the processor."""
    ended = subprocess.run(
        [sys.executable, "-c", TORCH],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        raise SystemExit(f"gpu_kit: torch does not start: {lines[-1] if lines else 'no message'}")
    found = json.loads(ended.stdout.splitlines()[-1])
    found["versions"] = {"python": platform.python_version()} | found["versions"]
    if found["card"] is not None:
        found["card"] |= _driver(environment)
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found | {"cpu": names[0] if names else platform.machine(), "cores": len(names)}


def file_name(card: str) -> str:
    """Name of the card's file among the results, such as gpu_nvidia_h100_80gb_hbm3.json."""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


def _driver(environment: dict[str, str]) -> dict[str, str | None]:
    """What nvidia-smi reports; it only reads."""
    unknown: dict[str, str | None] = dict.fromkeys(DRIVER_FIELDS)
    if shutil.which("nvidia-smi") is None:
        return unknown
    line = [
        "nvidia-smi",
        "-i",
        "0",
        f"--query-gpu={','.join(DRIVER_FIELDS)}",
        "--format=csv,noheader",
    ]
    try:
        ended = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    values = [value.strip() for value in ended.stdout.splitlines()[0].split(",")]
    return dict(zip(DRIVER_FIELDS, values, strict=False))
