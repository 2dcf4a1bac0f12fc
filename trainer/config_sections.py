"""The sections of the configuration for the data, the model and its training.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass
from tyro.constructors import PrimitiveConstructorSpec

from tvr.data_prep.mixture import block_quotas
from tvr.data_prep.reading.augment import FrameSampling
from tvr.data_prep.video.decoders import Decoder
from tvr.data_prep.video.frame_sampling import FrameSpacing

STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _read_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"{arguments[0]} is no JSON object")
    return value


JsonObject = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_read_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
Freeze = NotNegative | Literal["text", "image", "both"]


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TowersConfig:
    """Shape of CLIP towers that are trained from scratch; ignored with
    `model.pretrained`."""

    width: Positive = 128
    """Hidden width of both towers."""
    layers: Positive = 3
    """Transformer layers of each tower."""
    heads: Positive = 4
    """Attention heads of each layer."""
    embed_width: Positive = 128
    """Width D of the projected text and frame vectors."""
    image_size: Positive = 48
    """Side of the square frames, in pixels."""
    patch_size: Positive = 12
    """Side of an image patch, in pixels."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The two towers and the heads on top."""

    pretrained: str | None = None
    """Local folder with a pretrained CLIP or SigLIP in Hugging Face format.
    None: towers from scratch, as `towers` describes them."""
    tokenizer: str | None = None
    """Local folder with the tokeniser. None: the one in `pretrained`."""
    towers: TowersConfig = TowersConfig()
    """Shape of towers from scratch."""
    freeze: Freeze = 0
    """Weights of the towers that are not trained: a number N freezes the
    embeddings and the bottom N layers of each tower; text, image or both
    freezes whole towers. 0: nothing."""
    lora_rank: NotNegative = 0
    """Rank of LoRA adapters on the towers' queries and values (alpha = 2 x
    rank); the towers' own weights are then frozen. 0: no LoRA. Needs the
    extra `lora`."""
    sequence_header_layers: NotNegative = 0
    """Transformer layers over the frames of a video, on top of the image
    tower. 0: frames are encoded independently."""
    unit_after_header: bool = True
    """Normalises frames to unit length after the sequence header, so that
    similarities are cosines. false: as in the authors' implementation."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    """Similarity of captions and videos. ti and wti compare the sentence
    with the frames; att_ti and att_wti also compare the words. wti and
    att_wti weight tokens by learned weights, ti and att_ti by plain
    means."""
    neighbour_frames: bool = True
    """Adds to each word's best frame the frame that is most similar to that
    frame."""
    weight_layers: Annotated[int, Field(ge=1, le=3)] = 1
    """Linear layers in the token-weight networks of wti and att_wti."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Steps, batch sizes, optimiser, memory, and intervals."""

    steps: Positive
    """Optimiser steps of the whole run."""
    global_batch: Positive
    """Pairs per optimiser step, over all ranks."""
    micro_batch: Positive
    """Pairs per rank and forward. The negatives of a loss come from the
    micro-batches of all ranks. With global_batch > micro_batch x ranks,
    gradients are averaged over several micro-steps, which adds no
    negatives unless `gradient_cache` is on."""
    gradient_cache: bool = False
    """Computes one loss over the whole global batch, of which each rank
    encodes `micro_batch` pairs at a time: micro-batches are encoded
    without a graph, the loss and its gradient at the features are
    computed, and each micro-batch is encoded again for the backward. Use
    it for batches whose activations do not fit. It costs a second
    forward, and host memory for the frames of all micro-batches."""
    exchange: Literal["gather", "ring"] = "gather"
    """How a rank gets the frames of all ranks for its texts. gather: all at
    once. ring: one rank's at a time. Use ring if the gathered frames,
    global_batch x F x D numbers, do not fit."""
    scores: Literal["keep", "stream"] = "keep"
    """keep: the similarities of this rank's texts with all videos stay in
    memory from forward to backward. stream: they are recomputed tile by
    tile. Use stream if that table does not fit; it computes the
    similarity several times."""
    fast_similarity: bool = False
    """In training, rounds words and frames to bfloat16 in the similarity.
    Faster, with an error of up to 0.2 in the logits at temperature 0.01
    (0.01 on a GPU). Evaluation stays exact."""
    similarity_backend: Literal["auto", "compiled", "torch", "dense"] = "auto"
    """Kernels of the similarity in training. compiled: C++, CPU only.
    torch: sparse row sums in the backward. dense: matrix products in the
    backward, for tensor cores. auto: dense on a GPU; on a CPU compiled,
    or torch without a C++ compiler. All give the same result up to
    rounding."""
    compile_similarity: bool = False
    """Compiles the tiles of the dense backend with torch.compile; the other
    backends have nothing to compile."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of the heads."""
    encoder_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-7
    """Peak learning rate of the towers."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the towers' learning rate per layer from top to bottom: the
    top layer has encoder_learning_rate x layer_decay, the embeddings have
    the lowest rate. Parameters above the layers keep
    encoder_learning_rate."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up. A cosine to zero follows."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    """Weight decay of matrices. Biases and norms have none."""
    beta1: Share = 0.9
    """AdamW's decay rate of the gradient's mean."""
    beta2: Share = 0.98
    """AdamW's decay rate of the squared gradient's mean."""
    gradient_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the whole gradient. 0: no clipping."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage of DeepSpeed. 0: nothing is partitioned. 1: optimiser
    state. 2: also gradients. 3: also weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model's weights, activations and gradients. bf16
    needs ZeRO stage 1 to 3; master weights, similarity and loss stay in
    fp32."""
    accumulation_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over micro-steps. bf16 needs
    train.precision bf16; it saves memory, and its rounding error grows
    with the number of micro-steps."""
    reduction_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks. bf16 needs
    train.precision bf16; it halves the traffic, and its rounding error
    grows with the number of ranks."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State kept and updated in host memory, for models that do not fit a
    GPU; slower. optimizer: its state (ZeRO 1 to 3). parameters: also the
    weights (ZeRO 3)."""
    overlap_comm: bool = True
    """On GPUs at ZeRO 2 and 3 without offload, sums gradients over ranks
    while the backward still runs."""
    deepspeed: JsonObject = Field(default_factory=dict)
    """More keys of DeepSpeed's configuration, as a JSON object. Keys that
    other settings control are refused by name."""
    activation_checkpointing: bool = False
    """Recomputes the towers' layers in the backward instead of keeping their
    activations. Less memory, a second forward of the towers."""
    compile: bool = False
    """Compiles the towers' layers with torch.compile (ZeRO 0 to 2). The
    first step of each shape is slow, later ones are faster; results agree
    to rounding. torch caches compiled code in TORCHINDUCTOR_CACHE_DIR."""
    gc_every: NotNegative = 50
    """Steps between runs of Python's garbage collector, at the same step on
    all ranks. It would otherwise start at random, each time on another
    rank, and the others wait. 0: Python decides."""
    seed: NotNegative = 0
    """Seed of weights, dropout and sample order."""
    eval_every: NotNegative = 0
    """Steps between evaluations. 0: only after the last step."""
    log_every: Positive = 1
    """Steps between lines of the log."""
    log_keys: bool = False
    """Writes each rank's sample keys of every step to run_dir/keys."""
    stall_factor: Annotated[float, Field(ge=0.0)] = 20.0
    """Ends the job if a rank makes no progress for this factor x the median
    step, and at least `stall_min_s`; the error names the ranks at fault.
    0: never."""
    stall_min_s: Annotated[float, Field(gt=0.0)] = 300.0
    """Shortest stall in seconds that ends the job, so that a pause of a
    shared file system does not."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """Longest time in seconds for a step, an evaluation or a save, and for a
    rank to wait for the others."""
