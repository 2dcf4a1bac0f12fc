"""Similarity and loss of the global batch, tile by tile, without storing the scores.

The similarity of one rank's texts with the videos of all ranks is computed in tiles of bounded
size: once for each of the two forward passes of `RowLoss`, and once more in the backward pass,
where each tile is differentiated as soon as it is computed. No tensor as large as B x G exists.
With `keep_scores` the scores are stored, 4 bytes a pair, and the forward computes them once instead
of twice. Videos arrive in blocks, so that this rank never needs to hold those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.backends.protocol import SimilarityBackend, mean_similarity
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT
from tvr.kernels.numerics import no_autocast
from tvr.kernels.row_loss.loss_terms import LossTerms, loss_terms
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, Collectives, TilePosition
from tvr.kernels.row_loss.row_loss import LossRule, RowLoss
from tvr.kernels.similarity import tile_backend
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import FrameSet, TokenSet, prepare

TENSORS_OF_SET = 3  # of `TokenSet.tensors`


@runtime_checkable
class Exchange(Protocol):
    """Delivers the videos of all ranks to this rank, in blocks of one or more whole ranks.

    Every rank calls the same methods in the same order and exhausts each iterator.
    """

    def visit(self, own: tuple[Tensor, ...], /) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yields (first column in the global batch, tensors) of every block, once.

        `own` are this rank's tensors, (C, ...) each. A block is read-only and valid until the next
        one is requested.
        """
        ...

    def visit_backward(
        self,
        own: tuple[Tensor, ...],
        block_gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
        /,
    ) -> tuple[Tensor, ...]:
        """Visits every block again and sums its gradients over ranks.

        Args:
            own: This rank's tensors, as for `visit`.
            block_gradients: Called as `block_gradients(first_column, block)`; returns the gradients
                of the block's floating-point tensors, in their order.

        Returns:
            The gradients of the floating-point tensors of `own`, summed over ranks.
        """
        ...


class _LocalExchange:
    def visit(self, own: tuple[Tensor, ...], /) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        yield 0, own

    def visit_backward(
        self,
        own: tuple[Tensor, ...],
        block_gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
        /,
    ) -> tuple[Tensor, ...]:
        return block_gradients(0, own)


LOCAL_EXCHANGE: Exchange = _LocalExchange()


def streamed_loss(
    sentence: Float[Tensor, "B D"] | None,
    words: Float[Tensor, "B T D"] | None,
    frames: Float[Tensor, "B F D"],
    word_mask: Int[Tensor, "B T"],
    frame_mask: Int[Tensor, "B F"],
    *,
    interaction: str = "att_wti",
    matching: str = "two_way",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "B T"] | None = None,
    frame_logits: Float[Tensor, "B F"] | None = None,
    rule: LossRule,
    row_offset: int = 0,
    num_pairs: int | None = None,
    collectives: Collectives = SINGLE_RANK,
    exchange: Exchange = LOCAL_EXCHANGE,
    video_ids: Int[Tensor, " G"] | None = None,
    caption_ids: Int[Tensor, " G"] | None = None,
    keep_scores: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
    fast: bool = False,
    compile_tiles: bool = False,
    lengths: TextLengths | None = None,
) -> LossTerms:
    """Computes `losses.row_loss` of `similarity.dmae_similarity` tile by tile.

    The gradient of a share is that of the sum over ranks, so every rank must multiply its share by
    the same factor before `backward`.

    Args:
        sentence: Features, masks and logits are those of this rank's own pairs; see
            `similarity.dmae_similarity`.
        rule: Loss and its settings.
        row_offset: Row 0 of this rank is row `row_offset` of the global batch.
        num_pairs: G; None means B.
        keep_scores: Stores the (B, G) scores instead of computing them for each pass.
        chunk: Texts per tile; a tile has 4 times as many videos. None chooses. The result does not
            depend on it.
        backend: As for `similarity.dmae_similarity`, and so are `fast`, `lengths` and
            `compile_tiles`.

    Returns:
        This rank's share of every term.

    Raises:
        ValueError: as `dmae_similarity` and `row_loss`.
    """
    with no_autocast(frames.device):
        texts, videos = prepare(
            sentence,
            words,
            frames,
            word_mask,
            frame_mask,
            interaction=interaction,
            matching=matching,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
            lengths=lengths,
        )
        loss = RowLoss(
            rule,
            num_rows=len(word_mask),
            num_pairs=len(word_mask) if num_pairs is None else num_pairs,
            row_offset=row_offset,
            collectives=collectives,
            video_ids=video_ids,
            caption_ids=caption_ids,
            like=videos.frames.detach()[:0],
        )
        tiles, chunk = tile_backend(texts, videos, chunk, fast, backend, compile_tiles)
        lengths_of_sets = tuple(tokens.lengths for tokens in texts)
        stream = _TileStream(loss, exchange, keep_scores, tiles, chunk, lengths_of_sets)
        text_tensors = [tensor for tokens in texts for tensor in tokens.tensors]
        video_tensors = [tensor for tensor in videos if tensor is not None]
        return loss_terms(loss, _StreamedLoss.apply(stream, *text_tensors, *video_tensors))


