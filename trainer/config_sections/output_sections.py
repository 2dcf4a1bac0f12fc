"""The sections `checkpoint` and `metrics`: what a run writes beside its log.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.trainer.config_sections.field_types import STRICT, NotNegative, Positive

WriterName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Where checkpoints are written, how often, and which are kept."""

    url: str | None = None
    """Folder or fsspec URL for the checkpoints of this run alone. None:
    run_dir/checkpoints."""
    every: NotNegative = 0
    """Steps between checkpoints. 0: only after the last step."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_every: NotNegative = 0
    """Also keeps the checkpoints of steps that are multiples of this number.
    0: none."""
    keep_best: bool = True
    """Also keeps the checkpoint with the best evaluation, by the mean of R@1
    in both directions."""
    background: bool = True
    """Writes checkpoints while training continues: a step waits only for a
    copy of the rank's weights and optimiser in host memory. Off: a step
    waits for the disk, and no copy is made. A run falls back to off, with
    a warning and a line in the log, if a copy does not fit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MetricsConfig:
    """Metrics for Prometheus during the run. The last values also go
    to run_dir/metrics."""

    enabled: bool = True
    """Turns metrics on or off."""
    endpoint: Literal["node", "rank", "none"] = "node"
    """HTTP endpoints that Prometheus scrapes: one for each node, one for
    each rank, or none. Addresses are in run_dir/metrics/HOST.json, a file
    for file_sd."""
    address: str | None = None
    """IP address of the network interface that the endpoint listens on.
    None: loopback (127.0.0.1) for a run on one machine; all interfaces
    (0.0.0.0) on several ones, or with `tvr launch slurm --targets`."""
    host: Annotated[str, Field(pattern=r"^[\w.:{}\[\]-]+$")] = "auto"
    """Host in the addresses for Prometheus: `fqdn`, `ip`, `hostname`, or
    text in which {hostname} stands for the node's name. auto: the address
    that the endpoint listens on, or with all interfaces the full name of
    the node if it has one, else its IP address, else its name."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the endpoint; with `rank`, the port of the first rank of a
    node. 0: any free port."""
    writers: tuple[WriterName, ...] = ()
    """Tools that also receive the log, in run_dir. Each needs the extra of
    its name."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """Peak TFLOPS of a rank's device, for MFU. None: the vendor's figure, if
    the device is known."""
