"""Keys of DeepSpeed's configuration that the user adds to ours (`train.deepspeed`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tvr.trainer.config import merged_objects

# Setting that controls a key and all keys below it.
CONTROLLED_BY: dict[str, str] = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.gradient_clip",
    "bf16.enabled": "train.precision",
    "bf16.immediate_grad_update": "train.accumulation_dtype",
    "fp16": "train.precision, which has no fp16",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.accumulation_dtype",
    "communication_data_type": "train.reduction_dtype",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.overlap_comm": "train.overlap_comm",
    "zero_optimization.offload_optimizer": "train.offload",
    "zero_optimization.offload_param": "train.offload",
    "zero_optimization.cpu_offload": "train.offload",
    "zero_optimization.cpu_offload_param": "train.offload",
    "scheduler": "train.warmup_steps and train.steps",
    "optimizer.params.lr": "train.learning_rate and train.encoder_learning_rate",
    "optimizer.params.muon_lr": "train.learning_rate and train.encoder_learning_rate",
    "optimizer.params.adam_lr": "train.learning_rate and train.encoder_learning_rate",
    "optimizer.params.weight_decay": "train.weight_decay",
    "optimizer.params.betas": "train.beta1 and train.beta2",
    "checkpoint": "the section checkpoint",
}
# Keys that no setting controls, because only our values give the results that tests hold.
FIXED = (
    "zero_optimization.memory_efficient_linear",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "managed_gradient_accumulation",
)


def merge_user_keys(ours: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our configuration with the user's keys; neither argument changes.

    Raises:
        ValueError: a key is set by a setting of ours, or is "auto"; names the key and the setting.
    """
    for key, value in _leaves(added):
        setting = next((name for name in _prefixes(key) if name in CONTROLLED_BY), None)
        if setting is not None:
            raise ValueError(
                f"train.deepspeed sets {key}, which {CONTROLLED_BY[setting]} controls: set that,"
                f" and remove {key}"
            )
        if any(name in FIXED for name in _prefixes(key)):
            raise ValueError(f"train.deepspeed sets {key}, which must keep tvr's value: remove it")
        if value == "auto":
            raise ValueError(
                f'train.deepspeed sets {key} to "auto". Hugging Face\'s Trainer replaces'
                " that word, and DeepSpeed does not know it: give a value, or remove the key, and"
                " DeepSpeed's default holds"
            )
    return merged_objects(ours, added)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))
