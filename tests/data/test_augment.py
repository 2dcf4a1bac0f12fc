"""Random frames and crops of training: the same for any number of ranks and workers."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any, get_args

import numpy as np
import pytest
from builders.batches import evaluation, training
from builders.clip_files import write_clips
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.dataset.manifest import Layout
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.augment import (
    NO_AUGMENTATION,
    Augmentation,
    Box,
    Crop,
    View,
    crop_box,
    crop_frames,
)
from tvr.data_prep.reading.order import SampleOrder, uniforms
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Batch
from tvr.data_prep.video.decoders import describe_decoder, frame_sampler
from tvr.data_prep.video.frame_sampling import segment_centres, segment_frames
from tvr.data_prep.video.images import fit_square

# torch warns if there are more workers than cores; the views must not depend on the cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

RANDOM = Augmentation(frame_sampling="random", crop_scale=0.5)
NUM_SAMPLES = 7
train = partial(training, micro_batch=4, num_frames=3, augmentation=RANDOM)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets of clips of 8 frames."""
    folder = tmp_path_factory.mktemp("augment")
    clips = write_clips(folder, NUM_SAMPLES, num_frames=8)
    for layout in get_args(Layout):
        pack_shards(clips, str(folder / layout), layout=layout, num_frames=8, samples_per_shard=5)
    return {layout: str(folder / layout) for layout in get_args(Layout)}


def pixels(batches: list[Batch]) -> dict[int, np.ndarray]:
    """Stream position -> (F, H, W, 3)."""
    return {
        position: frames
        for batch in batches
        for position, frames in zip(
            batch.positions.tolist(), batch.frames.permute(0, 1, 3, 4, 2).numpy(), strict=True
        )
    }


