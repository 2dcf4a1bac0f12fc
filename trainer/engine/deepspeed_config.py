"""DeepSpeed's configuration as a pure function of ours, with the reason for each departure."""

from __future__ import annotations

import json
from typing import Any

from tvr.trainer.config import TrainConfig, accumulation_steps
from tvr.trainer.engine.user_keys import merge_user_keys

# Numbers in a bucket of gradients that is summed over ranks beside the backward.
OVERLAP_BUCKET = 50_000_000
OFFLOAD_STAGES = {"optimizer": (1, 2, 3), "parameters": (3,)}


def deepspeed_config(
    train: TrainConfig, world_size: int, *, universal: bool = False, on_gpu: bool = False
) -> dict[str, Any]:
    """Builds DeepSpeed's configuration dictionary.

    Args:
        universal: The engine will load a universal checkpoint.
        on_gpu: The ranks train on GPUs. Host memory of offloaded state is then pinned, and
            gradients are summed over ranks beside the backward.

    Raises:
        ValueError: DeepSpeed does not support the settings together, or gives other results with
            them; or the batch sizes do not fit together; or `train.deepspeed` sets a key of ours.
    """
    check_supported(train)
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(train, world_size),
        # DeepSpeed's default is 1.0; 0.0 turns clipping off.
        "gradient_clipping": train.gradient_clip,
        **_precision(train),
        "zero_optimization": {
            "stage": train.zero_stage,
            # DeepSpeed's linear layer saves other intermediates: bf16 at stage 3 would differ from
            # stage 2.
            "memory_efficient_linear": False,
            **_overlap(train, on_gpu),
            **_offload(train, on_gpu),
        },
        # torch's AdamW gives the same bits at every stage; DeepSpeed's optimisers do not.
        "zero_allow_untested_optimizer": True,
        # With offload, DeepSpeed would insist on its own optimiser, which compiles for minutes.
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    settings = merge_user_keys(ours, train.deepspeed)
    if has_own_optimizer(train):
        optimizer = settings["optimizer"]
        parameters = {"betas": [train.beta1, train.beta2], **optimizer.get("params", {})}
        settings["optimizer"] = {**optimizer, "params": parameters}
    return settings


def has_own_optimizer(train: TrainConfig) -> bool:
    """Whether `train.deepspeed` names an optimiser of DeepSpeed instead of torch's AdamW."""
    return "optimizer" in train.deepspeed


def _own_optimizer(train: TrainConfig) -> str:
    """Name of the optimiser in `train.deepspeed`, "" if there is none."""
    return str(train.deepspeed.get("optimizer", {}).get("type", ""))


def optimizer_builders(train: TrainConfig) -> tuple[str, ...]:
    """Names of DeepSpeed's builders of the extensions that its own optimiser may load."""
    name = _own_optimizer(train).lower()
    # Muon updates parameters that are no matrices with Adam.
    name = {"adamw": "adam", "muon": "adam"}.get(name, name)
    if name not in ("adam", "adagrad", "lamb", "lion"):
        return ()
    kinds = ("Fused",) if train.offload == "none" else ("Fused", "CPU")
    return tuple(f"{kind}{name.capitalize()}Builder" for kind in kinds)


def deepspeed_line(train: TrainConfig, world_size: int) -> str:
    """Describes DeepSpeed's whole configuration in one line, or the reason why it is refused."""
    try:
        return f"DeepSpeed, {world_size} rank(s): {json.dumps(deepspeed_config(train, world_size))}"
    except ValueError as error:
        return f"DeepSpeed: refused: {error}"


