"""The MMEB-V2 score of text-to-video retrieval: Hit@1 with 8 frames a video.

MMEB-V2 (Meng et al. 2025, arXiv 2507.04590; TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4, files `eval.py`,
`experiments/public/eval/video.yaml` and `src/data/eval_dataset/{msrvtt,msvd,vatex}_dataset.py`)
asks one caption of each video, the first one, and ranks the videos of all queries ("eval_type:
global"). A query counts if the best video is its own. The score is text to video only.

Two things differ here. A wrong video that ties with the right one counts against the query, where
MMEB-V2 leaves ties to the order of a sort. Frames are those that this project takes, the middles of
8 equal parts of the video; MMEB-V2 takes 8 of at most 64 evenly spaced ones, the first and the last
among them. Its prompts are for models that follow instructions, and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvr.trainer.comparison.statistics import Interval, bootstrap_interval
from tvr.trainer.records import Evaluation

NUM_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MmebScore:
    """Hit@1 in percent."""

    hit_at_1: float
    interval: Interval
    """95 % interval over the queries."""
    queries: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"MMEB-V2: Hit@1 {self.hit_at_1:.1f} % [{low:.1f}, {high:.1f}], the first caption of"
            f" each of {self.queries:,} videos, {NUM_FRAMES} frames"
        )


def mmeb_v2_score(evaluation: Evaluation) -> MmebScore:
    """The score of an evaluation, from the ranks of its first captions.

    Args:
        evaluation: With its queries, so of rank 0, by a model that took 8 frames of each video.

    Raises:
        ValueError: videos without a query, equal captions count as right, or the captions of a
            video were joined.
    """
    protocol = evaluation.protocol
    check_protocol(protocol.get("equal_captions") == "right", protocol.get("name") == "paragraph")
    first: dict[str, int] = {}
    for query in evaluation.queries:
        first.setdefault(query["key"], query["rank"])
    if len(first) != evaluation.videos:
        raise ValueError(
            f"{evaluation.videos} videos, of which {len(first)} have a caption: MMEB-V2 ranks the"
            " videos of its queries alone"
        )
    hits = [100.0 * (rank == 1) for rank in first.values()]
    return MmebScore(
        hit_at_1=sum(hits) / len(hits), interval=bootstrap_interval(hits), queries=len(hits)
    )


def check_protocol(equal_captions: bool, paragraphs: bool) -> None:
    """Raises ValueError if queries are not single captions with one right video."""
    if equal_captions:
        raise ValueError("MMEB-V2 counts only a caption's own video: leave --equal-captions out")
    if paragraphs:
        raise ValueError("MMEB-V2 asks the first caption of a video: leave --paragraphs out")
