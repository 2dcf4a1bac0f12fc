"""Floating-point operations of a training pair, and the peak rate of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# FakeTensorMode has no public name yet.
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tvr.trainer.config import Config, MetricsConfig, TrainConfig
from tvr.trainer.memory.environment import device
from tvr.trainer.model.features import ENCODER_TILE
from tvr.trainer.model.model import TextVideoModel, image_size

# Peak FLOP/s of dense products, from the vendor's data sheets. The first key that is part of the
# device's name applies.
PEAKS = {
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
}


def flops_per_pair(model: TextVideoModel, config: Config, world_size: int) -> float:
    """Counts the operations of forward and backward for one pair of a global batch.

    They are those of both towers for a caption and its frames, and the pair's share of the
    similarities of its loss. Towers whose stored outputs are read (`data.features`) do not count.
    Recomputation, which saves memory, is not counted. The text tower runs once; the image tower
    runs on fake tensors.

    Args:
        model: The model on the CPU, before ZeRO partitions it.
    """
    data, train = config.data, config.train
    others = train.global_batch if train.gradient_cache else train.micro_batch * world_size
    rows = 1 + (data.max_words if config.model.interaction.startswith("att_") else 0)
    slots = data.num_frames * config.model.tokens_per_frame
    similarity = 3 * 2 * others * rows * slots * model.width
    if data.features is not None:
        return similarity
    # Frozen towers encode as many rows, or a multiple.
    ids = torch.ones(ENCODER_TILE, data.max_words, dtype=torch.int64)
    side = image_size(config.model)
    with torch.random.fork_rng(devices=[]):
        text, _ = _counted(model, lambda: model.text_vectors(ids, ids))
        with FakeTensorMode(allow_non_fake_inputs=True):
            frames = torch.zeros(1, ENCODER_TILE, 3, side, side, dtype=torch.uint8)
            frame, _ = _counted(model, lambda: [model.frame_vectors(frames)])
    return (text + data.num_frames * frame) / ENCODER_TILE + similarity


def peak_flops(metrics: MetricsConfig, train: TrainConfig, on: torch.device) -> float | None:
    """Returns the peak FLOP/s of a rank's device in the precision of training; None if unknown."""
    if metrics.peak_tflops is not None:
        return metrics.peak_tflops * 1e12
    if on.type != "cuda":
        return None
    name = torch.cuda.get_device_name(on)
    known = (peaks for part, peaks in PEAKS.items() if part in name)
    return next((peaks[train.precision] for peaks in known), None)


def peak_line(metrics: MetricsConfig, train: TrainConfig) -> str:
    """One line with the peak rate that MFU is relative to, or the reason why MFU is unknown."""
    on = torch.device(device())
    peak = peak_flops(metrics, train, on)
    if peak is None:
        name = "a CPU" if on.type == "cpu" else torch.cuda.get_device_name(on)
        return f"MFU: unknown, like the peak rate of {name}; metrics.peak_tflops sets it"
    return f"MFU: relative to {peak / 1e12:.4g} TFLOP/s a rank"


def _counted(
    model: TextVideoModel, encode: Callable[[], Sequence[Tensor]]
) -> tuple[float, Sequence[Tensor]]:
    """Runs an encoding under the FLOP counter, with its backward; returns the count and output."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # The counter knows attention on GPUs and plain products, not the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = encode()
        trained = [x.sum() for x in found if x.requires_grad]
        if trained:
            torch.autograd.grad(trained, weights, allow_unused=True)
    return float(counter.get_total_flops()), found
