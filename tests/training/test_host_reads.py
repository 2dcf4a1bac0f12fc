"""A training step reads its device once: after the last backward, before the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.host_reads import DEEPSPEED, host_reads
from builders.spawn import spawn
from builders.tiny import tiny_config
from builders.worlds import world_of
from torch import Tensor

from tvr.kernels import similarity
from tvr.kernels.backends import torch_tiles
from tvr.kernels.device_transfer import counted_reads
from tvr.trainer.config import Config
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.errors import NonFiniteLoss
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import Features, TextVideoModel, build_model
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.train_step import TrainStep

VARIANTS = [
    {"exchange": exchange, "scores": scores, "gradient_cache": cache}
    for exchange, scores, cache in product(("gather", "ring"), ("keep", "stream"), (False, True))
]
STAGES = (0, 2, 3)  # the variants have stage 1
Counts = tuple[dict[str, int], dict[str, int]]


def name_of(variant: dict[str, Any]) -> str:
    return f"{variant['exchange']} {variant['scores']} cache={variant['gradient_cache']}"


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Selects the backend of a GPU, with tiles of a few pairs."""
    patch.setattr(similarity, "unsupported_reason", lambda texts, videos: "as on a GPU")
    patch.setattr(torch_tiles, "SCORES_PER_TILE", 400)


def settings(data: Path, world_size: int, workers: int = 0, **train: Any) -> Config:
    """Two micro-batches of four pairs on each rank."""
    changes = {"global_batch": 8 * world_size, "micro_batch": 4, "steps": 2, **train}
    return tiny_config(data, data={"workers": workers}, train=changes)


def seeded_model(config: Config) -> TextVideoModel:
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    torch.manual_seed(3)
    return build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)


def train_step(config: Config, engine: Any, run_dir: Path, world: World) -> TrainStep:
    attempt = world.run_on_first(lambda: begin_attempt(run_dir))
    return TrainStep(config, engine, LogWriter(run_dir, attempt, world), world, {"": 48})


def reads_of_second_step(
    config: Config, engine: Any, run_dir: Path, world: World
) -> tuple[dict[str, int], dict[str, int]]:
    """The reads through `to_host`, and all others by place."""
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    step = train_step(config, engine, run_dir, world)
    batches = training_batches(config.data, config.model, config.train, tokenizer, world)
    step(1, batches)
    with counted_reads() as wrapped, host_reads() as others:
        step(2, batches)
    return dict(wrapped), dict(others)


def count_reads(rank: int, world_size: int, data: Path, run_dir: Path) -> dict[str, Counts]:
    """Reads of a step under DeepSpeed, by variant and ZeRO stage, in one start of the ranks."""
    world, results = world_of(rank, world_size), {}
    cases = [(name_of(variant), {"zero_stage": 1, **variant}) for variant in VARIANTS]
    cases += [(f"stage {stage}", {"zero_stage": stage}) for stage in STAGES]
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        for name, train in cases:
            config = settings(data, world_size, **train)
            engine = Engine(seeded_model(config), config.train, world)
            results[name] = reads_of_second_step(config, engine, run_dir, world)
    return results


@pytest.fixture(scope="module")
def counts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Counts]]:
    return spawn(count_reads, 2, data, tmp_path_factory.mktemp("run"), timeout_s=300)


@pytest.mark.parametrize("name", [name_of(variant) for variant in VARIANTS])
def test_a_step_reads_its_device_once(counts: list[dict[str, Counts]], name: str) -> None:
    for results in counts:
        wrapped, others = results[name]
        assert wrapped == {"step": 1}
        assert others.keys() <= {DEEPSPEED}, others


@pytest.mark.parametrize("stage", STAGES)
def test_so_it_is_at_every_zero_stage(counts: list[dict[str, Counts]], stage: int) -> None:
    for results in counts:
        wrapped, others = results[f"stage {stage}"]
        assert wrapped == {"step": 1}
        # DeepSpeed looks at the norm again, except at stage 0.
        assert set(others) == ({DEEPSPEED} if stage else set()), others


