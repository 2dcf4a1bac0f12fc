"""Computes the golden cases from raw features to loss with the code under test."""

from functools import cache

import torch
from builders.golden.archives import leaves, tensor
from builders.golden.partial import linear_predictor
from builders.golden.similarity import weight_layer
from torch import Tensor

from tvr.kernels.losses import info_nce, neg_nce
from tvr.kernels.numerics import unit
from tvr.kernels.partial import tpm_cl
from tvr.kernels.similarity import dmae_similarity

FILE = "level3.npz"
LOSSES = {"negnce": neg_nce, "crossen": info_nce}
INTERACTIONS = ("att_ti", "att_wti")


@cache
def results(interaction: str) -> dict[str, Tensor]:
    """Similarity, losses, margin and the gradients of the raw features."""
    raw = leaves(FILE, ["text", "word_raw", "video_raw"])
    sentence, words, frames = raw["text"], unit(raw["word_raw"]), unit(raw["video_raw"])
    frame_mask = tensor(FILE, "video_mask")
    logits, frame_layer = {}, None
    if interaction == "att_wti":
        frame_layer = weight_layer(FILE, f"{interaction}.param.video_weight_fc.")
        word_layer = weight_layer(FILE, f"{interaction}.param.text_weight_fc.")
        logits = {"word_logits": word_layer(words), "frame_logits": frame_layer(frames)}
    scores = dmae_similarity(
        sentence,
        words,
        frames,
        tensor(FILE, "twm_mask"),
        frame_mask,
        interaction=interaction,
        **logits,
    )
    prefix = f"{interaction}.param."
    margin = tpm_cl(
        sentence,
        words,
        frames,
        frame_mask,
        word_weights=linear_predictor(FILE, f"{prefix}v2t_linear_xwp.")(frames, words),
        frame_weights=linear_predictor(FILE, f"{prefix}t2v_linear_xwp.")(sentence[:, None], frames),
        frame_weight_layer=frame_layer,
    ).hinge.mean()

    result = {f"{interaction}.sim": scores}
    for kind, loss in LOSSES.items():
        parts = {"simloss": loss(scores)}
        if interaction == "att_ti":
            parts["margin"] = margin
            result[f"{interaction}.{kind}.total"] = parts["simloss"] + margin
        for name, part in parts.items():
            gradients = torch.autograd.grad(part, list(raw.values()), retain_graph=True)
            result[f"{interaction}.{kind}.{name}"] = part
            for feature, gradient in zip(raw, gradients, strict=True):
                result[f"{interaction}.{kind}.{name}.grad.{feature}"] = gradient
    return result
