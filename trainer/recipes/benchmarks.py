"""Recipes for the published benchmarks, and one for many GPUs.

We have not run any of them to its end, and claim no number on these benchmarks.

Published settings of CLIP4Clip (arXiv 2104.08860, and the commands and optimiser of its code), used
for the four benchmarks: batches of 128 pairs; learning rates of 1e-7 for the towers and 1e-4 for
the rest; warm-up over a tenth of the steps, then a cosine; weight decay 0.2; betas 0.9 and 0.98;
gradients clipped at norm 1; temperature 0.01, at which CLIP's learned one is held; 12 frames and 32
words, or 64 and 64 for paragraphs; frames at the middle of equal segments; the centred square; 5
passes over all captions; 4 GPUs, or 8 for paragraphs.

Published settings of the authors' implementation of the method: NegNCE and TPM-CL of type 4 with
their constants (the defaults of `LossConfig`), neighbour frames, no sequence header, fillers
dropped from captions in training, and content words counted twice (`twm`). The last two need the
words that `tvr pack` finds. The authors' learning rates belong to other towers (BERT with PVT) and
are not used.

Our own choices, untried on the benchmarks: `att_wti`, because weights are learned per pair here
(the published training command sets `att_ti`); NegNCE in `log` mode; bf16 with ZeRO-1, whose master
weights, moments, similarity and loss are float32; the numbers of loader workers; the intervals of
evaluations and checkpoints.

Data sets and weights are relative paths. Put them there, or name others in a --config file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvr.trainer.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
)

B32, B16, L14 = (
    f"models/clip-vit-{size}" for size in ("base-patch32", "base-patch16", "large-patch14")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """The passes over a training split from which a recipe computes `train.steps`."""

    videos: int
    """Videos of the training split."""
    epochs: int
    """Passes over the videos. A pass sees every video once, with one of its captions."""

    def steps(self, global_batch: int) -> int:
        """Returns the optimiser steps of all passes."""
        return self.videos * self.epochs // global_batch


PASSES = {
    # 20 captions a video: 5 passes over 180,000 pairs.
    "msrvtt_b32": Passes(videos=9_000, epochs=5 * 20),
    "msrvtt_b16": Passes(videos=9_000, epochs=5 * 20),
    # About 40 captions a video: 5 passes over nearly 49,000 pairs.
    "msvd_b32": Passes(videos=1_200, epochs=5 * 40),
    "didemo_b32": Passes(videos=8_395, epochs=5),
    "activitynet_b32": Passes(videos=10_009, epochs=5),
    "large_scale_l14_64gpu": Passes(videos=10_000_000, epochs=5),
}


def msrvtt_b32() -> Config:
    """MSR-VTT: training on 9k, test on 1k-A, from CLIP ViT-B/32, on 4 GPUs.

    7,031 steps of 128 pairs are 100 passes over 9,000 videos, or CLIP4Clip's 5 passes over their 20
    captions each. MSR-VTT has no validation split for 1k-A, so the best checkpoint is chosen by the
    test split, as is customary; say so beside your results.
    """
    return _fine_tuning(
        "msrvtt_b32", B32, train="data/msrvtt/train-9k", test="data/msrvtt/test-1ka", ranks=4
    )


def msrvtt_b16() -> Config:
    """MSR-VTT as in msrvtt_b32, from CLIP ViT-B/16, which has four times the patches.

    CLIP4Clip's code trains B/16 by the same command with other weights.
    """
    return _fine_tuning(
        "msrvtt_b16", B16, train="data/msrvtt/train-9k", test="data/msrvtt/test-1ka", ranks=4
    )


def msvd_b32() -> Config:
    """MSVD from CLIP ViT-B/32, on 4 GPUs; test it with `tvr evaluate --data data/msvd/test`.

    1,875 steps of 128 pairs are 200 passes over 1,200 videos, or CLIP4Clip's 5 passes over about 40
    captions each (our rounding). Training evaluates the 100 videos of the validation split;
    CLIP4Clip's code evaluates the test split after every epoch.
    """
    return _fine_tuning("msvd_b32", B32, train="data/msvd/train", test="data/msvd/val", ranks=4)


def didemo_b32() -> Config:
    """DiDeMo, a video's sentences as one paragraph, from CLIP ViT-B/32, on 8 GPUs.

    327 steps of 128 pairs are 5 passes over 8,395 videos, as in CLIP4Clip. Training evaluates the
    validation split; test the run with `tvr evaluate --data data/didemo/test`.
    """
    return _paragraphs("didemo_b32", train="data/didemo/train", test="data/didemo/val")


def activitynet_b32() -> Config:
    """ActivityNet Captions, a video's sentences as one paragraph, from CLIP ViT-B/32, on 8 GPUs.

    390 steps of 128 pairs are 5 passes over 10,009 videos, as in CLIP4Clip. The test set is the
    validation split val_1, which papers report.
    """
    return _paragraphs(
        "activitynet_b32", train="data/activitynet/train", test="data/activitynet/val"
    )


def large_scale_l14_64gpu() -> Config:
    """Ten million pairs, from CLIP ViT-L/14, on 64 GPUs of 80 GB (8 nodes).

    3,051 steps of 16,384 pairs are 5 passes over 10,000,000 videos. Everything but the method's
    constants, betas and temperature is our own, untried choice. The batch is 128 times CLIP4Clip's,
    so the towers get a learning rate of 1e-6, and the weight decay is 0.05.

    `tvr train --dry-run --ranks 64` prints the memory of a rank. The gradient cache computes one
    loss over 16,384 pairs, of which a rank encodes 32 (384 frames) at a time. Their activations
    take some 13 GB, because the backward recomputes the towers' layers (without recomputation,
    every 8 pairs take 38 GB). The similarity peaks at 4.3 GB with gathered frames and kept scores,
    so neither `ring` nor `stream` is needed. Frames and crops are random, so pack in the video
    layout.
    """
    name, batch = "large_scale_l14_64gpu", 16_384
    steps = PASSES[name].steps(batch)
    return Config(
        data=DataConfig(
            train="data/large/train",
            test="data/large/test",
            frame_sampling="random",
            crop_scale=0.9,
            word_drop=True,
            content_words=True,
            workers=8,
        ),
        model=ModelConfig(pretrained=L14),
        train=TrainConfig(
            steps=steps,
            global_batch=batch,
            micro_batch=32,
            gradient_cache=True,
            activation_checkpointing=True,
            learning_rate=1e-4,
            encoder_learning_rate=1e-6,
            warmup_steps=steps // 10,
            weight_decay=0.05,
            zero_stage=1,
            precision="bf16",
            eval_every=500,
            log_every=1,
        ),
        checkpoint=CheckpointConfig(every=250, keep_every=1_000),
    )


def _paragraphs(name: str, *, train: str, test: str) -> Config:
    """CLIP4Clip's settings for paragraphs: 64 frames, 64 words, 16 pairs on each of 8 GPUs."""
    config = _fine_tuning(name, B32, train=train, test=test, ranks=8)
    return replace(config, data=replace(config.data, num_frames=64, max_words=64))


def _fine_tuning(name: str, clip: str, *, train: str, test: str, ranks: int) -> Config:
    """CLIP4Clip's settings, without accumulation: each loss is over the whole batch."""
    batch = 128
    steps = PASSES[name].steps(batch)
    fifth = steps // 5  # steps of one of the 5 passes over all captions
    return Config(
        data=DataConfig(train=train, test=test, word_drop=True, content_words=True, workers=4),
        model=ModelConfig(pretrained=clip),
        train=TrainConfig(
            steps=steps,
            global_batch=batch,
            micro_batch=batch // ranks,
            learning_rate=1e-4,
            encoder_learning_rate=1e-7,
            warmup_steps=steps // 10,
            weight_decay=0.2,
            gradient_clip=1.0,
            zero_stage=1,
            precision="bf16",
            eval_every=fifth,
        ),
        checkpoint=CheckpointConfig(every=fifth),
    )
