"""The loss of the global batch without a table of its pairs: similarity tiles, seen and forgotten.

The similarity of one rank's texts with everyone's videos is computed in tiles of bounded size,
once for each pass of `row_loss` and once more in the backward, where a tile's gradient is known as
soon as the tile is. Nothing as large as B x G lives (with `keep_scores` the scores do, 4 bytes a
pair, for two passes less). Videos come by in pieces, so that not even all of them need be here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.backends.protocol import Engine, mean_similarity
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT
from tvr.kernels.losses import LossTerms, terms_of
from tvr.kernels.reference import FrameSet, TokenSet, full_precision, prepare
from tvr.kernels.row_loss.online_softmax import ALONE, Collectives, Place
from tvr.kernels.row_loss.row_loss import LossRule, RowLoss
from tvr.kernels.similarity import tile_engine


@runtime_checkable
class Exchange(Protocol):
    """How the videos of all ranks pass by, in pieces, each of one or more whole ranks.

    Every rank calls the same method in the same order and takes it to its end.
    """

    def visit(self, mine: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(first column in the global batch, tensors) of each piece once.

        `mine` are this rank's tensors, (C, ...) each. A piece is valid until the next is asked
        for, and not to be written to.
        """
        ...

    def visit_back(
        self,
        mine: tuple[Tensor, ...],
        gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """As `visit`; `gradients` returns those of a piece's floating tensors, in their order.

        Returns the sums over ranks of the gradients of `mine`'s floating tensors.
        """
        ...


class _Whole:
    def visit(self, mine: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        yield 0, mine

    def visit_back(
        self,
        mine: tuple[Tensor, ...],
        gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        return gradients(0, mine)


WHOLE: Exchange = _Whole()


def streamed_loss(
    sentence: Float[Tensor, "B D"] | None,
    words: Float[Tensor, "B T D"] | None,
    frames: Float[Tensor, "B F D"],
    word_mask: Int[Tensor, "B T"],
    frame_mask: Int[Tensor, "B F"],
    *,
    interaction: str = "att_wti",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "B T"] | None = None,
    frame_logits: Float[Tensor, "B F"] | None = None,
    rule: LossRule,
    row_offset: int = 0,
    num_pairs: int | None = None,
    collectives: Collectives = ALONE,
    exchange: Exchange = WHOLE,
    video_ids: Int[Tensor, " G"] | None = None,
    keep_scores: bool = False,
    chunk: int | None = None,
    fast: bool = False,
) -> LossTerms:
    """`losses.row_loss` of `similarity.dmae_similarity`, tile by tile; features of the own pairs.

    Tiles are `chunk` texts x 4 `chunk` videos, None chooses (`similarity.tile_engine`); the result
    does not depend on it. The gradient of a share is that of the sum over ranks: every rank must
    weigh its share by the same factor. `fast`: see `similarity.dmae_similarity`.

    Raises:
        ValueError: as `dmae_similarity` and `row_loss`.
    """
    with full_precision(frames.device):
        texts, videos = prepare(
            sentence,
            words,
            frames,
            word_mask,
            frame_mask,
            interaction=interaction,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
        )
        loss = RowLoss(
            rule,
            num_rows=len(word_mask),
            num_pairs=len(word_mask) if num_pairs is None else num_pairs,
            row_offset=row_offset,
            collectives=collectives,
            video_ids=video_ids,
            like=videos.frames.detach()[:0],
        )
        engine, chunk = tile_engine(texts, videos, chunk, fast)
        job = _Job(loss, exchange, keep_scores, engine, chunk, len(texts))
        of_texts = [tensor for tokens in texts for tensor in tokens]
        of_videos = [tensor for tensor in videos if tensor is not None]
        return terms_of(loss, _StreamedLoss.apply(job, *of_texts, *of_videos))


@dataclass
class _Job:
    loss: RowLoss
    exchange: Exchange
    keep_scores: bool
    engine: Engine
    chunk: int
    num_token_sets: int

    def apart(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[TokenSet, ...], tuple[Tensor, ...]]:
        """The token sets and this rank's video tensors from what was joined for autograd."""
        size = len(TokenSet._fields)
        cut = size * self.num_token_sets
        sets = (TokenSet(*tensors[i : i + size]) for i in range(0, cut, size))
        return tuple(sets), tensors[cut:]

    def text_tiles(self, texts: tuple[TokenSet, ...]) -> list[tuple[int, tuple[TokenSet, ...]]]:
        """(first row, token sets) of each row of tiles, free to get gradients of their own."""
        found = []
        for row in range(0, len(texts[0].weights), self.chunk):
            parts = ((x[row : row + self.chunk] for x in tokens) for tokens in texts)
            found.append((row, tuple(TokenSet(*map(_leaf, part)) for part in parts)))
        return found

    def video_tiles(self, piece: tuple[Tensor, ...]) -> Iterator[tuple[int, FrameSet]]:
        size = VIDEOS_PER_TEXT * self.chunk
        for first in range(0, len(piece[0]), size):
            yield first, _frame_set(tuple(_leaf(x[first : first + size]) for x in piece))

    def scores(
        self, texts: tuple[TokenSet, ...], videos: tuple[Tensor, ...]
    ) -> Iterator[tuple[Place, Tensor]]:
        """Every tile of this rank's rows once, without gradient."""
        text_tiles = self.text_tiles(texts)
        for column, piece in self.exchange.visit(videos):
            for first, video_tile in self.video_tiles(piece):
                for row, text_tile in text_tiles:
                    place = Place(row, column + first, self.loss.row_offset)
                    yield place, mean_similarity(text_tile, video_tile, self.engine)


class _StreamedLoss(torch.autograd.Function):
    """The two directions' shares; tensors are those of the token sets, then of the videos."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        texts, videos = job.apart(tensors)
        loss, kept = job.loss, []
        for place, scores in job.scores(texts, videos):
            loss.look(scores, place)
            if job.keep_scores:
                kept.append((place, scores))
        loss.looked()
        for place, scores in kept if job.keep_scores else job.scores(texts, videos):
            loss.meet(scores, place)
        loss.met()
        ctx.job, ctx.kept = job, {place: scores for place, scores in kept}
        ctx.save_for_backward(*tensors)
        return loss.shares()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *factors: Tensor
    ) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        texts, videos = job.apart(ctx.saved_tensors)
        text_tiles = job.text_tiles(texts)

        def gradients(column: int, piece: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found = []
            for first, video_tile in job.video_tiles(piece):
                for row, text_tile in text_tiles:
                    place = Place(row, column + first, job.loss.row_offset)
                    with torch.enable_grad():
                        scores = mean_similarity(text_tile, video_tile, job.engine)
                    known = ctx.kept.get(place, scores.detach())
                    torch.autograd.backward(scores, job.loss.gradient(known, place, *factors))
                found.append(_gradients(tuple(x for x in video_tile if x is not None)))
            return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

        of_videos = iter(job.exchange.visit_back(videos, gradients))
        result: list[Tensor | None] = [None]
        for index in range(job.num_token_sets):
            of_set = [_gradients(tokens[index]) for _, tokens in text_tiles]
            of_set = iter([torch.cat(parts) for parts in zip(*of_set, strict=True)])
            result += [next(of_set) if x.is_floating_point() else None for x in texts[index]]
        result += [next(of_videos) if x.is_floating_point() else None for x in videos]
        return tuple(result)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _frame_set(piece: tuple[Tensor, ...]) -> FrameSet:
    frames, weights, *correlation = piece
    strength, neighbour = correlation or (None, None)
    return FrameSet(frames, weights, strength, neighbour)


def _gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that have come together in the floating tensors of a tile."""
    floating = (x for x in tensors if x.is_floating_point())
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in floating)
