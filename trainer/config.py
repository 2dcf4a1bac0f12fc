"""All settings of a run, in sections.

A recipe comes first, `--config FILE` overrides it, and flags override both. The result is resolved
once and written to `run_dir/config.json`. No setting is derived from another one: functions compute
derived numbers, such as accumulation steps, and commands print them.
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

from tvr.trainer.config_sections import (
    STRICT,
    DataConfig,
    NotNegative,
    Positive,
    Share,
    TrainConfig,
    TrainSetConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Freeze",
    "HeadPart",
    "InitPart",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "NotNegative",
    "Positive",
    "TowerPart",
    "TowersConfig",
    "TrainConfig",
    "TrainSetConfig",
    "WriterName",
    "accumulation_steps",
    "from_json",
    "masks_equal_captions",
    "merged",
    "merged_objects",
    "read_overrides",
    "to_json",
]

WriterName = Literal["tensorboard", "wandb", "mlflow"]
Freeze = NotNegative | Literal["text", "image", "both"]
TowerPart = Literal["text_tower", "image_tower"]
HeadPart = Literal[
    "sequence_header", "text_weight", "frame_weight", "word_predictor", "frame_predictor"
]
InitPart = TowerPart | HeadPart | Literal["towers", "heads"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TowersConfig:
    """Shape of CLIP towers that are trained from scratch; ignored with
    `model.pretrained`."""

    width: Positive = 128
    """Hidden width of both towers."""
    layers: Positive = 3
    """Transformer layers of each tower."""
    heads: Positive = 4
    """Attention heads of each layer."""
    embed_width: Positive = 128
    """Width D of the projected text and frame vectors."""
    image_size: Positive = 48
    """Side of the square frames, in pixels."""
    patch_size: Positive = 12
    """Side of an image patch, in pixels."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The two towers and the heads on top."""

    pretrained: str | None = None
    """Local folder with a pretrained CLIP or SigLIP in Hugging Face format.
    None: towers from scratch, as `towers` describes them."""
    tokenizer: str | None = None
    """Local folder with the tokeniser. None: the one in `pretrained`."""
    init_from: str | None = None
    """Run, or folder of `tvr export`, from whose weights a new run starts;
    its optimiser is not taken. RUN is the newest checkpoint of a run,
    RUN@best the best one, RUN@300 that of step 300. Weights must fit by
    names and shapes. None: towers as above, new heads."""
    init_parts: tuple[InitPart, ...] = ()
    """Parts that are taken from `init_from`; others start as without it.
    towers and heads stand for several parts. Nothing: the whole model."""
    towers: TowersConfig = TowersConfig()
    """Shape of towers from scratch."""
    freeze: Freeze = 0
    """Weights of the towers that are not trained: a number N freezes the
    embeddings and the bottom N layers of each tower; text, image or both
    freezes whole towers. 0: nothing."""
    lora_rank: NotNegative = 0
    """Rank of LoRA adapters on the towers' queries and values (alpha = 2 x
    rank); the towers' own weights are then frozen. 0: no LoRA. Needs the
    extra `lora`."""
    sequence_header_layers: NotNegative = 0
    """Transformer layers over the frames of a video, on top of the image
    tower. 0: frames are encoded independently."""
    unit_after_header: bool = True
    """Normalises frames to unit length after the sequence header, so that
    similarities are cosines. false: as in the authors' implementation."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    """Similarity of captions and videos. ti and wti compare the sentence
    with the frames; att_ti and att_wti also compare the words. wti and
    att_wti weight tokens by learned weights, ti and att_ti by plain
    means."""
    neighbour_frames: bool = True
    """Adds to each word's best frame the frame that is most similar to that
    frame."""
    weight_layers: Annotated[int, Field(ge=1, le=3)] = 1
    """Linear layers in the token-weight networks of wti and att_wti."""

    def __post_init__(self) -> None:
        if self.init_parts and self.init_from is None:
            raise ValueError(f"model.init_parts={self.init_parts} needs model.init_from")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The training objective."""

    similarity: Literal["info_nce", "neg_nce"] = "neg_nce"
    """Contrastive loss over the pairs of a batch."""
    neg_nce_mode: Literal["reference", "log"] = "log"
    """Form of NegNCE. reference: as in the authors' code. log: in log space,
    without a clamp, negatives normalised per row."""
    neg_nce_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty on hard negatives in NegNCE."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.01
    """Logits are similarity / temperature. It is constant, not learned."""
    mask_same_video: bool | None = None
    """Excludes pairs of the same video id from the negatives. None: on for
    neg_nce in log mode, otherwise off."""
    mask_equal_captions: bool | None = None
    """Excludes videos that have the caption of a pair from its negatives.
    Captions are equal but for case, white space and the final punctuation.
    None: on for neg_nce in log mode, otherwise off."""
    tpm_cl: Literal[0, 2, 3, 4] = 4
    """Type of TPM-CL, the loss on partially masked samples. 0: off. 2:
    margins 1 and 2. 3: margin 3. 4: all three margins."""
    tpm_cl_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of TPM-CL in the loss."""
    margin: Annotated[float, Field(ge=0.0)] = 0.6
    """Margin of the TPM-CL hinge."""
    mask_threshold: Share = 0.6
    """Share of the token weight that is removed from the partial samples of
    TPM-CL."""
    straight_through: bool = False
    """Passes a gradient to the frame-weight predictor of TPM-CL, which
    otherwise keeps its initial weights, as in the method."""
    normalise_partial: bool = False
    """Normalises the partial text vector of TPM-CL to unit length, as the
    whole one."""
    mask_padding_weights: bool = False
    """Gives padding words and frames no weight in the predictors of TPM-CL."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """All settings of a run."""

    data: DataConfig
    """Data sets and reading."""
    model: ModelConfig = ModelConfig()
    """Towers and heads."""
    loss: LossConfig = LossConfig()
    """Objective."""
    train: TrainConfig
    """Steps, batches, optimiser, memory."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics."""


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Returns the micro-steps per optimiser step, which is forwards of each rank per update.

    Raises:
        ValueError: the global batch is not a multiple of micro_batch x world_size.
    """
    per_micro_step = train.micro_batch * world_size
    if train.global_batch % per_micro_step:
        raise ValueError(
            f"train.global_batch={train.global_batch} must be a multiple of micro_batch x ranks = "
            f"{train.micro_batch} x {world_size} = {per_micro_step}; set either in the recipe or "
            "by --train.global-batch / --train.micro-batch"
        )
    return train.global_batch // per_micro_step


def masks_equal_captions(loss: LossConfig) -> bool:
    """True if videos with a pair's caption are no negatives of it."""
    if loss.mask_equal_captions is None:
        return loss.similarity == "neg_nce" and loss.neg_nce_mode == "log"
    return loss.mask_equal_captions


