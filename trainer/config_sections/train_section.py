"""The section `train`: steps, batch sizes, optimiser, memory and intervals.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.trainer.config_sections.field_types import (
    STRICT,
    JsonObject,
    NotNegative,
    Positive,
    Share,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Steps, batch sizes, optimiser, memory, and intervals."""

    steps: Positive
    """Optimiser steps of the whole run."""
    global_batch: Positive
    """Pairs per optimiser step, over all ranks."""
    micro_batch: Positive
    """Pairs per rank and forward. The negatives of a loss come from the
    micro-batches of all ranks. With global_batch > micro_batch x ranks,
    gradients are averaged over several micro-steps, which adds no
    negatives unless `gradient_cache` is on."""
    gradient_cache: bool = False
    """Computes one loss over the whole global batch, of which each rank
    encodes `micro_batch` pairs at a time: micro-batches are encoded
    without a graph, the loss and its gradient at the features are
    computed, and each micro-batch is encoded again for the backward. Use
    it for batches whose activations do not fit. It costs a second
    forward, and host memory for the frames of all micro-batches."""
    exchange: Literal["gather", "ring"] = "gather"
    """How a rank gets the frames of all ranks for its texts. gather: all at
    once. ring: one rank's at a time. Use ring if the gathered frames,
    global_batch x F x D numbers, do not fit."""
    scores: Literal["keep", "stream"] = "keep"
    """keep: the similarities of this rank's texts with all videos stay in
    memory from forward to backward. stream: they are recomputed tile by
    tile. Use stream if that table does not fit; it computes the
    similarity several times."""
    fast_similarity: bool = False
    """In training, rounds words and frames to bfloat16 in the similarity.
    Faster, with an error of up to 0.2 in the logits at temperature 0.01
    (0.01 on a GPU). Evaluation stays exact."""
    similarity_backend: Literal["auto", "compiled", "torch", "dense"] = "auto"
    """Kernels of the similarity in training. compiled: C++, CPU only.
    torch: sparse row sums in the backward. dense: matrix products in the
    backward, for tensor cores. auto: dense on a GPU; on a CPU compiled,
    or torch without a C++ compiler. All give the same result up to
    rounding."""
    compile_similarity: bool = False
    """Compiles the tiles of the dense backend with torch.compile; the other
    backends have nothing to compile."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of the heads."""
    encoder_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-7
    """Peak learning rate of the towers."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the towers' learning rate per layer from top to bottom: the
    top layer has encoder_learning_rate x layer_decay, the embeddings have
    the lowest rate. Parameters above the layers keep
    encoder_learning_rate."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up. A cosine to zero follows."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    """Weight decay of matrices. Biases and norms have none."""
    beta1: Share = 0.9
    """AdamW's decay rate of the gradient's mean."""
    beta2: Share = 0.98
    """AdamW's decay rate of the squared gradient's mean."""
    gradient_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the whole gradient. 0: no clipping."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage of DeepSpeed. 0: nothing is partitioned. 1: optimiser
    state. 2: also gradients. 3: also weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model's weights, activations and gradients. bf16
    needs ZeRO stage 1 to 3; master weights, similarity and loss stay in
    fp32."""
    accumulation_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over micro-steps. bf16 needs
    train.precision bf16; it saves memory, and its rounding error grows
    with the number of micro-steps."""
    reduction_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks. bf16 needs
    train.precision bf16; it halves the traffic, and its rounding error
    grows with the number of ranks."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State kept and updated in host memory, for models that do not fit a
    GPU; slower. optimizer: its state (ZeRO 1 to 3). parameters: also the
    weights (ZeRO 3)."""
    overlap_comm: bool = True
    """On GPUs at ZeRO 2 and 3 without offload, sums gradients over ranks
    while the backward still runs."""
    deepspeed: JsonObject = Field(default_factory=dict)
    """More keys of DeepSpeed's configuration, as a JSON object. Keys that
    other settings control are refused by name."""
    activation_checkpointing: bool = False
    """Recomputes the towers' layers in the backward instead of keeping their
    activations. Less memory, a second forward of the towers."""
    compile: bool = False
    """Compiles the towers' layers with torch.compile (ZeRO 0 to 2). The
    first step of each shape is slow, later ones are faster; results agree
    to rounding. torch caches compiled code in TORCHINDUCTOR_CACHE_DIR."""
    gc_every: NotNegative = 50
    """Steps between runs of Python's garbage collector, at the same step on
    all ranks. It would otherwise start at random, each time on another
    rank, and the others wait. 0: Python decides."""
    seed: NotNegative = 0
    """Seed of weights, dropout and sample order."""
    eval_every: NotNegative = 0
    """Steps between evaluations. 0: only after the last step."""
    log_every: Positive = 1
    """Steps between lines of the log."""
    log_keys: bool = False
    """Writes each rank's sample keys of every step to run_dir/keys."""
    stall_factor: Annotated[float, Field(ge=0.0)] = 20.0
    """Ends the job if a rank makes no progress for this factor x the median
    step, and at least `stall_min_s`; the error names the ranks at fault.
    0: never."""
    stall_min_s: Annotated[float, Field(gt=0.0)] = 300.0
    """Shortest stall in seconds that ends the job, so that a pause of a
    shared file system does not."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """Longest time in seconds for a step, an evaluation or a save, and for a
    rank to wait for the others."""
