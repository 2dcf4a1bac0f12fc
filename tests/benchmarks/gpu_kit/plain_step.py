"""A training step without DeepSpeed: the model, its objective, and AdamW, in plain torch.

As ZeRO-1 on one rank does, it keeps float32 weights beside the model's bfloat16 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.records import Batch
from tvr.kernels.device_transfer import to_device, to_host
from tvr.kernels.text_lengths import host_lengths
from tvr.trainer.config import Config
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.objective import objective
from tvr.trainer.model.batch_copies import BatchCopies
from tvr.trainer.model.model import TextVideoModel, build_model
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import Tokenizer


class PlainStep:
    """Runs one optimiser step on the next batch."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        device: torch.device,
        inspect: Callable[[TextVideoModel], None],
    ) -> None:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        inspect(model)
        self._config = config
        self._world = World(rank=0, world_size=1, device=device)
        self._copies = BatchCopies()
        low = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self._model = model.to(device, low)
        self._weights: list[Tensor] = []
        self._masters: list[Tensor] = []
        groups: list[dict[str, Any]] = []
        for group in parameter_groups(model, config.train):
            weights: Any = group["params"]
            masters = [w.detach().float().clone() for w in weights]
            groups.append({**group, "params": masters, "lr": group["peak"]})
            self._weights += weights
            self._masters += masters
        train = config.train
        self._optimizer = torch.optim.AdamW(
            groups, betas=(train.beta1, train.beta2), fused=device.type == "cuda"
        )

    def __call__(self, number: int, batches: Iterator[Batch]) -> float:
        """Runs a step; returns its loss."""
        config, batch = self._config, next(batches)
        features = self._model(*self._copies.model_inputs(batch, self._world.device))
        mine = objective(
            features,
            to_device(batch.video_ids, self._world.device),
            config.model,
            config.loss,
            self._world,
            caption_ids=to_device(batch.caption_ids, self._world.device),
            exchange=config.train.exchange,
            scores=config.train.scores,
            fast=config.train.fast_similarity,
            lengths=host_lengths(batch.word_mask, batch.frame_mask),
        )
        mine.for_backward.backward()
        for weight, master in zip(self._weights, self._masters, strict=True):
            # Weights that the loss does not reach keep their value.
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, config.train.gradient_clip)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        return float(to_host(mine.shares[0], "step"))
