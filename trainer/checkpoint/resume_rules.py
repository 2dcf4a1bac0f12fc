"""Which settings may change when a run resumes: one rule for every setting.

A resume compares its settings with those that its checkpoint records. README.md has the rules as
a table, which `rules_table` prints and a test compares. Ranks and nodes are no settings: their
number may change freely, with `train.micro_batch` x ranks as `change_of_pairs` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.config import Config, TrainConfig, from_json
from tvr.trainer.run_files import named_settings

Kind = Literal["free", "rounding", "place", "effect", "refused"]


@dataclass(frozen=True, slots=True)
class ResumeRule:
    """What becomes of a change of some settings."""

    kind: Kind
    names: tuple[str, ...]
    """Settings; NAME stands for the name of a training set."""
    text: str
    """How a change takes effect, or why it is refused."""


@dataclass(frozen=True, slots=True)
class SettingChange:
    """A setting whose value differs from that of the checkpoint."""

    name: str
    was: Any
    now: Any
    refused: str | None
    """Why the change cannot be made; None: it is accepted."""

    def __str__(self) -> str:
        reason = f" ({self.refused})" if self.refused else ""
        return f"{self.name} was {self.was!r}, is {self.now!r}{reason}"


def _group(kind: Kind, section: str, names: str, text: str) -> ResumeRule:
    return ResumeRule(kind, tuple(f"{section}.{name}" for name in names.split()), text)


# The order is that of the table in README.md.
GROUPS = (
    _group(
        "free",
        "data",
        "decoder workers cache_mib shard_cache shard_cache_gib max_bad train_sets.NAME.max_bad"
        " max_bad_in_a_row max_unavailable_in_a_row",
        "no result depends on it",
    ),
    _group(
        "free",
        "train",
        "eval_every log_every log_keys gc_every stall_factor stall_min_s timeout_s",
        "no result depends on it",
    ),
    _group(
        "free",
        "checkpoint",
        "every keep_last keep_every keep_best background",
        "no result depends on it",
    ),
    _group(
        "free",
        "metrics",
        "enabled endpoint address host port writers peak_tflops",
        "no result depends on it",
    ),
    _group(
        "rounding",
        "train",
        "zero_stage precision accumulation_dtype reduction_dtype overlap_comm offload"
        " activation_checkpointing compile exchange scores similarity_backend compile_similarity",
        "results agree to rounding",
    ),
    _group(
        "rounding",
        "train",
        "micro_batch gradient_cache",
        "results agree to rounding; the pairs of one loss must stay the same",
    ),
    _group(
        "rounding",
        "data",
        "features features_type",
        "results agree to rounding, with fp32 on a CPU to the bit; the folder must hold outputs of"
        " the run's own towers",
    ),
    _group(
        "place",
        "data",
        "train train_sets.NAME.url",
        "the same data set may lie at another place: shards and their order are compared",
    ),
    _group(
        "place",
        "data",
        "test test_exchanged",
        "as for training sets; a test set may also be added or left out",
    ),
    _group(
        "place",
        "model",
        "pretrained text_tower vision_tower tokenizer",
        "the same folder may lie at another place: its configuration and vocabulary are compared",
    ),
    _group(
        "place",
        "checkpoint",
        "url",
        "another place may be given if the run's newest checkpoint was moved or copied to it",
    ),
    _group(
        "effect",
        "train",
        "steps",
        "longer or shorter, but not below the checkpoint's step; the cosine of the new total holds"
        " from the next step on, so that a longer run's learning rate rises at once",
    ),
    _group("effect", "train", "warmup_steps", "the new schedule holds from the next step on"),
    _group(
        "effect",
        "train",
        "learning_rate encoder_learning_rate layer_decay",
        "new peak rates from the next step on; AdamW's moments stay",
    ),
    _group("effect", "train", "weight_decay beta1 beta2 gradient_clip", "from the next step on"),
    _group("effect", "train", "fast_similarity", "from the next step on"),
    _group(
        "effect",
        "data",
        "frame_sampling frame_spacing crop_scale word_drop",
        "from the next step on; the order of the samples stays",
    ),
    _group(
        "refused",
        "data",
        "num_frames max_words content_words",
        "the model's input; start a new run",
    ),
    _group(
        "refused",
        "data",
        "train_sets.NAME.weight hard_batches hard_group hard_every",
        "the order of the samples; start a new run",
    ),
    _group(
        "refused",
        "model",
        "towers.width towers.layers towers.heads towers.embed_width towers.image_size"
        " towers.patch_size freeze lora_rank sequence_header_layers unit_after_header"
        " tokens_per_frame interaction matching neighbour_frames weight_layers",
        "the model and its trained weights; start a new run",
    ),
    _group(
        "refused",
        "model",
        "init_from init_parts",
        "initial weights, which are read before the first step; start a new run",
    ),
    _group(
        "refused",
        "loss",
        "similarity neg_nce_mode neg_nce_weight temperature hardness drop_above sigmoid_bias"
        " mask_same_video mask_equal_captions"
        " tpm_cl tpm_cl_weight margin mask_threshold straight_through normalise_partial"
        " mask_padding_weights",
        "the loss; start a new run",
    ),
    _group("refused", "train", "global_batch seed", "the order of the samples; start a new run"),
    _group("refused", "train", "deepspeed", "DeepSpeed's own keys; start a new run"),
)
RULES: Mapping[str, ResumeRule] = MappingProxyType(
    {name: group for group in GROUPS for name in group.names}
)
KIND_TITLES: Mapping[Kind, str] = MappingProxyType(
    {
        "free": "may change",
        "rounding": "may change",
        "place": "may move",
        "effect": "may change, with effect",
        "refused": "refused",
    }
)
_SET = re.compile(r"(data\.train_sets)\.\w+\.(\w+)")


def rule_of(setting: str) -> ResumeRule:
    """The rule of a setting, by its full name.

    Raises:
        KeyError: no rule names it.
    """
    if setting.startswith("train.deepspeed."):
        setting = "train.deepspeed"
    return RULES[_SET.sub(r"\1.NAME.\2", setting)]


def rules_table() -> str:
    """The rules as the Markdown table of README.md."""
    lines = ["| settings | on resume | how, or why not |", "| --- | --- | --- |"]
    for group in GROUPS:
        names = ", ".join(f"`{name}`" for name in group.names)
        lines.append(f"| {names} | {KIND_TITLES[group.kind]} | {group.text} |")
    return "\n".join(lines) + "\n"


def settings_of(state: SavedState, stored: Config) -> Config:
    """The settings with which a checkpoint was saved.

    Args:
        stored: Settings in the run's folder, for a checkpoint of a release that recorded none.
    """
    try:
        return from_json(json.dumps(state.settings), where="") if state.settings else stored
    except ValueError:  # of a release with other settings
        return stored


def find_changes(
    state: SavedState, before: Config, now: Config, contents: Mapping[str, str], world_size: int
) -> list[SettingChange]:
    """Every setting that differs from the checkpoint's, with the reason if it is refused.

    Args:
        state: The checkpoint.
        before: Its settings, see `settings_of`.
        contents: Digests of what data sets and model folders hold now, by setting.
        world_size: Ranks that resume.
    """
    old, new = (dict(named_settings(asdict(settings))) for settings in (before, now))
    changes = []
    for name in [*old, *(name for name in new if name not in old)]:
        was, value = old.get(name), new.get(name)
        if rule_of(name).kind == "place" and name != "checkpoint.url":
            refused = _other_content(name, was, value, state.contents.get(name), contents.get(name))
            if was != value or refused:
                changes.append(SettingChange(name, was, value, refused))
        elif was != value:
            changes.append(SettingChange(name, was, value, _refusal(name, was, value, state)))
    return changes + _change_of_pairs(state, before.train, now.train, world_size)


def refusal_text(run_dir: str, changes: Sequence[SettingChange]) -> str | None:
    """The error that names all refused changes, and what to do; None if all are accepted."""
    refused = [change for change in changes if change.refused]
    if not refused:
        return None
    hint = "a new run in another folder starts from this one's weights with --model.init-from"
    return (
        f"{run_dir} holds a run of another configuration: {'; '.join(map(str, refused))}. Give the"
        f" settings it was started with; or {hint} {run_dir}"
        " (--model.init-parts names the parts that fit, if the new model has other ones)"
    )


def _refusal(name: str, was: Any, value: Any, state: SavedState) -> str | None:
    rule = rule_of(name)
    regroups = name == "train.layer_decay" or (
        name == "train.encoder_learning_rate" and bool(was) != bool(value)
    )
    if regroups and not state.settings:
        return "the checkpoint does not record its parameter groups; save one with the old value"
    if name == "train.steps" and value < state.step:
        return f"the checkpoint is of step {state.step}; give at least that"
    return rule.text if rule.kind == "refused" else None


def _other_content(
    name: str, was: str | None, now: str | None, old: str | None, new: str | None
) -> str | None:
    """Why what a setting names cannot take the place of what the checkpoint was trained with."""
    # Without a folder of its own, the tokeniser is in that of model.pretrained.
    has_vocabulary = name == "model.tokenizer" and old is not None and new is not None
    if (now is None or was is None) and not has_vocabulary:
        if was == now or name.startswith("data.test"):
            return None
        return "another one; start a new run"
    if old is None or new is None:
        # Equal places are taken as they are: earlier releases recorded no digest.
        if was == now:
            return None
        return "the checkpoint does not record what it held; give the old place, or link it there"
    if old == new:
        return None
    if name == "model.tokenizer":
        return "another vocabulary; start a new run"
    if name.startswith("data.test"):
        return "another test set, whose scores do not compare; `tvr evaluate --data` takes any"
    if was == now:
        return "its content has changed since the checkpoint; start a new run"
    return "it holds something else; start a new run"


def _change_of_pairs(
    state: SavedState, was: TrainConfig, now: TrainConfig, world_size: int
) -> list[SettingChange]:
    """The change of the pairs of one loss, if there is one; it would change the negatives."""
    pairs = [
        train.global_batch if train.gradient_cache else train.micro_batch * ranks
        for train, ranks in ((was, state.world_size), (now, world_size))
    ]
    if pairs[0] == pairs[1] or was.global_batch != now.global_batch:
        return []
    old, new = _pairs_text(was, state.world_size), _pairs_text(now, world_size)
    reason = "its negatives; give values with the same product"
    return [_PairsChange("the pairs of one loss", old, new, reason)]


class _PairsChange(SettingChange):
    """A change of the product of settings, whose text shows the factors."""

    def __str__(self) -> str:
        return (
            f"train.micro_batch x ranks, {self.name}, was {self.was}, is {self.now}"
            f" ({self.refused})"
        )


def _pairs_text(train: TrainConfig, ranks: int) -> str:
    if train.gradient_cache:
        return f"train.global_batch {train.global_batch} by train.gradient_cache"
    return f"{train.micro_batch} x {ranks} = {train.micro_batch * ranks}"