def check_supported(train: TrainConfig) -> None:
    """Refuses settings that cannot work on any number of ranks.

    Raises:
        ValueError: names the settings and the values that work.
    """
    stage = train.zero_stage
    if train.precision == "bf16" and stage == 0:
        raise ValueError(
            "train.precision=bf16 needs train.zero_stage >= 1; at stage 0 DeepSpeed falls back to "
            "an unfused optimiser whose results differ"
        )
    if train.precision == "fp32":
        for name in ("accumulation_dtype", "reduction_dtype"):
            if getattr(train, name) != "fp32":
                raise ValueError(
                    f"train.{name}={getattr(train, name)} needs train.precision=bf16; it is fp32"
                )
    elif train.accumulation_dtype == "fp32" and _own_optimizer(train).lower() == "muon":
        raise ValueError(
            "DeepSpeed's Muon does not take float32 gradients of a bf16 model; set"
            " train.accumulation_dtype=bf16 or train.precision=fp32"
        )
    allowed = OFFLOAD_STAGES.get(train.offload, (stage,))
    if stage not in allowed:
        raise ValueError(
            f"train.offload={train.offload} needs train.zero_stage "
            f"{' or '.join(map(str, allowed))}, which partitions the offloaded state; it is {stage}"
        )
    if train.compile and stage == 3:
        raise ValueError(
            "train.compile=true does not work at train.zero_stage=3, because its hooks gather"
            " parameters inside the layers; use stage 0, 1 or 2, or turn it off"
        )


def state_layout(train: TrainConfig) -> str:
    """Names the layout of the files that the engine saves; only equal layouts load directly."""
    if _is_bf16_optimizer(train):
        return "bf16 with fp32 gradients"
    return train.precision


def whole_gradient_bytes(train: TrainConfig) -> int:
    """Bytes per trained number of the gradient on a rank; ZeRO 2 and 3 divide them by the ranks."""
    if train.precision == "fp32" or train.accumulation_dtype == "fp32":
        return 4
    return 2


def is_fused(train: TrainConfig, device: str) -> bool:
    """True if the run uses torch's fused AdamW: on a GPU that holds the optimiser's state.

    On a CPU the fused AdamW rounds differently from the plain one (2e-7 after 10 steps), which is
    the reference that runs are compared with.
    """
    return device == "cuda" and train.offload == "none"


def optimizer_line(train: TrainConfig, device: str) -> str:
    """Describes the optimiser in one line, with the reason if it is not the fused one."""
    if has_own_optimizer(train):
        return f"optimiser: DeepSpeed's {_own_optimizer(train)} (train.deepspeed)"
    if is_fused(train, device):
        return "optimiser: torch AdamW, fused"
    reason = "on a CPU the fused one rounds differently"
    if device == "cuda":
        reason = f"train.offload={train.offload} keeps its state on the CPU, where {reason[9:]}"
    return f"optimiser: torch AdamW, plain ({reason})"


def _is_bf16_optimizer(train: TrainConfig) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which partitions no gradients."""
    fp32_sums = train.precision == "bf16" and train.accumulation_dtype == "fp32"
    return fp32_sums and train.zero_stage == 1 and train.offload == "none"


def _precision(train: TrainConfig) -> dict[str, Any]:
    if train.precision == "fp32":
        return {"bf16": {"enabled": False}}
    return {
        "bf16": {
            "enabled": True,
            # BF16_Optimizer then frees each bf16 gradient as soon as it is added to the fp32 sum.
            "immediate_grad_update": _is_bf16_optimizer(train),
        },
        # DeepSpeed's default for both is the model's precision, in which small terms vanish.
        "data_types": {"grad_accum_dtype": train.accumulation_dtype},
        "communication_data_type": train.reduction_dtype,
    }


def _overlap(train: TrainConfig, on_gpu: bool) -> dict[str, Any]:
    """Sums of gradients on a stream of their own, beside the backward."""
    if not train.overlap_comm:
        return {"overlap_comm": False}
    if not on_gpu or train.zero_stage < 2 or train.offload != "none":
        # A CPU has no streams. Below stage 2 the sums come after the last backward. Offload is for
        # full GPUs, which have no memory for two buckets.
        return {}
    # DeepSpeed's default bucket holds more numbers than most models, so that nothing would
    # overlap; and it allocates two.
    return {"overlap_comm": True, "reduce_bucket_size": OVERLAP_BUCKET}


def _offload(train: TrainConfig, pin_memory: bool) -> dict[str, Any]:
    if train.offload == "none":
        return {}
    host = {"device": "cpu", "pin_memory": pin_memory}
    if train.offload == "optimizer":
        return {"offload_optimizer": host}
    return {"offload_optimizer": host, "offload_param": host}