@dataclass
class _TileStream:
    """Cuts token sets and videos into tiles and scores them."""

    loss: RowLoss
    exchange: Exchange
    keep_scores: bool
    backend: SimilarityBackend
    chunk: int
    lengths: tuple[TextLengths | None, ...]
    """Of each token set."""

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[TokenSet, ...], tuple[Tensor, ...]]:
        """Separates the flat inputs of the autograd function: token sets, then video tensors."""
        end = TENSORS_OF_SET * len(self.lengths)
        sets = (
            TokenSet(tensors[first], tensors[first + 1], tensors[first + 2], lengths)
            for first, lengths in zip(range(0, end, TENSORS_OF_SET), self.lengths, strict=True)
        )
        return tuple(sets), tensors[end:]

    def text_tiles(self, texts: tuple[TokenSet, ...]) -> list[tuple[int, tuple[TokenSet, ...]]]:
        """(first row, token sets) of each row of tiles; the tensors are autograd leaves."""
        tiles = []
        for row in range(0, len(texts[0].weights), self.chunk):
            rows = slice(row, row + self.chunk)
            tiles.append((row, tuple(_text_tile(tokens, rows) for tokens in texts)))
        return tiles

    def video_tiles(self, block: tuple[Tensor, ...]) -> Iterator[tuple[int, FrameSet]]:
        """(first column in the block, frames) of each tile; the tensors are autograd leaves."""
        size = VIDEOS_PER_TEXT * self.chunk
        for first in range(0, len(block[0]), size):
            yield first, _frame_set(tuple(_leaf(x[first : first + size]) for x in block))

    def scores(
        self, texts: tuple[TokenSet, ...], videos: tuple[Tensor, ...]
    ) -> Iterator[tuple[TilePosition, Tensor]]:
        """Scores every tile of this rank's rows, without gradient."""
        text_tiles = self.text_tiles(texts)
        for column, block in self.exchange.visit(videos):
            for first, video_tile in self.video_tiles(block):
                for row, text_tile in text_tiles:
                    position = TilePosition(row, column + first, self.loss.row_offset)
                    yield position, mean_similarity(text_tile, video_tile, self.backend)

    def matched_scores(
        self, texts: tuple[TokenSet, ...], videos: tuple[Tensor, ...]
    ) -> Iterator[tuple[TilePosition, Tensor]]:
        """Scores the tiles that hold this rank's matched pairs; their videos are its own."""
        text_tiles, offset = self.text_tiles(texts), self.loss.row_offset
        for first, video_tile in self.video_tiles(videos):
            for row, text_tile in text_tiles:
                num_texts, num_videos = len(text_tile[0].weights), len(video_tile.frames)
                if first - num_texts < row < first + num_videos:
                    scores = mean_similarity(text_tile, video_tile, self.backend)
                    yield TilePosition(row, offset + first, offset), scores


class _StreamedLoss(torch.autograd.Function):
    """Shares of the two directions, from the tensors of the token sets and of the videos."""

    @staticmethod
    def forward(ctx: Any, stream: _TileStream, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        texts, videos = stream.split(tensors)
        loss, stored = stream.loss, []
        if loss.needs_positives:
            for position, scores in stream.matched_scores(texts, videos):
                loss.add_positives(scores, position)
            loss.finish_positives()
        for position, scores in stream.scores(texts, videos):
            loss.add_softmax_stats(scores, position)
            if stream.keep_scores:
                stored.append((position, scores))
        loss.finish_softmax()
        for position, scores in stored if stream.keep_scores else stream.scores(texts, videos):
            loss.add_hard_negatives(scores, position)
        loss.finish_hard_negatives()
        ctx.stream, ctx.stored = stream, dict(stored)
        ctx.save_for_backward(*tensors)
        return loss.shares()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *factors: Tensor
    ) -> tuple[Tensor | None, ...]:
        stream: _TileStream = ctx.stream
        texts, videos = stream.split(ctx.saved_tensors)
        text_tiles = stream.text_tiles(texts)

        def block_gradients(column: int, block: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradients = []
            for first, video_tile in stream.video_tiles(block):
                for row, text_tile in text_tiles:
                    position = TilePosition(row, column + first, stream.loss.row_offset)
                    with torch.enable_grad():
                        scores = mean_similarity(text_tile, video_tile, stream.backend)
                    values = ctx.stored.get(position, scores.detach())
                    gradient = stream.loss.gradient(values, position, *factors)
                    torch.autograd.backward(scores, gradient)
                gradients.append(_gradients(tuple(x for x in video_tile if x is not None)))
            return tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))

        video_gradients = iter(stream.exchange.visit_backward(videos, block_gradients))
        result: list[Tensor | None] = [None]
        for index, tokens in enumerate(texts):
            tile_gradients = [_gradients(tile[index].tensors) for _, tile in text_tiles]
            joined = iter([torch.cat(parts) for parts in zip(*tile_gradients, strict=True)])
            result += [next(joined) if x.is_floating_point() else None for x in tokens.tensors]
        result += [next(video_gradients) if x.is_floating_point() else None for x in videos]
        return tuple(result)


def _text_tile(tokens: TokenSet, rows: slice) -> TokenSet:
    lengths = tokens.lengths
    part = None if lengths is None else lengths.part(rows)
    leaves, weights, valid = (_leaf(x[rows]) for x in tokens.tensors)
    return TokenSet(leaves, weights, valid, part)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _frame_set(tensors: tuple[Tensor, ...]) -> FrameSet:
    """The inverse of leaving out the fields that are None: neighbours come in pairs."""
    frames, *others = tensors
    weights = others.pop(0) if len(others) % 2 else None
    strength, neighbour = others or (None, None)
    return FrameSet(frames, weights, strength, neighbour)


def _gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Accumulated gradients of the floating-point tensors of a tile."""
    floating = (x for x in tensors if x.is_floating_point())
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in floating)
