"""DeepSpeed's dictionary for a run, a pure function; what its defaults get wrong is said here."""

from __future__ import annotations

from typing import Any

from tvr.trainer.config import TrainConfig, accumulation_steps

STAGES_THAT_OFFLOAD = {"optimizer": (1, 2, 3), "parameters": (3,)}


def deepspeed_config(
    train: TrainConfig, world_size: int, *, universal: bool = False, pin_memory: bool = False
) -> dict[str, Any]:
    """DeepSpeed's dictionary; `universal`: it will load a universal checkpoint; `pin_memory`: a
    GPU copies from and to what is offloaded.

    Raises:
        ValueError: settings that DeepSpeed cannot serve together, or serves with other results;
            or batch sizes that do not fit together.
    """
    check_supported(train)
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(train, world_size),
        # Left out, it is 1.0 in this version; 0.0 turns clipping off.
        "gradient_clipping": train.gradient_clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": {
            "stage": train.zero_stage,
            # Its linear keeps other intermediates: bf16 at stage 3 would differ from stage 2.
            "memory_efficient_linear": False,
            **_offload(train, pin_memory),
        },
        # torch's own AdamW: exact at every stage, which DeepSpeed's are not to the last bit.
        "zero_allow_untested_optimizer": True,
        # Offloaded, DeepSpeed would refuse torch's; its own is compiled for minutes at first use.
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def check_supported(train: TrainConfig) -> None:
    """Settings that no number of ranks makes right.

    Raises:
        ValueError: naming them, and what works.
    """
    stage = train.zero_stage
    if train.precision == "bf16" and stage == 0:
        raise ValueError(
            "train.precision=bf16 needs train.zero_stage >= 1; at stage 0 DeepSpeed falls back to "
            "an unfused optimiser whose results differ"
        )
    allowed = STAGES_THAT_OFFLOAD.get(train.offload, (stage,))
    if stage not in allowed:
        raise ValueError(
            f"train.offload={train.offload} needs train.zero_stage "
            f"{' or '.join(map(str, allowed))}, which partition what is offloaded; it is {stage}"
        )
    if train.compile and stage == 3:
        raise ValueError(
            "train.compile=true does not work at train.zero_stage=3, whose hooks gather parameters"
            " as layers run; use stage 0, 1 or 2, or leave it off"
        )


def is_fused(train: TrainConfig, device: str) -> bool:
    """Whether torch's fused AdamW serves: on a GPU that holds the optimiser's state.

    On a CPU it rounds differently from the plain one (2e-7 after 10 steps), and the plain one is
    what runs are compared with.
    """
    return device == "cuda" and train.offload == "none"


def optimizer_line(train: TrainConfig, device: str) -> str:
    """Which optimiser serves, and why not the fused one."""
    if is_fused(train, device):
        return "optimiser: torch AdamW, fused"
    reason = "on a CPU the fused one rounds differently"
    if device == "cuda":
        reason = f"train.offload={train.offload} keeps its state on the CPU, where {reason[9:]}"
    return f"optimiser: torch AdamW, plain ({reason})"


def _offload(train: TrainConfig, pin_memory: bool) -> dict[str, Any]:
    if train.offload == "none":
        return {}
    host = {"device": "cpu", "pin_memory": pin_memory}
    if train.offload == "optimizer":
        return {"offload_optimizer": host}
    return {"offload_optimizer": host, "offload_param": host}
