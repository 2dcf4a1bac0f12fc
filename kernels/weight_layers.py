"""Learned layers before the similarity: token weights and the sequence header."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

MASKED_KEY = -1e6
HEAD_WIDTH = 64


class TokenWeightLayer(nn.Module):
    """Logits of the token weights in the wti family (method section 2).

    A model has one layer for words and one for frames.

    Args:
        width: D.
        arch: 1 is Linear(D, 1); 2 and 3 add one and two hidden layers of width D with ReLU.

    Raises:
        ValueError: `arch` is not 1, 2 or 3.
    """

    def __init__(self, width: int, arch: int = 1) -> None:
        super().__init__()
        if arch not in (1, 2, 3):
            raise ValueError(f"arch={arch} of the token weight layer is unknown; use 1, 2 or 3")
        hidden: list[nn.Module] = []
        for _ in range(arch - 1):
            hidden += [nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, tokens: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest"]:
        # `numerics.unit` returns float32 features, also for a layer in bfloat16.
        return self.layers(tokens.to(next(self.parameters()).dtype)).squeeze(-1)


class SequenceHeader(nn.Module):
    """Self-attention between the frames of a video: v + Transformer(v + position).

    Pre-norm blocks with max(1, D // 64) heads, a QuickGELU MLP of width 4 D and LayerNorm eps 1e-12
    (method section 2, "Sequential header"). The outputs do not have unit length. Masked frames are
    not used as keys, but have outputs. Pass the same outputs to the similarity and to TPM-CL, whose
    margins compare the two.

    Raises:
        ValueError: D is not a multiple of the number of heads, or there are more frames than
            positions.
    """

    def __init__(self, width: int, *, num_layers: int = 4, num_positions: int = 77) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        if width % heads:
            raise ValueError(
                f"width={width} must be a multiple of its {heads} heads (width // {HEAD_WIDTH})"
            )
        self.positions = nn.Parameter(torch.empty(num_positions, width))
        blocks = [_Block(width, heads) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self._start_near_identity(blocks, width)

    def _start_near_identity(self, blocks: list["_Block"], width: int) -> None:
        """Initialises small weights, so that the first outputs are almost parallel to the frames.

        Entries of unit vectors are about 1 / sqrt(D). With torch's defaults the blocks would add
        several times that, and nearly the same vector to all frames. Videos would then be almost
        equal: training from scratch separates them slowly, and pretrained features are lost in the
        first step.
        """
        nn.init.normal_(self.positions, std=0.2 * width**-0.5)
        for block in blocks:
            for layer in (block.out_projection, block.mlp_out):
                nn.init.normal_(layer.weight, std=0.2 / width)
                nn.init.zeros_(layer.bias)

    def forward(
        self, frames: Float[Tensor, "C F D"], frame_mask: Int[Tensor, "C F"]
    ) -> Float[Tensor, "C F D"]:
        num_frames = frames.shape[1]
        if num_frames > len(self.positions):
            raise ValueError(
                f"{num_frames} frames exceed the header's num_positions={len(self.positions)}"
            )
        x = frames.to(self.positions.dtype) + self.positions[:num_frames]
        bias = (frame_mask == 0).to(x.dtype)[:, None, None] * MASKED_KEY
        for block in self.blocks:
            x = block(x, bias)
        return frames + x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.in_projection = nn.Linear(width, 3 * width)
        self.out_projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "C F D"], bias: Float[Tensor, "C 1 1 F"]
    ) -> Float[Tensor, "C F D"]:
        x = x + self._attention(self.attention_norm(x), bias)
        hidden = self.mlp_in(self.mlp_norm(x))
        return x + self.mlp_out(hidden * torch.sigmoid(1.702 * hidden))

    def _attention(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.in_projection(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        bias = bias.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_projection(mixed.transpose(1, 2).flatten(2))
