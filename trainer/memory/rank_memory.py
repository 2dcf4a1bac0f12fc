"""What one rank of a run holds at the worst moment of a step, and what its device has free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.memory.environment import device, similarity_backend
from tvr.trainer.memory.memory import configured, estimate
from tvr.trainer.memory.memory_table import embed_width
from tvr.trainer.memory.model_memory import ModelBytes, model_bytes
from tvr.trainer.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """An estimate in bytes of what one rank holds at the worst moment of a step."""

    model: ModelBytes
    similarity: int
    """Similarity and its loss, features included."""
    copy: int
    """Of the state, in host memory, while a checkpoint is written in the background."""
    offloaded: int
    """Of the states, in host memory."""
    copy_here: bool
    """Whether host memory is the device's."""
    at_once: bool
    """Whether the activations are still there when the loss is computed."""

    @property
    def states(self) -> int:
        """What the device holds between steps, known to the byte but for DeepSpeed's buffers."""
        return self.model.states - self.offloaded

    @property
    def total(self) -> int:
        parts = (self.model.activations, self.similarity)
        states = self.states + self.copy * self.copy_here
        return states + (sum(parts) if self.at_once else max(parts))

    def rows(self) -> Iterator[tuple[str, str]]:
        model, when = self.model, "together" if self.at_once else "one after the other"
        for name, size in (
            ("weights", model.weights),
            ("gradients", model.gradients),
            ("optimiser", model.optimiser),
            (f"copy for a checkpoint{'' if self.copy_here else ', in host memory'}", self.copy),
            ("of these offloaded to host memory", self.offloaded),
            ("activations of a micro-batch", model.activations),
            ("similarity and loss", self.similarity),
            (f"total, the last two {when}", self.total),
        ):
            yield name, f"{size / 1e6:,.0f}"


def rank_memory(config: Config, tokenizer: Tokenizer, ranks: int) -> RankMemory:
    """What one rank of `ranks` needs, the estimates of model and similarity put together."""
    backend, _ = similarity_backend(config)
    width = embed_width(config.model)
    sizes = configured(config, ranks, width=width, backend=backend, device=device())
    model = model_bytes(config, tokenizer, ranks)
    # At stage 3 a rank's part of the float32 weights is all of them that is saved.
    copy = model.optimiser + (0 if config.train.zero_stage == 3 else model.weights)
    return RankMemory(
        model=model,
        offloaded=_offloaded(config.train, model) if device() == "cuda" else 0,
        copy=copy if config.checkpoint.background else 0,
        copy_here=device() == "cpu",
        similarity=estimate(sizes).total,
        at_once=not config.train.gradient_cache,
    )


def free_bytes() -> int:
    """Memory of this machine's device that a step could take now."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def total_bytes() -> int:
    """Memory of this machine's device, whoever has it now."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total


def _offloaded(train: TrainConfig, model: ModelBytes) -> int:
    if train.offload == "none":
        return 0
    # Gradients follow the optimiser that they are for.
    optimiser = model.optimiser + model.gradients
    return optimiser if train.offload == "optimizer" else optimiser + model.weights