def same(some: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> bool:
    return some.keys() == others.keys() and all(
        np.array_equal(frames, others[position]) for position, frames in some.items()
    )


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_batches_do_not_depend_on_ranks_workers_or_restarts(
    urls: dict[str, str], layout: str
) -> None:
    expected = pixels(list(islice(train(urls[layout]), 8)))
    assert sorted(expected) == list(range(32))
    assert same(pixels(list(islice(train(urls[layout], workers=2), 8))), expected)
    ranks = [train(urls[layout], rank=rank, world_size=2) for rank in range(2)]
    assert same(pixels([batch for rank in ranks for batch in islice(rank, 4)]), expected)
    resumed = pixels(list(islice(train(urls[layout], start_step=2, workers=1), 4)))
    assert same(resumed, {position: expected[position] for position in range(16, 32)})
    assert not same(pixels(list(islice(train(urls[layout], seed=8), 8))), expected)
    assert not same(
        pixels(list(islice(train(urls[layout], augmentation=NO_AUGMENTATION), 8))), expected
    )


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_batches_hold_the_drawn_frames(urls: dict[str, str], layout: str) -> None:
    augmentation = Augmentation(frame_sampling="random")
    batches = list(islice(train(urls[layout], augmentation=augmentation, image_size=32), 8))
    order, seen = SampleOrder([5, 2], seed=7), set()
    reader = SampleReader(urls[layout], num_frames=8, image_size=32)
    for position, frames in pixels(batches).items():
        row = order.locate(position).sample
        chosen = segment_frames(8, 3, uniforms("frames", 7, position, 3).tolist())
        assert np.array_equal(frames, reader.read(row).frames[chosen])
        seen.add((row, *chosen))
    assert len(seen) > 2 * NUM_SAMPLES  # a clip shows other frames in the next epoch
    assert len({frame for _, *chosen in seen for frame in chosen}) == 8


def test_times_belong_to_the_frames(urls: dict[str, str]) -> None:
    view = View(offsets=(0.0, 0.5, 0.999), crop=None)
    for url in urls.values():
        reader = SampleReader(url, num_frames=3, image_size=32)
        assert reader.read(0, view).frame_times_s == (0.0, 0.4, 0.7)
        cached = SampleReader(url, num_frames=3, image_size=32, cache_bytes=1 << 20)
        if reader.manifest.layout == "frames":
            assert [cached.read(0, view).frame_times_s for _ in range(2)] == [(0.0, 0.4, 0.7)] * 2


@pytest.mark.parametrize(
    ("layout", "augmentation"),
    [
        ("frames", RANDOM),
        ("frames", Augmentation(frame_sampling="random")),
        ("frames", Augmentation(crop_scale=0.9)),
        ("video", Augmentation(crop_scale=0.9)),
    ],
)
def test_the_cache_decodes_each_sample_once(
    urls: dict[str, str], layout: str, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pixels(list(islice(train(urls[layout], augmentation=augmentation), 8)))
    decoded: list[int] = []
    decode = SampleReader.decode
    monkeypatch.setattr(
        SampleReader,
        "decode",
        lambda self, row, *rest, **options: (
            decoded.append(row) or decode(self, row, *rest, **options)
        ),
    )
    batches = list(islice(train(urls[layout], augmentation=augmentation, cache_bytes=1 << 20), 8))
    assert same(pixels(batches), expected)
    assert sorted(decoded) == list(range(NUM_SAMPLES))


def test_the_cache_is_refused_if_frames_differ_each_time(urls: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"cache_bytes=9 .* must be 0 .* frame_sampling=random"):
        train(urls["video"], cache_bytes=9)


def test_evaluation_uses_middle_frames_and_centre_squares(urls: dict[str, str]) -> None:
    for url in urls.values():
        reader = SampleReader(url, num_frames=8, image_size=32)
        for row, frames in pixels(evaluation(url, num_frames=3, image_size=32)).items():
            assert np.array_equal(frames, reader.read(row).frames[segment_centres(8, 3)])


sides = st.integers(1, 500)
shares = st.floats(0, 1, exclude_max=True)
crops = st.builds(Crop, share=st.floats(0.05, 1), shape=shares, down=shares, right=shares)


@given(crops, sides, sides)
def test_a_crop_lies_within_the_picture(crop: Crop, height: int, width: int) -> None:
    box = crop_box(crop, height, width)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


@given(crops, st.integers(100, 500), st.integers(100, 500))
def test_a_crop_has_the_requested_area_and_aspect_ratio(
    crop: Crop, height: int, width: int
) -> None:
    box = crop_box(crop, height, width)
    assert box.height * box.width / min(height, width) ** 2 == pytest.approx(crop.share, rel=0.05)
    assert 0.72 < box.width / box.height < 1.39  # 3/4 to 4/3, up to rounding to pixels


@given(st.floats(0.01, 1), st.integers(0, 2**62), st.integers(0, 2**62))
def test_drawn_areas_are_in_range(crop_scale: float, seed: int, position: int) -> None:
    view = Augmentation(crop_scale=crop_scale).draw(seed, position, 4)
    if view is not None:
        assert view.offsets is None
        assert view.crop is not None
        assert crop_scale <= view.crop.share <= 1
    assert (view is None) == (crop_scale == 1)


def test_crops_are_uniform_over_the_picture() -> None:
    augmentation = Augmentation(crop_scale=0.5)
    drawn = [augmentation.draw(3, position, 4) for position in range(2000)]
    boxes = [crop_box(view.crop, 90, 160) for view in drawn if view and view.crop]
    assert len(boxes) == 2000
    areas = np.array([box.height * box.width for box in boxes]) / 90**2
    assert np.percentile(areas, [0, 25, 50, 75, 100]) == pytest.approx(
        [0.5, 0.625, 0.75, 0.875, 1.0], abs=0.03
    )
    centres = np.array([box.left + box.width / 2 for box in boxes])
    assert centres.mean() == pytest.approx(80, abs=2)
    assert centres.min() < 45
    assert centres.max() > 115


def test_golden_views() -> None:
    """Golden values: changing them changes the data of resumed runs."""
    view = Augmentation(frame_sampling="random", crop_scale=0.9).draw(7, 123, 2)
    assert view is not None
    assert view.crop is not None
    assert view.offsets == pytest.approx(GOLDEN_OFFSETS, abs=1e-15)
    assert crop_box(view.crop, 240, 320) == GOLDEN_BOX


GOLDEN_OFFSETS = (0.10316887080080162, 0.8058758349558178)
GOLDEN_BOX = Box(top=5, left=27, height=204, width=268)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_cropping_the_whole_of_a_square_equals_fit_square(
    side: int, image_size: int, seed: int
) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    whole = Box(top=0, left=0, height=side, width=side)
    cut = crop_frames(frames, whole, image_size)
    assert cut.shape == (2, image_size, image_size, 3)
    assert np.array_equal(cut, fit_square(frames, image_size))


def test_pixels_outside_the_box_do_not_matter() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    box = Box(top=7, left=11, height=20, width=25)
    inside = frames[:, 7:27, 11:36].copy()
    expected = crop_frames(inside, Box(top=0, left=0, height=20, width=25), 16)
    assert np.array_equal(crop_frames(frames, box, 16), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_sampling": "middle"}, "frame_sampling='middle' must be centre or random"),
        ({"crop_scale": 0.0}, r"crop_scale=0.0 must be above 0 and at most 1 \(data.crop_scale\)"),
        ({"crop_scale": 1.5}, "crop_scale=1.5 must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_torchcodec_gives_the_same_batches(urls: dict[str, str]) -> None:
    try:
        frame_sampler("torchcodec")
    except ValueError as error:
        pytest.skip(str(error))
    expected = pixels(list(islice(train(urls["video"]), 4)))
    for workers in (0, 2):
        batches = train(urls["video"], decoder="torchcodec", workers=workers)
        assert same(pixels(list(islice(batches, 4))), expected)
    assert "decoded by torchcodec" in describe_decoder("torchcodec")


def test_the_decoder_in_use_is_reported(
    monkeypatch: pytest.MonkeyPatch, urls: dict[str, str]
) -> None:
    assert describe_decoder("pyav").startswith("videos: decoded by PyAV ")
    monkeypatch.setitem(__import__("sys").modules, "tvr.data_prep.video.decode_torchcodec", None)
    assert "cannot be decoded: decoder=torchcodec (data.decoder) needs" in describe_decoder(
        "torchcodec"
    )
    with pytest.raises(ValueError, match=r"data\.decoder"):
        train(urls["video"], decoder="torchcodec")
