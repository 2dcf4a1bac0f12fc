"""A small PE-Core folder in the layout of open_clip and timm, with weights by a formula.

    PYTHONPATH=tests python -m builders.pe_core_files tests/golden/pe_core.json

writes what open_clip and timm, which the tests do not need, give for it.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, TEXT_WIDTH, POSITIONS, WORDS, SIDE, DEPTH = 16, 24, 16, 560, 64, 12
MODEL: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": SIDE,
        "timm_model_name": "vit_pe_core_tiny_patch16_384",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": None,
    },
    "text_cfg": {
        "context_length": POSITIONS,
        "vocab_size": WORDS,
        "width": TEXT_WIDTH,
        "heads": 2,
        "layers": 2,
    },
    "custom_text": True,
}


def save_pe_core(folder: Path, vocab_size: int = WORDS, positions: int = POSITIONS) -> None:
    """Writes the folder, without a tokeniser."""
    text = MODEL["text_cfg"] | {"vocab_size": vocab_size, "context_length": positions}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": MODEL | {"text_cfg": text}, "preprocess_cfg": pixels}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights(vocab_size, positions), folder / "open_clip_model.safetensors")


def weights(vocab_size: int = WORDS, positions: int = POSITIONS) -> dict[str, Tensor]:
    """All weights, by open_clip's names."""
    shapes = _layers("text.transformer.resblocks", 2, TEXT_WIDTH, _TEXT_LAYER)
    shapes |= _layers("visual.trunk.blocks", DEPTH, 192, _VISION_LAYER)
    shapes |= {
        "logit_scale": (),
        "text.positional_embedding": (positions, TEXT_WIDTH),
        "text.text_projection": (TEXT_WIDTH, WIDTH),
        "text.token_embedding.weight": (vocab_size, TEXT_WIDTH),
        **_norm("text.ln_final", TEXT_WIDTH),
        "visual.trunk.cls_token": (1, 1, 192),
        "visual.trunk.pos_embed": (1, (SIDE // 16) ** 2 + 1, 192),
        "visual.trunk.patch_embed.proj.weight": (192, 3, 16, 16),
        **_norm("visual.trunk.norm_pre", 192),
        **_norm("visual.trunk.norm", 192),
        **_norm("visual.trunk.attn_pool.norm", 192),
        "visual.trunk.attn_pool.latent": (1, 1, 192),
        **_linear("visual.trunk.attn_pool.q", 192, 192),
        **_linear("visual.trunk.attn_pool.kv", 192, 2 * 192),
        **_linear("visual.trunk.attn_pool.proj", 192, 192),
        **_linear("visual.trunk.attn_pool.mlp.fc1", 192, 4 * 192),
        **_linear("visual.trunk.attn_pool.mlp.fc2", 4 * 192, 192),
        **_linear("visual.trunk.head", 192, WIDTH),
    }
    return {name: _values(name, shape) for name, shape in shapes.items()}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (2, T) that end with the last id, their mask, and pixels (2, 3, SIDE, SIDE)."""
    ids = torch.arange(2 * POSITIONS).view(2, POSITIONS) * 13 % (WORDS - 2)
    mask = torch.ones_like(ids)
    for row, end in enumerate((5, POSITIONS - 1)):
        ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = WORDS - 1, 0, 0
    count = 2 * 3 * SIDE * SIDE
    pixels = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.3 / 50).float()
    return ids, mask, pixels.view(2, 3, SIDE, SIDE)


_TEXT_LAYER = (
    ("ln_1", None, None),
    ("ln_2", None, None),
    ("attn.out_proj", 1, 1),
    ("mlp.c_fc", 1, 4),
    ("mlp.c_proj", 4, 1),
)
_VISION_LAYER = (
    ("norm1", None, None),
    ("norm2", None, None),
    ("attn.qkv", 1, 3),
    ("attn.proj", 1, 1),
    ("mlp.fc1", 1, 4),
    ("mlp.fc2", 4, 1),
)


def _layers(prefix: str, number: int, width: int, parts: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(number):
        for name, inner, outer in parts:
            full = f"{prefix}.{layer}.{name}"
            shapes |= (
                _norm(full, width) if inner is None else _linear(full, inner * width, outer * width)
            )
        if parts is _TEXT_LAYER:  # as torch's own attention names it
            shapes[f"{prefix}.{layer}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{prefix}.{layer}.attn.in_proj_bias"] = (3 * width,)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    count = int(torch.Size(shape).numel())
    phase = zlib.crc32(name.encode()) % 1000
    noise = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.1 * 1.7 + phase) * 0.1
    is_norm = name.endswith("weight") and len(shape) == 1
    return (noise + is_norm).float().reshape(shape)


def main(path: str) -> None:
    """Writes the golden file from open_clip and timm."""
    import timm  # pyright: ignore[reportMissingImports]
    from open_clip.transformer import TextTransformer  # pyright: ignore[reportMissingImports]

    text = TextTransformer(**MODEL["text_cfg"], output_dim=WIDTH).eval()
    name = MODEL["vision_cfg"]["timm_model_name"]
    trunk = timm.create_model(name, img_size=SIDE, num_classes=WIDTH, global_pool="map").eval()
    for model, prefix in ((text, "text."), (trunk, "visual.trunk.")):
        values = {k.removeprefix(prefix): v for k, v in weights().items() if k.startswith(prefix)}
        model.load_state_dict(values)
    ids, _, pixels = inputs()
    with torch.no_grad():
        found = {"sentence": text(ids).tolist(), "frames": trunk(pixels).tolist()}
    import open_clip  # pyright: ignore[reportMissingImports]

    made = {"open_clip": open_clip.__version__, "timm": timm.__version__}
    Path(path).write_text(json.dumps({"made_by": made, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
