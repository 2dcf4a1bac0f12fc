"""Estimated memory of one rank at the peak of a step, and the free memory of its device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tvr.kernels.backends.torch_dense import device_scores_per_tile
from tvr.launchers.host_limits import host_memory
from tvr.trainer.config import Config, TrainConfig, accumulation_steps
from tvr.trainer.engine.staging import pinned_bytes
from tvr.trainer.memory.environment import device, similarity_backend
from tvr.trainer.memory.model_memory import ModelBytes, model_bytes
from tvr.trainer.memory.similarity_memory import estimate_similarity
from tvr.trainer.memory.similarity_sizes import SimilaritySizes, with_exchange
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.tower_folders import embed_width


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Estimated bytes of one rank at the peak of a step."""

    model: ModelBytes
    similarity: int
    """Similarity and its loss, including the features."""
    checkpoint_copy: int
    """Copy of the states in host memory while a background checkpoint is written."""
    offloaded: int
    """States that are offloaded to host memory."""
    copy_on_device: bool
    """Whether the device's memory is the host's, as on a CPU."""
    keeps_activations: bool
    """Whether the activations are still allocated when the loss is computed."""

    @property
    def states(self) -> int:
        """Bytes on the device between steps; exact but for DeepSpeed's own buffers."""
        return self.model.states - self.offloaded

    @property
    def total(self) -> int:
        """Bytes on the device at the peak."""
        parts = (self.model.activations, self.similarity)
        states = self.states + self.checkpoint_copy * self.copy_on_device
        return states + (sum(parts) if self.keeps_activations else max(parts))

    def rows(self) -> Iterator[tuple[str, str]]:
        """The parts' names and sizes in MB, for a table."""
        model = self.model
        when = "together" if self.keeps_activations else "one after the other"
        copy_place = "" if self.copy_on_device else ", in host memory"
        for name, size in (
            ("weights", model.weights),
            ("gradients", model.gradients),
            ("optimiser", model.optimiser),
            (f"copy for a checkpoint{copy_place}", self.checkpoint_copy),
            ("of these offloaded to host memory", self.offloaded),
            ("activations of a micro-batch", model.activations),
            ("similarity and loss", self.similarity),
            (f"total, the last two {when}", self.total),
        ):
            yield name, f"{size / 1e6:,.0f}"


def rank_memory(config: Config, tokenizer: Tokenizer, ranks: int) -> RankMemory:
    """Estimates the memory of one rank of `ranks` on this machine's kind of device.

    Raises:
        ValueError: The global batch does not fit the ranks, or a model folder cannot be used.
    """
    model = model_bytes(config, tokenizer, ranks)
    on_cuda = device() == "cuda"
    # A GPU's tensors are copied to pinned memory.
    copy = sum(pinned_bytes(size) if on_cuda else size for size in model.staged)
    return RankMemory(
        model=model,
        offloaded=_offloaded_bytes(config.train, model) if on_cuda else 0,
        checkpoint_copy=copy if config.checkpoint.background else 0,
        copy_on_device=not on_cuda,
        similarity=estimate_similarity(configured_sizes(config, ranks)).total,
        keeps_activations=not config.train.gradient_cache,
    )


def configured_sizes(config: Config, ranks: int) -> SimilaritySizes:
    """Sizes of one loss of a run on `ranks` ranks, with the backend and device of this machine.

    Captions are taken to fill all word slots but one: long, and still padded.

    Raises:
        ValueError: The global batch does not fit the ranks, or a model folder cannot be used.
    """
    train = config.train
    micro_steps = accumulation_steps(train, ranks)
    texts = train.micro_batch * (micro_steps if train.gradient_cache else 1)
    words = config.data.max_words
    backend, _ = similarity_backend(config)
    sizes = SimilaritySizes(
        texts=texts,
        videos=texts * ranks,
        words=words,
        frames=config.data.num_frames * config.model.tokens_per_frame,
        width=embed_width(config.model),
        interaction=config.model.interaction,
        matching=config.model.matching,
        neighbour_frames=config.model.neighbour_frames,
        backend=backend,
        # Features are float32 in every precision, since they are normalised in float32.
        bytes_per_number=4,
        word_share=1 - 1 / (texts * words),
        device=device(),
        scores_per_tile=device_scores_per_tile(torch.device(device())),
    )
    return with_exchange(sizes, train.exchange, train.scores)


def free_bytes() -> int:
    """Free memory of this machine's device; a control group's limit counts on a CPU."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[0]
    return host_memory().available


def total_bytes() -> int:
    """Total memory of this machine's device; a control group's limit counts on a CPU."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[1]
    return host_memory().total


def _offloaded_bytes(train: TrainConfig, model: ModelBytes) -> int:
    if train.offload == "none":
        return 0
    # ZeRO keeps gradients beside the optimiser's states.
    optimiser = model.optimiser + model.gradients
    return optimiser if train.offload == "optimizer" else optimiser + model.weights
