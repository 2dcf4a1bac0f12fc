"""Part "step": training steps of the recipes' shapes, on one rank.

The model has random weights of CLIP's shapes, and the batch is noise: neither changes the work. One
rank does its share of the recipe's batch. Where DeepSpeed is missing, and once beside it, the
same model, objective and AdamW run in plain torch (`plain_step`).
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from gpu_kit.child import Recorder
from gpu_kit.host_reads import count_host_reads
from gpu_kit.plain_step import PlainStep
from gpu_kit.sizes import Sizes, sizes_of
from transformers import CLIPConfig, CLIPModel
from tvr_bench.kernels_task import process_bytes

from tvr.data_prep.records import Batch
from tvr.trainer.config import Config
from tvr.trainer.dry_run.synthetic_step import random_batches, single_rank_config
from tvr.trainer.memory.environment import similarity_line
from tvr.trainer.memory.rank_memory import rank_memory
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tvr.trainer.monitoring.flops import flops_per_pair, peak_flops
from tvr.trainer.recipes.recipes import recipe

RECIPE_RANKS = 4
WARM_UP_STEPS = 3
KINDS = ("deepspeed", "plain torch")
CAPTIONS = ("a dog runs in the snow", "a man plays the guitar", "two red squares move down")
Step = Callable[[int, Iterator[Batch]], object]


def training_steps(settings: dict[str, Any], recorder: Recorder) -> None:
    """Records one case for each recipe and kind of step."""
    sizes = sizes_of(settings)
    first, *others = sizes.recipes
    # The plain step of the first recipe shows what DeepSpeed adds.
    planned = [(first, "deepspeed"), (first, "plain torch"), *((x, "deepspeed") for x in others)]
    if (missing := _missing_package()) is not None:
        recorder.plan(f"{name}, deepspeed" for name, kind in planned if kind == "deepspeed")
        for name in sizes.recipes:
            recorder.not_run(f"{name}, deepspeed", f"no module {missing}")
        planned = [(name, "plain torch") for name in sizes.recipes]
    recorder.plan(f"{name}, {kind}" for name, kind in planned)
    took_s = 0.0
    for name, kind in planned:
        if recorder.left_s < took_s:
            return
        started = time.monotonic()
        try:
            values = _measure(name, kind, sizes, torch.device(settings["device"]))
        except torch.OutOfMemoryError as error:
            recorder.failed(f"{name}, {kind}", str(error).splitlines()[0])
        else:
            recorder.case(f"{name}, {kind}", **values)
        took_s = time.monotonic() - started


def _missing_package() -> str | None:
    """A package that the steps under DeepSpeed need, and that is not installed."""
    # Found, not imported: the engine prepares the import.
    if find_spec("deepspeed") is None:
        return "deepspeed"
    try:
        import_module("tvr.trainer.build_run")
    except ModuleNotFoundError as error:
        return error.name
    return None


def _measure(name: str, kind: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = _configured(name, folder / "clip", small=sizes.small_model)
        tokenizer = load_tokenizer(folder / "clip", config.data.max_words)
        # DeepSpeed may hold memory of an earlier case.
        gc.collect()
        on_gpu = device.type == "cuda"
        held = torch.cuda.memory_allocated() if on_gpu else process_bytes("VmRSS")
        step, flops, parameters = _build(kind, config, tokenizer, folder, device)
        # Batches are made before: a step must not wait for the random numbers.
        batches = cycle(
            list(islice(random_batches(config.data, config.model, config.train, tokenizer), 2))
        )
        done = 0
        for _ in range(WARM_UP_STEPS):
            done += 1
            step(done, batches)
        with count_host_reads(device.type) as reads:
            done += 1
            step(done, batches)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(sizes.steps):
            done += 1
            _synchronise(device)
            before = time.perf_counter()
            step(done, batches)
            _synchronise(device)
            times.append(time.perf_counter() - before)
        peak_memory = torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM")
        memory = peak_memory - held
        estimate = rank_memory(config, tokenizer, 1)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    rate, peak = (
        config.train.global_batch / median,
        peak_flops(config.metrics, config.train, device),
    )
    return {
        "engine": kind,
        "samples_per_s": rate,
        "step_ms": 1000 * median,
        "step_ms_quartiles": [1000 * lower, 1000 * upper],
        "pairs": config.train.global_batch,
        "frames": config.data.num_frames,
        "precision": config.train.precision,
        "parameters": parameters,
        "tflops_per_s": flops * rate / 1e12,
        "mfu": None if peak is None else flops * rate / peak,
        "peak_bytes": memory,
        "estimated_bytes": estimate.total,
        "peak_to_estimate": memory / estimate.total,
        "host_reads": reads.total(),
        "host_reads_at": dict(reads.most_common(12)),
        "similarity": similarity_line(config),
    }


def _build(
    kind: str, config: Config, tokenizer: Tokenizer, folder: Path, device: torch.device
) -> tuple[Step, float, int]:
    """The step, the operations of a pair, and the number of the model's parameters."""
    counted: list[tuple[float, int]] = []

    def inspect(model: TextVideoModel) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        counted.append((flops_per_pair(model, config, 1), parameters))

    if kind == "deepspeed":
        step = _deepspeed_step(config, tokenizer, folder, inspect)
    else:
        step = PlainStep(config, tokenizer, device, inspect)
    ((flops, parameters),) = counted
    return step, flops, parameters


def _deepspeed_step(
    config: Config,
    tokenizer: Tokenizer,
    folder: Path,
    inspect: Callable[[TextVideoModel], None],
) -> Step:
    from tvr.trainer.build_run import build_run
    from tvr.trainer.distributed.world import join_world
    from tvr.trainer.fencing import begin_attempt
    from tvr.trainer.monitoring.run_log import LogWriter

    with join_world() as world:
        attempt = begin_attempt(folder)
        run = build_run(
            config,
            folder,
            world,
            attempt=attempt,
            log=LogWriter(folder, attempt, world),
            tokenizer=tokenizer,
            num_samples={"": config.train.global_batch},
            inspect_model=inspect,
        )
        return run.train_step


def _configured(name: str, clip: Path, *, small: bool) -> Config:
    """One rank's share of the recipe, with a CLIP of its shapes and random weights."""
    config = single_rank_config(recipe(name), RECIPE_RANKS)
    patch = 16 if name.endswith("b16") else 32
    if small:
        data = replace(config.data, num_frames=3, max_words=8)
        train = replace(config.train, global_batch=4, micro_batch=4)
        config = replace(config, data=data, train=train)
    tokenizer = train_tokenizer(CAPTIONS, clip, vocab_size=560, max_words=config.data.max_words)
    # CLIPConfig's own values are those of ViT-B.
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    shape: dict[str, Any] = {"projection_dim": 16 if small else 512}
    vision: dict[str, Any] = {"patch_size": patch} | ({"image_size": 64} if small else {})
    text = layers | {"vocab_size": 560} if small else {}
    CLIPModel(
        CLIPConfig(
            text_config=ids | text | shape,
            vision_config=(layers if small else {}) | vision | shape,
            **shape,
        )
    ).save_pretrained(clip)
    model = replace(config.model, pretrained=str(clip))
    return replace(config, model=model)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
