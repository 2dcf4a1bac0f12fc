"""The section `data`: the data sets, and how their samples are read.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass
from tyro.constructors import PrimitiveConstructorSpec

from tvr.data_prep.mixture import block_quotas
from tvr.data_prep.reading.augment import FrameSampling
from tvr.data_prep.video.decoders import Decoder
from tvr.data_prep.video.frame_sampling import FrameSpacing
from tvr.trainer.config_sections.field_types import STRICT, NotNegative, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainSetConfig:
    """One of several training sets."""

    url: str
    """Folder or fsspec URL that `tvr pack` wrote."""
    weight: Annotated[float, Field(gt=0.0)]
    """Share of the training pairs, relative to the other sets' weights."""
    max_bad: NotNegative | None = None
    """Limit for different bad samples of this set. None: `data.max_bad`."""


def _read_sets(arguments: list[str]) -> dict[str, TrainSetConfig]:
    return pydantic.TypeAdapter(dict[str, TrainSetConfig]).validate_json(arguments[0])


TrainSets = Annotated[
    dict[str, TrainSetConfig],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_read_sets,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps({k: asdict(v) for k, v in value.items()})],
    ),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The data sets, and how their samples are read."""

    train: str | None = None
    """Training set: a folder or fsspec URL that `tvr pack` wrote."""
    train_sets: TrainSets = Field(default_factory=dict)
    """Several training sets instead of `train`, which is then None, as a JSON
    object: name -> {"url": ..., "weight": ..., "max_bad": ...}. Each has
    its own epochs, and its share of the pairs is its share of all
    weights. A `max_bad` that is not given is `data.max_bad`."""
    test: str | None = None
    """Test set for evaluations. None: the run is not evaluated."""
    test_exchanged: str | None = None
    """A second test set for the binding accuracy: the same keys in the same
    order as `test`, and the same clips with two attributes swapped (for
    example the colours of two objects)."""
    num_frames: Positive = 12
    """Frames per video."""
    max_words: Annotated[int, Field(ge=3)] = 32
    """Tokens per caption, including the start and the end token. Longer
    captions are cut."""
    frame_sampling: FrameSampling = "centre"
    """Frame taken from each of `num_frames` equal segments of a clip.
    centre: the middle one. random: in training, a random one each time,
    for which the data set must store more than `num_frames` frames."""
    frame_spacing: FrameSpacing = "time"
    """What the segments of `frame_sampling` divide, in the video layout. time:
    the time of a clip. index: its frames by number. Both give the same
    frames for a constant frame rate. The frames layout stores what
    `tvr pack --frame-spacing` chose."""
    crop_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Smallest area of a random crop in training, as a share of the largest
    centred square. CLIP is fine-tuned with 0.9. 1: no random crop;
    training uses the centred square, as evaluation does."""
    decoder: Decoder = "pyav"
    """Video decoder for data sets in the video layout; both give the same
    frames. torchcodec is an optional extra and needs FFmpeg's shared
    libraries."""
    word_drop: bool = False
    """In training, drops some filler words of a caption at random, each time
    anew (the method's caption augmentation). Needs a data set packed with
    words."""
    content_words: bool = False
    """Gives nouns, adjectives and full verbs double weight among a caption's
    words, in training and evaluation (`twm` in the method's code). Needs
    a data set packed with words."""
    features: str | None = None
    """Local folder with stored outputs of the frozen towers for all data
    sets of the run, which are read in place of videos and captions. A run
    makes what is missing there, and so does `tvr features`. Needs
    `model.freeze` both, `frame_sampling` centre, `crop_scale` 1, and no
    `word_drop`. None: videos are decoded and encoded at each visit."""
    features_type: Literal["fp32", "fp16"] = "fp32"
    """Type in which `features` are stored. fp32 trains as from the videos,
    bit for bit on a CPU. fp16 takes half the space, and is inexact."""
    workers: NotNegative = 2
    """Loader processes per rank. Samples and their order do not depend on
    it."""
    cache_mib: NotNegative = 0
    """MiB of memory per loader process for a cache of decoded samples;
    useful for small data sets. 0: no cache."""
    shard_cache: str | None = None
    """Local folder in which the ranks of a node cache shards of remote data
    sets. A node downloads the shards of which it reads at least half, and
    single samples of others. None: each sample is read from the store by
    itself."""
    shard_cache_gib: Positive = 100
    """Largest size of `shard_cache` in GiB. The least recently used shards
    that no process needs now or next are removed first. A size below what
    the loader processes read at once, in all data sets of the run, is
    refused with the number. With room for one more reading window, the
    next shards are downloaded while the present ones are read."""
    hard_batches: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Largest share of a global batch that is filled with groups of similar
    captions, which are hard negatives of each other. An epoch still reads
    each sample once. Captions are similar if they share rare words; they
    are read once, when the run starts. 0: off."""
    hard_group: Annotated[int, Field(ge=2)] = 4
    """Captions in such a group. The pairs of one loss should be a multiple
    of it."""
    hard_every: NotNegative = 0
    """Epochs after which the similarity of captions is found anew, by the
    sentence vectors of the text tower as it is then. 0: by words always."""
    max_bad: NotNegative = 100
    """Largest number of different bad samples that a run replaces, over all
    ranks and restarts; one more stops the run. Each of `train_sets` has
    a limit of its own."""
    max_bad_in_a_row: Positive = 20
    """Largest number of bad samples of a set in a row on one rank, without a
    good one between them; one more stops the run."""
    max_unavailable_in_a_row: Positive = 8
    """Largest number of reads in a row on one rank that fail for the moment,
    such as those of a storage that is down; one more stops the run. Their
    samples are not bad: they do not count for `max_bad`, and are read again
    at their next visit."""

    def __post_init__(self) -> None:
        if self.train is None and not self.train_sets:
            raise ValueError("data.train or data.train_sets must name what to train on")
        if self.train is not None and self.train_sets:
            raise ValueError(
                f"data.train={self.train} and data.train_sets exclude each other; with the sets,"
                " give data.train null in a file, or --data.train None"
            )
        if self.train_sets:
            block_quotas({name: each.weight for name, each in self.train_sets.items()})
        names: dict[str, str] = {}
        for name, each in sorted(self.train_sets.items()):
            other = names.setdefault(each.url.rstrip("/"), name)
            if other != name:
                raise ValueError(
                    f"data.train_sets: {other} and {name} have the same url {each.url}; give one"
                    " of them the sum of their weights"
                )
