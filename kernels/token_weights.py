"""Token-weight predictors of TPM-CL: weights over one modality, given the other (method section 4).

Each row is a matched pair. Like TPM-CL, the predictors run in chunks of `chunk` pairs and the
weights do not depend on it; None bounds the scratch (`checkpointed_chunks.pairs_per_chunk`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvr.kernels.checkpointed_chunks import pairs_per_chunk, run_in_chunks
from tvr.kernels.numerics import at_least_float32, masked_softmax


class LinearTokenWeights(nn.Module):
    """Predicts weights over N tokens, which sum to 1, from Q tokens of the other modality.

    The model uses this predictor. A linear layer mixes the queries to one per token; each is
    concatenated with its token, normalised over tokens and features together, and mapped to a
    sigmoid (method section 4). Q and N are fixed. As published, padded slots get weight too; a
    `token_mask` gives them weight 0.
    """

    def __init__(self, num_queries: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(num_queries, num_tokens, bias=False)
        self.norm = nn.LayerNorm([num_tokens, 2 * width])
        self.hidden = nn.Linear(2 * width, width // 2, bias=False)
        self.score = nn.Linear(width // 2, 1, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B N D"],
        token_mask: Int[Tensor, "B N"] | None = None,
        *,
        chunk: int | None = None,
    ) -> Float[Tensor, "B N"]:
        num_tokens, num_queries = self.mix.out_features, self.mix.in_features
        _check_slots("queries", queries, num_queries)
        _check_slots("tokens", tokens, num_tokens)
        chunk = pairs_per_chunk(chunk, 2 * num_tokens * tokens.shape[2])
        return run_in_chunks(self._weights, (queries, tokens, token_mask), chunk)[0]

    def _weights(
        self, queries: Tensor, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N"]]:
        dtype = self.mix.weight.dtype
        mixed = self.mix(queries.to(dtype).transpose(1, 2)).transpose(1, 2)
        pairs = self.norm(torch.cat([mixed, tokens.to(dtype)], dim=2))
        share = at_least_float32(self.score(F.gelu(self.hidden(pairs)))).squeeze(2).sigmoid()
        if token_mask is not None:
            share = share.masked_fill(token_mask == 0, 0)
        return (share / share.sum(dim=1, keepdim=True),)


class AttentionTokenWeights(nn.Module):
    """Predicts weights over the tokens from the attention of Q queries of the other modality.

    Every head computes softmax(q . k) over the tokens, not scaled by 1 / sqrt(d). `reduce` joins
    the heads, Linear(Q, 1) joins the queries, and a softmax over the tokens follows. A `token_mask`
    excludes padding from both softmaxes.

    Args:
        num_queries: Q.
        width: D.
        reduce: `sum`, `mean` or `max` over the heads.

    Raises:
        ValueError: unknown `reduce`, or a width that is not a multiple of `heads`.
    """

    def __init__(
        self, num_queries: int, width: int, *, heads: int = 8, reduce: str = "sum"
    ) -> None:
        super().__init__()
        if reduce not in ("sum", "mean", "max"):
            raise ValueError(
                f"reduce={reduce!r} of the heads is unknown; use 'sum', 'mean' or 'max'"
            )
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.reduce = reduce
        self.join = nn.Linear(num_queries, 1)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B N D"],
        token_mask: Int[Tensor, "B N"] | None = None,
        *,
        chunk: int | None = None,
    ) -> Float[Tensor, "B N"]:
        _check_slots("queries", queries, self.join.in_features)
        chunk = pairs_per_chunk(chunk, self.heads * queries.shape[1] * tokens.shape[1])
        return run_in_chunks(self._weights, (queries, tokens, token_mask), chunk)[0]

    def _weights(
        self, queries: Tensor, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N"]]:
        by_head = [x.unflatten(2, (self.heads, -1)) for x in (queries, tokens)]
        scores = torch.einsum("bqhd,bnhd->bhqn", *by_head)
        if token_mask is not None:
            scores = scores.masked_fill((token_mask == 0)[:, None, None], -torch.inf)
        attention = scores.softmax(dim=3)
        if self.reduce == "max":
            attention = attention.max(dim=1).values
        else:
            attention = attention.sum(dim=1) if self.reduce == "sum" else attention.mean(dim=1)
        joined = self.join(attention.transpose(1, 2).to(self.join.weight.dtype)).squeeze(2)
        if token_mask is None:
            return (at_least_float32(joined).softmax(dim=1),)
        return (masked_softmax(at_least_float32(joined), token_mask),)


def _check_slots(name: str, x: Tensor, expected: int) -> None:
    if x.shape[1] != expected:
        raise ValueError(
            f"{name} has {x.shape[1]} slots but this predictor was built for {expected}; "
            "the number of words and frames per sample is fixed"
        )