class PlainEngine:
    """What a step needs of `Engine`, in plain torch."""

    def __init__(self, model: TextVideoModel, micro_steps: int) -> None:
        self._model, self._micro_steps, self._done = model, micro_steps, 0
        self._parameters = [x for x in model.parameters() if x.requires_grad]
        fused = self._parameters[0].device.type == "cuda"
        self._optimizer = torch.optim.AdamW(self._parameters, fused=fused)

    def encode(self, *inputs: Tensor) -> Features:
        return self._model(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._micro_steps).backward()
        self._done += 1

    def gradient_norm(self) -> Tensor | None:
        if self._done < self._micro_steps:
            return None
        norms = [x.grad.norm() for x in self._parameters if x.grad is not None]
        return torch.stack(norms).norm()

    def step(self, learning_rate_factor: float) -> None:
        if self._done == self._micro_steps:
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._done = 0


@contextmanager
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("workers", [0, 1])
def test_on_a_gpu_torch_finds_no_synchronisation(
    data: Path, tmp_path: Path, variant: dict[str, Any], workers: int
) -> None:
    # The wait for the event of `to_host` is none to torch; every other one raises.
    world = World(rank=0, world_size=1, device=torch.device("cuda", torch.cuda.current_device()))
    config = settings(data, 1, workers, **variant)
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    engine = PlainEngine(seeded_model(config).to(world.device), 2)
    step = train_step(config, engine, tmp_path, world)
    batches = training_batches(config.data, config.model, config.train, tokenizer, world)
    step(1, batches)
    with counted_reads() as wrapped, no_synchronisation():
        record = step(2, batches)
    assert wrapped == {"step": 1}
    assert record.loss > 0


def test_the_same_step_on_a_cpu_reads_once(data: Path, tmp_path: Path) -> None:
    # Without DeepSpeed: shows that the gpu test above counts what it means to.
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        config = settings(data, 1, **VARIANTS[-1])
        engine = PlainEngine(seeded_model(config), 2)
        wrapped, others = reads_of_second_step(config, engine, tmp_path, world_of(0, 1))
    assert wrapped == {"step": 1}
    assert others == {}


def test_reads_are_found() -> None:
    x = torch.arange(4.0)
    actions = {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x[0] > 1),
        "float": lambda: float(x[1]),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 1],
        "unique": lambda: x.unique(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
    }
    for name, action in actions.items():
        with host_reads() as found:
            action()
        assert found.total() == 1, name
    with host_reads() as found:
        (x + 1).sum().sqrt()
    assert found.total() == 0


def flags(rank: int, world_size: int) -> list[Any]:
    """What the ranks agree on: no failure, a failure of rank 1, numbers."""
    # A tensor on `meta` has no values, so a flag on the rank's device could not be read.
    world = World(rank=rank, world_size=world_size, device=torch.device("meta"))
    outcomes: list[Any] = []
    for failing_ranks in ((), (1,)):

        def action(failing_ranks: tuple[int, ...] = failing_ranks) -> int:
            if rank in failing_ranks:
                raise KeyError(rank)
            return rank

        try:
            outcomes.append(world.run_on_all(action, KeyError))
        except KeyError as error:
            outcomes.append(error.args)
    return [*outcomes, world.all_gather_numbers([rank, 2**53])]


def test_flags_need_no_device() -> None:
    assert flags(0, 1) == [0, 0, [[0.0, 2.0**53]]]
    numbers = [[0.0, 2.0**53], [1.0, 2.0**53]]
    assert spawn(flags, 2) == [[0, (1,), numbers], [1, (1,), numbers]]


def test_a_loss_that_is_not_finite_is_named_and_changes_no_weight(
    data: Path, tmp_path: Path
) -> None:
    config, world = settings(data, 1), world_of(0, 1)
    model = seeded_model(config)
    engine = PlainEngine(model, 2)
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    batches = list(
        islice(training_batches(config.data, config.model, config.train, tokenizer, world), 2)
    )
    calls = []

    def encode_second_broken(*inputs: Tensor) -> Features:
        calls.append(inputs)
        features = model(*inputs)
        factor = float("nan") if len(calls) == 2 else 1.0
        return features._replace(frames=features.frames * factor)

    engine.encode = encode_second_broken
    before = [x.detach().clone() for x in model.parameters()]
    step = train_step(config, engine, tmp_path, world)
    with pytest.raises(NonFiniteLoss) as raised:
        step(1, iter(batches))
    message = str(raised.value)
    assert message.startswith("step 1: the loss is not finite on rank 0 of 1; this step changed no")
    assert message.endswith(f"Keys of rank 0's batch: {' '.join(batches[1].keys)}")
    assert all(map(torch.equal, before, model.parameters()))
