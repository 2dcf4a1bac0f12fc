"""Memory of one optimiser step at a large batch: gradient cache and streamed scores, or default.

Runs the real engine, model, TPM-CL and loss on random clips and distinct captions, on two gloo
ranks by default. The modes must give the same loss and gradient norm. Memory is the sum over ranks
of each process's peak, libraries included.

Prints one line of JSON; 16,384 pairs take some minutes on 2 cores:
large_step.py > tests/benchmarks/results/large_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tvr.launchers.host_limits import host_cpus

WORDS, FRAMES, WIDTH, IMAGE = 8, 4, 64, 16
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "gradient cache": {"gradient_cache": True},
    "gradient cache, stream": {"gradient_cache": True, "scores": "stream"},
    "gradient cache, stream, ring": {
        "gradient_cache": True,
        "scores": "stream",
        "exchange": "ring",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16384, help="of the global batch")
    parser.add_argument("--micro-batch", type=int, default=512, help="under the gradient cache")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from tvr.launchers.rank_main import end_process

        work(options, Path(options.worker))
        end_process(0)
    found = {mode: launch(mode, options) for mode in options.modes}
    base = next(iter(found.values()))
    line = {
        "benchmark": "one optimiser step, att_wti, NegNCE (log), TPM-CL 4, float32",
        "sizes": {"words": WORDS, "frames": FRAMES, "width": WIDTH}
        | {name: getattr(options, name) for name in ("pairs", "micro_batch", "ranks")},
        "modes": found,
        "relative_to_first": {
            mode: {name: abs(one[name] / base[name] - 1) for name in ("loss", "gradient_norm")}
            for mode, one in found.items()
        },
        "versions": {name: version(name) for name in ("torch", "deepspeed", "tvr")},
        "cores": host_cpus().usable,
    }
    print(json.dumps(line))


def launch(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The step in one mode, by fresh processes."""
    from tvr.trainer.model.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(
            captions(512, 0), Path(folder, "tokenizer"), vocab_size=600, max_words=WORDS
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line = [*torchrun, f"--nproc-per-node={options.ranks}", __file__, "--worker", folder]
        line += [f"--pairs={options.pairs}", f"--micro-batch={options.micro_batch}"]
        threads = max(1, host_cpus().usable // options.ranks)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        with open(Path(folder, "log"), "w+") as log:
            line += ["--modes", mode]
            ended = subprocess.run(line, stdout=log, stderr=log, env=environment, check=False)
            if ended.returncode:
                log.seek(0)
                sys.exit(f"{mode}: exit code {ended.returncode}\n{log.read()[-4000:]}")
        print(f"{mode}: done", file=sys.stderr, flush=True)
        return json.loads(Path(folder, "answer").read_text())


def work(options: argparse.Namespace, folder: Path) -> None:
    """Runs one rank; rank 0 writes the step's record and every rank's memory."""
    import torch
    from tvr_bench.kernels_task import process_bytes

    from tvr.trainer.config import Config, DataConfig, ModelConfig, TowersConfig, TrainConfig
    from tvr.trainer.distributed.world import join_world
    from tvr.trainer.engine.engine import Engine
    from tvr.trainer.fencing import begin_attempt
    from tvr.trainer.model.model import build_model
    from tvr.trainer.model.tokenizer import load_tokenizer
    from tvr.trainer.monitoring.run_log import LogWriter
    from tvr.trainer.monitoring.step_record import log_event
    from tvr.trainer.train_step import TrainStep

    with join_world() as world:
        settings = MODES[options.modes[0]]
        of_rank = options.pairs // world.world_size
        config = Config(
            data=DataConfig(train="none", num_frames=FRAMES, max_words=WORDS),
            model=ModelConfig(
                tokenizer=str(folder / "tokenizer"),
                towers=TowersConfig(
                    width=32, layers=1, heads=2, embed_width=WIDTH, image_size=IMAGE, patch_size=8
                ),
            ),
            train=TrainConfig(
                steps=1,
                global_batch=options.pairs,
                micro_batch=options.micro_batch if "gradient_cache" in settings else of_rank,
                **settings,
            ),
        )
        tokenizer = load_tokenizer(str(folder / "tokenizer"), WORDS)
        torch.manual_seed(0)
        model = build_model(config.model, config.loss, tokenizer, num_frames=FRAMES)
        engine = Engine(model, config.train, world)
        attempt = world.run_on_first(lambda: begin_attempt(folder))
        log = LogWriter(folder, attempt, world)
        step = TrainStep(config, engine, log, world, {"": options.pairs})
        first = world.rank * of_rank
        size = config.train.micro_batch
        batches = (batch_of(at, size, tokenizer) for at in range(first, first + of_rank, size))
        idle = world.all_gather_objects(process_bytes("VmRSS"))
        record = log_event(step(1, batches))
        peaks = world.all_gather_objects(process_bytes("VmHWM"))
        if world.is_first:
            record |= {"peak_bytes": sum(peaks), "before_bytes": sum(idle)}
            (folder / "answer").write_text(json.dumps(record))


def batch_of(first: int, size: int, tokenizer: Any) -> Any:
    """Pairs first, first + 1, ... of the global batch, the same for every micro-batch size."""
    import torch

    from tvr.data_prep.records import Batch, Caption

    places = torch.arange(first, first + size)
    draws = [torch.Generator().manual_seed(place) for place in places.tolist()]
    shape = (FRAMES, 3, IMAGE, IMAGE)
    frames = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for draw in draws]
    texts = captions(size, first)
    token_ids, word_mask = tokenizer([Caption(text=text) for text in texts])
    return Batch(
        positions=places,
        keys=tuple(map(str, places.tolist())),
        video_ids=places,
        frames=torch.stack(frames),
        frame_mask=torch.ones(size, FRAMES, dtype=torch.long),
        captions=texts,
        caption_ids=places,
        token_ids=token_ids,
        word_mask=word_mask,
        caption_video=torch.arange(size),
    )


def captions(size: int, first: int) -> tuple[str, ...]:
    return tuple(f"{place:x} is shown" for place in range(first, first + size))


if __name__ == "__main__":
    main()
