"""Ranks by dual softmax and by QB-Norm, in passes over tiles as for the raw ranks.

The pass of the raw ranks also collects a sum for each video and each caption; a second one ranks by
them. The bank of QB-Norm passes before both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvr.kernels.ranking import TIE_TOLERANCE, DirectionRanks
from tvr.kernels.rescoring import (
    add_log_sum,
    dual_softmax_order,
    first_videos,
    qb_norm_order,
)
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.ranking.caption_blocks import BlockLayout, CaptionBlock, Score
from tvr.trainer.ranking.counters import TextRanks, VideoRanks, View
from tvr.trainer.ranking.right_pairs import RightPairs
from tvr.trainer.ranking.sweep import Counter, Tile, sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescoring:
    """What is asked for beside the raw ranks."""

    temperature: float | None = None
    """Of the dual softmax, in units of the similarity; None: no dual softmax."""
    bank: Features | None = None
    """Captions of the bank that this rank gives; None: no QB-Norm."""
    beta: float = 20.0


@dataclass(frozen=True, slots=True)
class RescoredRanks:
    """Ranks by one way of scoring, on the CPU of every rank."""

    text_to_video: DirectionRanks
    video_to_text: DirectionRanks | None
    """None for QB-Norm: captions normalise videos only."""
    facts: dict[str, int]
    """Counts that belong to the result."""


class VideoSums:
    """Log-sum-exp of factor x score of each of this rank's videos, over all captions."""

    def __init__(self, num_videos: int, factor: float, device: torch.device) -> None:
        self.sums = torch.full((num_videos,), -torch.inf, dtype=torch.float64, device=device)
        self._factor = factor

    def start(self, block: CaptionBlock) -> None:
        """Does nothing."""

    def add(self, tile: Tile) -> None:
        """Adds the tile's captions."""
        if len(tile.captions):
            before = self.sums[tile.columns]
            self.sums[tile.columns] = add_log_sum(before, tile.scores, self._factor, dim=0)

    def finish(self, block: CaptionBlock) -> None:
        """Does nothing."""


class CaptionSums:
    """Log-sum-exp of factor x score of each caption, over all videos, the same on every rank."""

    def __init__(self, num_captions: int, factor: float, world: World) -> None:
        self.sums = torch.empty(num_captions, dtype=torch.float64, device=world.device)
        self._factor, self._world = factor, world

    def start(self, block: CaptionBlock) -> None:
        """Begins with no video."""
        self._of_block = self.sums.new_full((len(block.captions),), -torch.inf)

    def add(self, tile: Tile) -> None:
        """Adds the tile's videos."""
        self._of_block = add_log_sum(self._of_block, tile.scores, self._factor, dim=1)

    def finish(self, block: CaptionBlock) -> None:
        """Adds the sums of all ranks."""
        everyones = _of_all_ranks(self._of_block, self._world)
        self.sums[block.captions] = everyones.logsumexp(dim=0)


class ActivationSet:
    """This rank's videos that rank first for a caption of the bank."""

    def __init__(self, first_video: int, num_videos: int, world: World) -> None:
        self.members = torch.zeros(num_videos, dtype=torch.bool, device=world.device)
        self._first, self._world = first_video, world

    def start(self, block: CaptionBlock) -> None:
        """Begins with no video."""
        size, device = (len(block.captions),), self._world.device
        self._best = torch.full(size, -torch.inf, device=device)
        self._video = torch.zeros(size, dtype=torch.int64, device=device)

    def add(self, tile: Tile) -> None:
        """Keeps the best video."""
        self._best, self._video = first_videos(
            tile.scores.float(), self._best, self._video, tile.first_video
        )

    def finish(self, block: CaptionBlock) -> None:
        """Marks the best videos of all ranks that are this rank's."""
        best = _of_all_ranks(self._best, self._world)
        video = _of_all_ranks(self._video, self._world)
        # The first of equal ranks has the lower numbers.
        rank = best.argmax(dim=0, keepdim=True)
        own = video.gather(0, rank).squeeze(0) - self._first
        own = own[(own >= 0) & (own < len(self.members))]
        self.members[own] = True


class Activation:
    """Which captions have their first video in the activation set, the same on every rank."""

    def __init__(self, members: Tensor, num_captions: int, world: World) -> None:
        self.captions = torch.zeros(num_captions, dtype=torch.bool, device=world.device)
        self._members, self._world = members, world

    def start(self, block: CaptionBlock) -> None:
        """Begins with no video."""
        size = (2, len(block.captions))
        self._best = torch.full(size, -torch.inf, device=self._world.device)

    def add(self, tile: Tile) -> None:
        """Keeps the best score of all videos, and that of the activation set."""
        members = self._members[tile.columns]
        scores = tile.scores.float()
        inside = scores.masked_fill(~members, -torch.inf)
        self._best = torch.maximum(self._best, torch.stack([scores.amax(1), inside.amax(1)]))

    def finish(self, block: CaptionBlock) -> None:
        """Compares the best of all ranks; a tie is in the set whatever its rounding."""
        of_all, inside = _of_all_ranks(self._best.T.contiguous(), self._world).amax(0).unbind(1)
        self.captions[block.captions] = inside >= of_all - TIE_TOLERANCE


