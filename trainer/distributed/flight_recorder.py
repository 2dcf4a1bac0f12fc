"""torch's flight recorder: the last collectives of every NCCL group, with state and Python stack.

The recorder knows what the host does not: which collectives the GPU has started and finished.
`torchfrtrace` compares the records of all ranks.
"""

from __future__ import annotations

import os

import torch
from torch._C import _distributed_c10d as c10d
from torch.torch_version import TorchVersion

BUFFER_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Number of recorded collectives. The second name is the older one: newer torch warns about it, and
torch before 2.10 may not read the first."""
RENAMED_IN = "2.10"
NUM_RECORDED = 2000
FILE_PREFIX = "nccl_trace_rank_"
"""`torchfrtrace` expects files with a common prefix that the rank follows."""


def enable_flight_recorder() -> None:
    """Turns the recorder on, unless the user has set its size; call it before NCCL starts.

    torch reads the variable once. Its default has differed between versions.
    """
    if any(name in os.environ for name in BUFFER_VARIABLES):
        return
    is_renamed = TorchVersion(torch.__version__) >= TorchVersion(RENAMED_IN)
    for name in BUFFER_VARIABLES[:1] if is_renamed else BUFFER_VARIABLES:
        os.environ[name] = str(NUM_RECORDED)


def flight_record() -> bytes | None:
    """The recorder's content, pickled by torch; None if this build of torch has no NCCL.

    It asks the CUDA driver about events, which can take forever if the driver hangs.
    """
    dump = getattr(c10d, "_dump_nccl_trace", None)
    return None if dump is None else dump()
