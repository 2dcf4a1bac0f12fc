"""The right pairs of a test set: which videos are right for a caption, and their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvr.kernels.ranking import right_pairs
from tvr.trainer.distributed.collectives import all_gather_rows, sum_over_ranks
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.ranking.caption_blocks import BlockLayout, CaptionBlock, Score, paired_scores


@dataclass(frozen=True)
class RightPairs:
    """The right pairs whose video is this rank's own, in the order of the blocks and their rows."""

    caption: Tensor
    """(P,) number of the caption through all ranks."""
    video: Tensor
    """(P,) row of the video among the rank's own."""
    row: Tensor
    """(P,) row of the caption in its block."""
    score: Tensor
    """(P,) similarity."""
    ends: list[int]
    """First pair of each block, and the number of pairs."""

    def of_block(self, number: int) -> slice:
        """The pairs of a block."""
        return slice(self.ends[number], self.ends[number + 1])


def scored_pairs(
    own: Features,
    caption_video: Tensor,
    caption_ids: Tensor | None,
    score: Score,
    layout: BlockLayout,
    videos: range,
    world: World,
) -> RightPairs:
    """Finds the right pairs of this rank's videos, and scores them. All ranks call it.

    Args:
        caption_video: (A,) row of the video of each of the rank's captions.
        caption_ids: (A,) equal numbers for equal captions, which share their videos; None: only a
            caption's own video is right.
        videos: Numbers of the rank's videos.
    """
    first = layout.firsts[world.rank]
    if caption_ids is None:
        caption, video = torch.arange(len(caption_video)), caption_video.cpu()
        # All of them are here, in the order of their videos: no block need pass.
        scores = paired_scores(
            own, own, caption, video, score, world.device, pairs_per_block=layout.part
        )
        return _ordered(caption + first, video, scores.float(), layout, world.device)
    counts = layout.num_captions
    both = torch.stack([caption_video.cpu() + videos.start, caption_ids.cpu()], dim=1)
    both = all_gather_rows(both.to(world.device), world, counts).cpu()
    caption, video = world.run_on_all(
        lambda: right_pairs(both[:, 0], both[:, 1], videos), ValueError
    )
    pairs = _ordered(caption, video - videos.start, torch.zeros(len(video)), layout, world.device)
    for block in layout.blocks(own, world):
        part = pairs.of_block(block.number)
        pairs.score[part] = paired_scores(
            block.texts,
            own,
            pairs.row[part],
            pairs.video[part],
            score,
            world.device,
            pairs_per_block=layout.part,
        ).float()
    return pairs


def count_equal_captions(
    caption_video: Tensor, caption_ids: Tensor, layout: BlockLayout, videos: range, world: World
) -> int:
    """Number of captions of all ranks that equal a caption of another video."""
    both = torch.stack([caption_ids.cpu(), caption_video.cpu() + videos.start], dim=1)
    both = all_gather_rows(both.to(world.device), world, layout.num_captions).cpu()
    ids, sizes = both[:, 0].unique(return_counts=True)
    of_pairs = both.unique(dim=0)[:, 0].contiguous()
    num_videos = torch.bincount(torch.searchsorted(ids, of_pairs), minlength=len(ids))
    return int(sizes[num_videos > 1].sum())


def rows_and_scores(
    pairs: RightPairs, scores: Tensor, block: CaptionBlock, world: World
) -> tuple[Tensor, Tensor]:
    """Row and score of all right pairs of a block, of all ranks, the same on every rank.

    Args:
        scores: (P,) scores of `pairs`.
    """
    part = pairs.of_block(block.number)
    counts = world.all_gather_counts(part.stop - part.start)
    rows = all_gather_rows(pairs.row[part], world, counts)
    return rows, all_gather_rows(scores[part], world, counts)


def several_anywhere(several: bool, world: World) -> bool:
    """True if it is true on any rank."""
    return bool(sum_over_ranks(torch.tensor(int(several), device=world.device), world))


def _ordered(
    caption: Tensor, video: Tensor, score: Tensor, layout: BlockLayout, device: torch.device
) -> RightPairs:
    block, row = layout.places(caption)
    order = row.argsort(stable=True)
    order = order[block[order].argsort(stable=True)]
    ends = torch.searchsorted(block[order], torch.arange(len(layout) + 1)).tolist()
    return RightPairs(
        caption=caption[order].to(device),
        video=video[order].to(device),
        row=row[order].to(device),
        score=score.to(device)[order.to(device)],
        ends=ends,
    )