class Rescorer:
    """Ranks by each way that is asked for.

    `statistics` are to see a pass over all captions first; `ranks` makes a second one. All ranks
    make it and call it.
    """

    def __init__(
        self,
        own: Features,
        score: Score,
        layout: BlockLayout,
        num_videos: tuple[int, ...],
        rescoring: Rescoring,
        world: World,
        scores_per_tile: int,
    ) -> None:
        self._own, self._score, self._layout, self._world = own, score, layout, world
        self._num_videos, self._per_tile = num_videos, scores_per_tile
        self._first, count = sum(num_videos[: world.rank]), num_videos[world.rank]
        self._rescoring = rescoring
        num_captions = sum(layout.num_captions)
        self.statistics: list[Counter] = []
        if rescoring.temperature is not None:
            factor = 1 / rescoring.temperature
            self._video_sums = VideoSums(count, factor, world.device)
            self._caption_sums = CaptionSums(num_captions, factor, world)
            self.statistics += [self._video_sums, self._caption_sums]
        if rescoring.bank is not None:
            members = self._read_bank(rescoring.bank, count)
            self._activation = Activation(members, num_captions, world)
            self.statistics.append(self._activation)

    def _read_bank(self, bank: Features, count: int) -> Tensor:
        """Passes the bank over all videos; returns this rank's part of the activation set."""
        world = self._world
        counts = world.all_gather_counts(len(bank.sentence))
        if not sum(counts):
            raise ValueError("the bank of QB-Norm holds no caption")
        found = ActivationSet(self._first, count, world)
        self._bank_sums = VideoSums(count, self._rescoring.beta, world.device)
        sweep(
            self._own,
            bank,
            self._score,
            BlockLayout(counts, self._layout.part),
            None,
            self._first,
            [found, self._bank_sums],
            world,
            self._per_tile,
            kind="bank caption",
        )
        self._facts = {
            "bank_captions": sum(counts),
            "activation_set": sum(world.all_gather_counts(int(found.members.sum()))),
        }
        return found.members

    def ranks(self, pairs: RightPairs) -> dict[str, RescoredRanks]:
        """Ranks all captions and videos, by the names "dual_softmax" and "qb_norm"."""
        layout, world, rescoring = self._layout, self._world, self._rescoring
        texts: dict[str, TextRanks] = {}
        videos: dict[str, VideoRanks] = {}
        facts: dict[str, int] = {}
        if rescoring.temperature is not None:
            by_video, by_caption, of_texts, of_videos = self._dual_softmax(
                pairs, rescoring.temperature
            )
            texts["dual_softmax"] = TextRanks(pairs, of_texts, layout, world, by_video)
            videos["dual_softmax"] = VideoRanks(
                pairs, of_videos, self._num_videos, world, by_caption
            )
        if rescoring.bank is not None:
            by_bank, of_texts = self._qb_norm(pairs, rescoring.beta)
            texts["qb_norm"] = TextRanks(pairs, of_texts, layout, world, by_bank)
            facts = self._facts | {"normalised_queries": int(self._activation.captions.sum())}
        sweep(
            self._own,
            self._own,
            self._score,
            layout,
            pairs,
            self._first,
            [*texts.values(), *videos.values()],
            world,
            self._per_tile,
        )
        return {
            name: RescoredRanks(
                ranks.result(),
                videos[name].result()[0] if name in videos else None,
                facts if name == "qb_norm" else {},
            )
            for name, ranks in texts.items()
        }

    def _dual_softmax(
        self, pairs: RightPairs, temperature: float
    ) -> tuple[View, View, Tensor, Tensor]:
        """Scores of tiles and of right pairs, from text to video and from video to text."""
        of_videos, of_captions = self._video_sums.sums, self._caption_sums.sums

        def by_video(tile: Tile) -> Tensor:
            sums = of_videos[tile.columns].expand_as(tile.scores)
            return dual_softmax_order(tile.scores, sums, temperature)

        def by_caption(tile: Tile) -> Tensor:
            sums = of_captions[tile.captions][:, None].expand_as(tile.scores)
            return dual_softmax_order(tile.scores, sums, temperature)

        return (
            by_video,
            by_caption,
            dual_softmax_order(pairs.score, of_videos[pairs.video], temperature),
            dual_softmax_order(pairs.score, of_captions[pairs.caption], temperature),
        )

    def _qb_norm(self, pairs: RightPairs, beta: float) -> tuple[View, Tensor]:
        """Scores of tiles and of right pairs, from text to video."""
        sums, active = self._bank_sums.sums, self._activation.captions

        def by_bank(tile: Tile) -> Tensor:
            return qb_norm_order(
                tile.scores,
                sums[tile.columns].expand_as(tile.scores),
                active[tile.captions][:, None].expand_as(tile.scores),
                beta,
            )

        return by_bank, qb_norm_order(pairs.score, sums[pairs.video], active[pairs.caption], beta)


def _of_all_ranks(mine: Tensor, world: World) -> Tensor:
    """(W, ...) the tensors of all ranks, which are equally large."""
    counts = (len(mine),) * world.world_size
    return all_gather_rows(mine, world, counts).view(world.world_size, *mine.shape)
