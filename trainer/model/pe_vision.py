"""The vision transformer of Perception Encoder (PE-Core), with timm's names of its weights.

Bolya et al., 2025, "Perception Encoder: The best visual embeddings are not at the output of the
network" (arXiv 2504.13181). A ViT with learned absolute positions, a norm before its layers,
rotary positions of rows and columns in every attention, and pooling by one learned query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

EPS = 1e-5
TEMPERATURE = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeVisionConfig:
    """Shape of the vision transformer."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    projected: int
    """Width D of a frame's vector."""
    reference: int
    """Side of the grid of patches that rotary positions are scaled to."""
    first_place: int = 1
    """Rotary position of the first row and column."""
    class_token: bool = True
    pool_heads: int = 8
    model_type: str = "pe_core"


class PeVision(nn.Module):
    """Pixels (N, 3, H, W) to frames (N, D)."""

    rotary_sin: Tensor
    rotary_cos: Tensor

    def __init__(self, config: PeVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch_size
        self.patch_embed = _PatchEmbedding(width, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        places = side * side + config.class_token
        self.pos_embed = nn.Parameter(torch.zeros(1, places, width))
        self.norm_pre = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.attn_pool = _AttentionPool(width, config.pool_heads)
        self.head = nn.Linear(width, config.projected)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.attn_pool.latent, std=width**-0.5)
        sine, cosine = rotary_positions(
            side, width // config.heads, config.reference, config.first_place
        )
        self.register_buffer("rotary_sin", sine, persistent=False)
        self.register_buffer("rotary_cos", cosine, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.norm_pre(x + self.pos_embed)
        for block in self.blocks:
            x = block(x, self.rotary_sin, self.rotary_cos)
        return self.head(self.attn_pool(self.norm(x)))


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class _Block(GradientCheckpointingLayer):
    def __init__(self, config: PeVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = _Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = _Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), sine, cosine)
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, sine, cosine), rotate(key, sine, cosine)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class _AttentionPool(nn.Module):
    """One learned query over all tokens, then a residual MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.heads, -1))
        key, value = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
        pooled = self.proj(out.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def rotary_positions(
    side: int, width: int, reference: int, first_place: int
) -> tuple[Tensor, Tensor]:
    """Sine and cosine (side * side, width) of each patch's angles, rows of patches first.

    The first half of the angles turns with the column, the second half with the row. Each angle
    stands twice in a row, for the two numbers that turn by it.
    """
    bands = TEMPERATURE ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    place = (torch.arange(side, dtype=torch.float32) + first_place) / side * reference
    angle = place[:, None] * bands
    both = torch.cat(
        (angle[None].expand(side, -1, -1), angle[:, None].expand(-1, side, -1)), dim=-1
    )
    both = both.flatten(0, 1).repeat_interleave(2, dim=-1)
    return both.sin(), both.cos()


def rotate(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Turns pairs of numbers of (N, heads, tokens, width); tokens before the patches stay."""
    first = x.shape[2] - len(sine)
    before, patches = x[:, :, :first], x[:, :, first:]
    turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).flatten(-2)
    turned = patches * cosine.to(x.dtype) + turned * sine.to(x.dtype)
    return torch.cat((before, turned), dim=2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
