"""Every setting of a run, in sections; each module receives its own section, never the whole.

Order of precedence: recipe, then `--config FILE`, then flags. The result is resolved once and
written to `run_dir/config.json`. Nothing here is derived from something else here: derived numbers
(accumulation steps, steps per epoch) are computed by one function each and printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.data_prep.reading.augment import Augmentation, FrameSampling
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.video.decoders import Decoder

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
WriterName = Literal["tensorboard", "wandb", "mlflow"]
Freeze = NotNegative | Literal["text", "image", "both"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Which data sets, and how samples are read."""

    train: str
    """Data set to train on: a folder or fsspec URL written by `tvr pack`."""
    test: str | None = None
    """Data set for evaluation; none: no evaluation."""
    test_exchanged: str | None = None
    """Counterpart of `test` with the same keys in the same order, each clip differing from its
    namesake in what binds to what; gives the binding accuracy."""
    num_frames: Positive = 12
    """Frames per video."""
    max_words: Annotated[int, Field(ge=3)] = 32
    """Word slots per caption, start and end tokens included; longer captions are cut."""
    frame_sampling: FrameSampling = "centre"
    """Which frame of each of the equal segments of a clip: the middle one or, in training, one
    drawn anew each time. Of stored frames there must be more than `num_frames` to choose from."""
    crop_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """In training, least area of a random crop, as a share of the largest square's; CLIP is
    fine-tuned with 0.9. 1: the square at the centre, as in evaluation."""
    decoder: Decoder = "pyav"
    """Decodes data sets of the video layout; torchcodec is an extra and needs FFmpeg's libraries.
    The frames are the same."""
    word_drop: bool = False
    """In training, leaves out some of a caption's fillers, drawn anew each time (the method's
    caption augmentation)."""
    content_words: bool = False
    """Nouns, adjectives and full verbs count twice among a caption's words, in training and
    evaluation (the method's `twm`)."""
    workers: NotNegative = 2
    """Loader processes per rank; the samples and their order do not depend on it."""
    cache_mib: NotNegative = 0
    """Memory per loader process that keeps decoded samples, for small data sets; 0: none."""
    shard_cache: str | None = None
    """Local folder in which the ranks of a node keep shards of remote data sets; none: samples are
    read from the store one by one."""
    shard_cache_gib: Positive = 100
    """Most that this folder holds; what was used least recently goes first. At twice the size of
    16 shards, the next shards of the order are fetched while the present ones are read."""
    max_bad: NotNegative = 100
    """Different bad samples that a run replaces before it stops, on all ranks and over restarts."""
    max_bad_in_a_row: Positive = 20
    """The same for those that a rank meets with no good one between them."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TowersConfig:
    """Shape of CLIP towers that start from scratch; unused with `model.pretrained`."""

    width: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    embed_width: Positive = 128
    image_size: Positive = 48
    patch_size: Positive = 12


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The two towers and the heads on top."""

    pretrained: str | None = None
    """Local folder with a pretrained CLIP or SigLIP in Hugging Face format; none: start from
    `towers`."""
    tokenizer: str | None = None
    """Local tokeniser folder; none: the one in `pretrained`."""
    towers: TowersConfig = TowersConfig()
    freeze: Freeze = 0
    """What of the towers keeps its weights: this many of the bottom layers of each, and the
    embeddings below them; or a whole tower, or both."""
    lora_rank: NotNegative = 0
    """Trains additions of this rank to the towers' queries and values (LoRA, alpha = 2 x rank), and
    none of their own weights; 0: none. Needs the extra `lora`."""
    sequence_header_layers: NotNegative = 0
    """Temporal transformer blocks over the frames of a video; 0: frames go on as they are."""
    unit_after_header: bool = True
    """Frames get unit length again after the header, so that similarities are made of
    cosines; false: as the authors' implementation."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    """What meets the frames: the sentence (ti, wti) or sentence and words (att_*); with learned
    token weights (*wti) or plain means (*ti)."""
    neighbour_frames: bool = True
    """Adds to each word's best frame the frame most similar to that one."""
    weight_layers: Annotated[int, Field(ge=1, le=3)] = 1
    """Linear layers in the token-weight networks of the wti family."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossConfig:
    """What is minimised."""

    similarity: Literal["info_nce", "neg_nce"] = "neg_nce"
    neg_nce_mode: Literal["reference", "log"] = "log"
    """`reference`: as the authors wrote it; `log`: no clamp, negatives normalised per row."""
    neg_nce_weight: Annotated[float, Field(ge=0.0)] = 0.5
    temperature: Annotated[float, Field(gt=0.0)] = 0.01
    """Logits are similarity / temperature; the method keeps it constant."""
    mask_same_video: bool | None = None
    """Pairs of one video id never count as negatives; none: on for neg_nce in log mode only."""
    tpm_cl: Annotated[int, Field(ge=0, le=4)] = 4
    """TPM-CL type: 0 off, 1 computed without effect, 2 margins 1 + 2, 3 margin 3, 4 all three."""
    tpm_cl_weight: Annotated[float, Field(ge=0.0)] = 1.0
    margin: Annotated[float, Field(ge=0.0)] = 0.6
    mask_threshold: Share = 0.6
    """Share of the token weight that the partial samples lose."""
    straight_through: bool = False
    """Lets a gradient reach the frame-weight predictor, which the method leaves at its start."""
    normalise_partial: bool = False
    """Unit length for the partial text vector, as the whole one has."""
    mask_padding_weights: bool = False
    """Padding words and frames get no predictor weight."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """Steps, batch sizes, optimiser, and when to evaluate and save."""

    steps: Positive
    """Optimiser steps in all."""
    global_batch: Positive
    """Pairs per optimiser step, all ranks together."""
    micro_batch: Positive
    """Pairs per rank per forward. Negatives come from the micro-batches of all ranks; accumulation
    (global_batch / (micro_batch x ranks) micro-steps) averages gradients and adds no negatives,
    unless `gradient_cache` is on."""
    gradient_cache: bool = False
    """Negatives come from the whole global batch, `micro_batch` is only the number of pairs encoded
    at once: micro-batches are encoded without graph, the loss is that of all of them, and each is
    encoded again for its gradient. Use it where the batch that the loss needs does not fit an
    encoder's memory; it costs a second forward, and all micro-batches' decoded frames in host
    memory."""
    exchange: Literal["gather", "ring"] = "gather"
    """How the frames of all ranks meet this rank's texts: gathered, or passed around one rank's at
    a time. Use `ring` where the gathered frames, global_batch x F x D numbers, do not fit."""
    scores: Literal["keep", "stream"] = "keep"
    """Keep the similarities of this rank's texts with all videos from forward to backward, or
    compute them again tile by tile. Use `stream` where that table does not fit; it costs the
    similarity's forward several times."""
    fast_similarity: bool = False
    """In training, round words and frames to bfloat16 where they meet: faster, and logits are off
    by up to 0.2 at temperature 0.01 (0.01 on a GPU). Evaluation stays exact."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak rate of the heads."""
    encoder_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-7
    """Peak rate of the two towers."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of that rate for each layer further down: what is above a tower's layers has the whole
    rate, its top layer the rate x layer_decay, its embeddings the least."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up; a cosine to zero follows."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    """Decay of weight matrices; biases and norms never decay."""
    beta1: Share = 0.9
    beta2: Share = 0.98
    gradient_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep the optimiser's state in host memory (ZeRO 1 to 3) or weights as well (ZeRO 3), and
    update there: for models that do not fit a GPU otherwise; slower."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the towers' layers for the backward, which computes the rest again:
    less memory, a second forward of the towers."""
    compile: bool = False
    """Compile the towers' layers with torch.compile (ZeRO 0 to 2): the first step of each shape
    takes long, later ones less; results agree to rounding. What torch compiled it keeps in a
    folder, TORCHINDUCTOR_CACHE_DIR, for later starts."""
    seed: NotNegative = 0
    eval_every: NotNegative = 0
    """Steps between evaluations; 0: only at the end."""
    log_every: Positive = 1
    """Steps between lines in the log."""
    log_keys: bool = False
    """Also writes every rank's sample keys, step by step, to run_dir/keys."""
    stall_factor: Annotated[float, Field(ge=0.0)] = 20.0
    """A rank that takes so many times the median step, and over a minute, ends the job, which names
    the ranks that the others waited for; 0: never."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """The longest that a step, an evaluation or a save may take in any case, and that ranks wait
    for each other."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """Where checkpoints go, how often, and which of them stay."""

    url: str | None = None
    """Folder or fsspec URL, of this run alone; none: run_dir/checkpoints."""
    every: NotNegative = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Positive = 2
    """The newest ones that stay."""
    keep_every: NotNegative = 0
    """Those of every so many steps stay, too; 0: none."""
    keep_best: bool = True
    """The one whose evaluation has the highest mean of R@1 both ways stays, too."""
    background: bool = True
    """Write while training goes on: a step waits for a copy in host memory, whose size is the
    rank's part of weights and optimiser, and not for the disk. Off: it waits for all and needs no
    copy; so it is, with a warning and a word in the log, where a copy does not fit."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MetricsConfig:
    """What Prometheus finds while the run goes on; last values also go to run_dir/metrics."""

    enabled: bool = True
    """Off: no metrics at all."""
    endpoint: Literal["node", "rank", "none"] = "node"
    """Where: one HTTP endpoint for all ranks of a node, or one for each rank. Its address is in
    run_dir/metrics/HOST.json, a file for Prometheus's file_sd."""
    address: str = "0.0.0.0"
    """Of the network interface that serves it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of the endpoint, with `rank` of a node's first; 0: any that is free."""
    writers: tuple[WriterName, ...] = ()
    """Tools that get the log, too, in run_dir: each needs the extra of its name."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """What a rank's device can do at most, for MFU; none: as its vendor says, if it is known."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """A whole run."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-steps per optimiser step: encoder forwards of each rank for one update of the weights.

    Raises:
        ValueError: if the global batch is not a whole number of micro-batches on all ranks.
    """
    per_micro_step = train.micro_batch * world_size
    if train.global_batch % per_micro_step:
        raise ValueError(
            f"train.global_batch={train.global_batch} must be a multiple of micro_batch x ranks = "
            f"{train.micro_batch} x {world_size} = {per_micro_step}; set either in the recipe or "
            "by --train.global-batch / --train.micro-batch"
        )
    return train.global_batch // per_micro_step


def shard_cache(data: DataConfig) -> CacheFolder | None:
    """The folder that keeps shards of remote data sets on this node."""
    if data.shard_cache is None:
        return None
    return CacheFolder(path=data.shard_cache, max_bytes=data.shard_cache_gib << 30)


def augmentation(data: DataConfig) -> Augmentation:
    """What training draws anew each time a sample is seen."""
    return Augmentation(frame_sampling=data.frame_sampling, crop_scale=data.crop_scale)


def to_json(config: Config) -> str:
    """The resolved configuration as JSON; `from_json` gives an equal one back."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(text: str, *, where: str) -> Config:
    """Reads what `to_json` wrote.

    Raises:
        ValueError: naming `where`, the field and what is allowed.
    """
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_named(error)}") from None


def merged(base: Config, overrides: Mapping[str, Any], *, where: str) -> Config:
    """`base` with the nested `overrides` of a configuration file laid over it."""
    try:
        # As JSON, where a number is no string and a section is an object.
        text = json.dumps(_overlay(asdict(base), overrides))
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_named(error)}") from None


def read_overrides(path: Path) -> Mapping[str, Any]:
    """The (partial, nested) settings of a JSON file."""
    try:
        overrides = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(overrides, dict):
        raise ValueError(f"--config {path}: holds {type(overrides).__name__}, not an object")
    return overrides


def _overlay(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in overrides.items():
        inner = result.get(name)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            result[name] = _overlay(inner, value)
        else:
            result[name] = value
    return result


def _named(error: pydantic.ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] == "missing" else f" (given: {problem.get('input')!r})"
        lines.append(f"{field}: {problem['msg']}{given}")
    return "; ".join(lines)