def to_json(config: Config) -> str:
    """Returns the configuration as JSON, from which `from_json` restores an equal one."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(text: str, *, where: str) -> Config:
    """Reads JSON that `to_json` wrote.

    Args:
        where: Source of the text, for error messages.

    Raises:
        ValueError: names `where`, the field and the allowed values.
    """
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_describe(error)}") from None


def merged(base: Config, overrides: Mapping[str, Any], *, where: str) -> Config:
    """Returns `base` with nested overrides applied.

    Args:
        where: Source of the overrides, for error messages.

    Raises:
        ValueError: names `where`, the field and the allowed values.
    """
    try:
        # Through JSON, so that the same strict types hold as in a file.
        text = json.dumps(merged_objects(asdict(base), overrides))
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_describe(error)}") from None


def read_overrides(path: Path) -> Mapping[str, Any]:
    """Reads the partial, nested settings of a JSON file.

    Raises:
        ValueError: the file is missing, or holds no JSON object.
    """
    try:
        overrides = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(overrides, dict):
        raise ValueError(f"--config {path}: holds {type(overrides).__name__}, not an object")
    return overrides


def merged_objects(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with the values of `overrides`; objects in both are merged in turn."""
    result = dict(base)
    for name, value in overrides.items():
        inner = result.get(name)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            result[name] = merged_objects(inner, value)
        else:
            result[name] = value
    return result


def _describe(error: pydantic.ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        # An error of a whole section names the values itself: `input` would be the section.
        is_plain = problem["type"] in ("missing", "value_error")
        given = "" if is_plain else f" (given: {problem.get('input')!r})"
        lines.append(f"{field}: {problem['msg']}{given}")
    return "; ".join(lines)
