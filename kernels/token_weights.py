"""TPM-CL's predictors: weights over the tokens of one modality that see the other one (section 4).

Rows are matched pairs. Like TPM-CL they are computed in pieces of `chunk` pairs, the same weights
for every `chunk`; None takes pieces of bounded scratch (`pieces.chunk_size`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvr.kernels.checkpointed_chunks import chunk_size, in_pieces
from tvr.kernels.reference import masked_softmax, raised


class LinearTokenWeights(nn.Module):
    """Weights over N tokens (they sum to 1) given Q tokens of the other modality; the kind in use.

    The queries are mixed to one for each token, put before it, normalised over tokens and
    features together, and reduced to a sigmoid (the method, section 4). Q and N are fixed: all
    slots count, padding too, as published. A `token_mask` takes the weight from padding instead.
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
        chunk = chunk_size(chunk, 2 * num_tokens * tokens.shape[2])
        return in_pieces(self._weights, (queries, tokens, token_mask), chunk)[0]

    def _weights(
        self, queries: Tensor, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N"]]:
        dtype = self.mix.weight.dtype
        mixed = self.mix(queries.to(dtype).transpose(1, 2)).transpose(1, 2)
        pairs = self.norm(torch.cat([mixed, tokens.to(dtype)], dim=2))
        share = raised(self.score(F.gelu(self.hidden(pairs)))).squeeze(2).sigmoid()
        if token_mask is not None:
            share = share.masked_fill(token_mask == 0, 0)
        return (share / share.sum(dim=1, keepdim=True),)


class AttentionTokenWeights(nn.Module):
    """Weights over tokens from the attention of Q queries of the other modality.

    Each of 8 heads spreads every query over the tokens by softmax(q . k), not scaled by
    1 / sqrt(d); `reduce` ("sum", "mean", "max") joins the heads, Linear(Q, 1) the queries, and a
    softmax over tokens follows. With a `token_mask` padding is left out of both softmaxes.

    Raises:
        ValueError: unknown `reduce`, or a width that is no multiple of `heads`.
    """

    def __init__(
        self, num_queries: int, width: int, *, heads: int = 8, reduce: str = "sum"
    ) -> None:
        super().__init__()
        if reduce not in ("sum", "mean", "max"):
            raise ValueError(f"reduce={reduce!r} of the heads is unknown; use 'sum', 'mean', 'max'")
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
        chunk = chunk_size(chunk, self.heads * queries.shape[1] * tokens.shape[1])
        return in_pieces(self._weights, (queries, tokens, token_mask), chunk)[0]

    def _weights(
        self, queries: Tensor, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N"]]:
        by_head = [x.unflatten(2, (self.heads, -1)) for x in (queries, tokens)]
        scores = torch.einsum("bqhd,bnhd->bhqn", *by_head)
        if token_mask is not None:
            scores = scores.masked_fill((token_mask == 0)[:, None, None], -torch.inf)
        spread = scores.softmax(dim=3)
        if self.reduce == "max":
            spread = spread.max(dim=1).values
        else:
            spread = spread.sum(dim=1) if self.reduce == "sum" else spread.mean(dim=1)
        joined = self.join(spread.transpose(1, 2).to(self.join.weight.dtype)).squeeze(2)
        if token_mask is None:
            return (raised(joined).softmax(dim=1),)
        return (masked_softmax(raised(joined), token_mask),)


def _check_slots(name: str, x: Tensor, expected: int) -> None:
    if x.shape[1] != expected:
        raise ValueError(
            f"{name} has {x.shape[1]} slots but this predictor was built for {expected}: "
            "the number of words and frames per sample is fixed"
        )
