"""The demo's clips: distinct scenes, complete captions, and rendered motion that matches them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tvr.data_prep import demo_clips
from tvr.data_prep.demo_clips import (
    ANNOTATIONS,
    COLOURS,
    DIRECTIONS,
    FRAME_SIDE,
    NUM_FRAMES,
    SPEEDS,
    MovingObject,
    Scene,
    demo_scenes,
    draw_scenes,
    render,
    scene_captions,
    write_clip,
    write_clips,
)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    return demo_scenes(600, 120, seed=5)


def moving_object(**changes: str) -> MovingObject:
    usual = {
        "colour": "red",
        "shape": "circle",
        "size": "small",
        "direction": "left",
        "speed": "slowly",
    }
    return MovingObject(**(usual | changes))


def scene(*, order: str = "while", second: MovingObject | None = None, **first: str) -> Scene:
    other = second or moving_object(colour="blue", shape="square", direction="up", speed="quickly")
    return Scene(first=moving_object(**first), second=other, order=order)


def test_no_training_scene_looks_like_a_test_scene(
    splits: dict[str, list[Scene]],
) -> None:
    assert {name: len(scenes) for name, scenes in splits.items()} == {
        "train": 600,
        "test": 120,
        "exchanged": 120,
    }
    train, test, exchanged = (
        {one.identity() for one in splits[name]} for name in ("train", "test", "exchanged")
    )
    assert (len(train), len(test), len(exchanged)) == (600, 120, 120)  # all distinct
    assert not train & (test | exchanged)


def test_no_training_scene_is_a_test_scene_with_its_objects_swapped(
    splits: dict[str, list[Scene]],
) -> None:
    def mirrored(one: Scene) -> Scene:
        return replace(one, first=one.second, second=one.first)

    train = set(splits["train"])
    at_once = [one for one in splits["test"] + splits["exchanged"] if one.order == "while"]
    assert len(at_once) > 50
    assert not train & {mirrored(one) for one in at_once}
    # The order of the objects is visible only if they move in turn.
    both = scene(order="while")
    assert both.identity() == mirrored(both).identity()
    turns = scene(order="then")
    assert turns.identity() != mirrored(turns).identity()
    assert turns.identity() != both.identity()


def test_an_exchanged_scene_differs_and_has_the_same_words(splits: dict[str, list[Scene]]) -> None:
    for one, other in zip(splits["test"], splits["exchanged"], strict=True):
        assert other.identity() != one.identity()
        assert other.exchanged() == one
        assert (other.first.colour, other.second.colour) == (one.second.colour, one.first.colour)
        for caption, exchanged in zip(scene_captions(one), scene_captions(other), strict=True):
            assert caption != exchanged
            assert Counter(caption.split()) == Counter(exchanged.split())


def test_captions_contain_all_attributes_and_nothing_else(splits: dict[str, list[Scene]]) -> None:
    glue = {"a", "then", "first", "afterwards", "after", "while", "and", "at", "the", "same"}
    for one in splits["test"]:
        attributes = [
            value
            for each in (one.first, one.second)
            for value in (each.colour, each.shape, each.size, each.direction, each.speed)
        ]
        wordings = scene_captions(one)
        assert len(set(wordings)) == 3
        for caption in wordings:
            words = Counter(caption.replace(",", "").split())
            for word in glue | {"time", "moves"}:
                del words[word]
            assert words == Counter(attributes)


def test_captions_name_the_objects_in_the_order_of_motion() -> None:
    plain, first, after = scene_captions(scene(order="then"))
    for caption in (plain, first):
        assert caption.index("red circle") < caption.index("blue square")
    assert after.startswith("a small blue square moves up quickly after a small red circle")
    distinct = {
        caption for one in (scene(order="then"), scene()) for caption in scene_captions(one)
    }
    assert len(distinct) == 6  # captions for "then" and "while" never coincide


def test_the_two_objects_of_a_scene_differ(splits: dict[str, list[Scene]]) -> None:
    for one in [*splits["train"], *splits["test"]]:
        assert one.first.colour != one.second.colour
        assert one.first.shape != one.second.shape


def test_all_attributes_occur_and_consecutive_scenes_are_often_similar(
    splits: dict[str, list[Scene]],
) -> None:
    train = splits["train"]
    for name, values in (
        ("colour", COLOURS),
        ("shape", demo_clips.SHAPES),
        ("size", demo_clips.SIZES),
        ("direction", DIRECTIONS),
        ("speed", SPEEDS),
    ):
        for side in ("first", "second"):
            counts = Counter(getattr(getattr(one, side), name) for one in train)
            assert set(counts) == set(values)
            assert min(counts.values()) > 600 / len(values) / 2
    assert 200 < sum(one.order == "then" for one in train) < 400

    def differing(one: Scene, other: Scene) -> int:
        sides = ((one.first, other.first), (one.second, other.second))
        names = ("colour", "shape", "size", "direction", "speed")
        return sum(getattr(a, name) != getattr(b, name) for a, b in sides for name in names)

    near = [differing(*pair) == 1 for pair in pairwise(train)]
    assert sum(near) > 100


def test_scenes_depend_on_the_seed(splits: dict[str, list[Scene]]) -> None:
    assert demo_scenes(600, 120, seed=5) == splits
    other = demo_scenes(600, 120, seed=6)
    assert other["test"] != splits["test"]
    assert other["train"] != splits["train"]


def test_requesting_too_many_scenes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, first_two in (("COLOURS", 2), ("SIZES", 1), ("DIRECTIONS", 1), ("SPEEDS", 1)):
        values = list(getattr(demo_clips, name).items())[:first_two]
        monkeypatch.setattr(demo_clips, name, dict(values))
    monkeypatch.setattr(demo_clips, "SHAPES", ("circle", "square"))
    # Two appearances in both orders: in turn (4), or at once (2).
    assert len({one.identity() for one in draw_scenes(6, 0, excluded=set())}) == 6
    with pytest.raises(ValueError, match="7 scenes were requested, but only 6 distinct ones"):
        draw_scenes(7, 0, excluded=set())
    excluded = {draw_scenes(1, 0, excluded=set())[0].identity()}
    with pytest.raises(ValueError, match="only 5 distinct"):
        draw_scenes(6, 0, excluded=excluded)


def painted(frames: np.ndarray, colour: str) -> np.ndarray:
    """(N, H, W) bool: the pixels of exactly this colour."""
    return (frames == np.array(COLOURS[colour], np.uint8)).all(axis=3)


def path_of(frames: np.ndarray, colour: str) -> np.ndarray | None:
    """(N, 2) centre (x, y) of an object in frame sides; None if the other object ever covers it."""
    mask = painted(frames, colour)
    area = mask.sum(axis=(1, 2))
    if area.min() < 0.9 * area.max():
        return None
    rows, columns = np.arange(FRAME_SIDE)[:, None], np.arange(FRAME_SIDE)
    x, y = ((mask * axis).sum(axis=(1, 2)) / area for axis in (columns, rows))
    return np.stack([x, y], axis=1) / FRAME_SIDE


def paths(one: Scene, wanted: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Paths of both objects in renderings where neither covers the other."""
    found = []
    for seed in range(200):
        frames = render(one, seed)
        both = [path_of(frames, each.colour) for each in (one.first, one.second)]
        if both[0] is not None and both[1] is not None:
            found.append((both[0], both[1]))
        if len(found) == wanted:
            return found
    raise AssertionError(f"the objects of {one} always overlap")


def test_rendering_has_the_documented_shape_and_depends_on_the_seed() -> None:
    one = scene()
    frames = render(one, 3)
    assert (frames.shape, frames.dtype) == ((NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
    assert np.array_equal(render(one, 3), frames)
    assert not np.array_equal(render(one, 4), frames)


@pytest.mark.parametrize("direction", sorted(DIRECTIONS))
@pytest.mark.parametrize("order", ["then", "while"])
def test_objects_move_in_the_captioned_direction_and_distance(direction: str, order: str) -> None:
    for speed, distance in SPEEDS.items():
        one = scene(order=order, direction=direction, speed=speed)
        for first, second in paths(one):
            expected = distance * np.array(DIRECTIONS[direction])
            assert np.allclose(first[-1] - first[0], expected, atol=0.02)
            assert np.allclose(second[-1] - second[0], [0, -SPEEDS["quickly"]], atol=0.02)
            along = (first - first[0]) @ np.array(DIRECTIONS[direction])
            assert (np.diff(along) > -0.01).all()  # the object never moves backwards
    assert SPEEDS["quickly"] > 2 * SPEEDS["slowly"]


def test_moving_in_turn_and_at_once_look_different() -> None:
    for order in ("then", "while"):
        one = scene(order=order, speed="quickly")
        for first, second in paths(one):
            middle = NUM_FRAMES // 2
            early = [abs(path[middle - 1] - path[0]).max() for path in (first, second)]
            late = [abs(path[-1] - path[middle]).max() for path in (first, second)]
            if order == "then":
                assert early[0] > 0.4
                assert early[1] < 0.02
                assert late[0] < 0.02
                assert late[1] > 0.4
            else:
                for part in (*early, *late):
                    assert 0.2 < part < 0.35


def alone(**looks: str) -> np.ndarray:
    """(H, W) bool: pixels of the first object, from the rendering that shows most of it."""
    other = moving_object(colour="blue", shape="triangle", direction="up")
    masks = [painted(render(scene(second=other, **looks), seed), "red")[0] for seed in range(5)]
    return max(masks, key=lambda mask: mask.sum())


def test_sizes_and_shapes_are_distinguishable() -> None:
    fill = {}
    for shape in demo_clips.SHAPES:
        small, large = (alone(shape=shape, size=size) for size in ("small", "large"))
        assert large.sum() > 2 * small.sum()
        rows, columns = large.any(axis=1), large.any(axis=0)
        box = large[rows][:, columns]
        fill[shape] = box.mean()
        half = len(box) // 2
        heavier_below = box[-half:].sum() / box[:half].sum()
        assert heavier_below > 1.5 if shape == "triangle" else 0.8 < heavier_below < 1.25
    assert fill["square"] == 1.0
    assert 0.7 < fill["circle"] < 0.9
    assert 0.4 < fill["triangle"] < 0.65
    assert 0.4 < fill["cross"] < 0.65


def test_an_exchanged_clip_differs_only_in_its_colours(splits: dict[str, list[Scene]]) -> None:
    for seed, (one, other) in enumerate(
        zip(splits["test"][:20], splits["exchanged"][:20], strict=True)
    ):
        frames, twin = render(one, seed), render(other, seed)
        assert not np.array_equal(frames, twin)
        for ours, theirs in (
            (one.first.colour, one.second.colour),
            (one.second.colour, one.first.colour),
        ):
            assert np.array_equal(painted(frames, ours), painted(twin, theirs))
        if "white" in (one.first.colour, one.second.colour):
            continue  # the edges of a white object are as grey as the background
        background = np.ptp(frames.astype(int), axis=3) == 0
        assert background.mean() > 0.5
        assert np.array_equal(frames[background], twin[background])


def written(
    folder: Path, scenes: list[Scene], *, prefix: str = "test", training: bool = False
) -> list[str]:
    return list(
        write_clips(folder, scenes, prefix=prefix, seed=9, workers=1, all_wordings=training)
    )


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def test_clips_decode_to_the_rendered_frames(
    splits: dict[str, list[Scene]], tmp_path: Path
) -> None:
    scenes = splits["test"][:4]
    keys = written(tmp_path / "clips", scenes)
    assert keys == [f"test-{index:05d}" for index in range(4)]
    for one, key in zip(scenes, keys, strict=True):
        frames = decoded(tmp_path / "clips" / f"{key}.mp4")
        assert frames.shape == (NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3)
        for each in (one.first, one.second):
            distance = np.abs(frames.astype(int) - COLOURS[each.colour]).max(axis=3)
            # Video stores colour at half the resolution, so the edges of objects are blurred.
            assert all((distance[index] < 40).sum() > 10 for index in (0, -1)), each
    with av.open(str(tmp_path / "clips" / "test-00000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (6, "h264")


def test_writing_twice_gives_the_same_bytes(splits: dict[str, list[Scene]], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        written(tmp_path / folder, splits["test"][:3])
    written(tmp_path / "twins", splits["exchanged"][:3])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [ANNOTATIONS, "test-00000.mp4", "test-00001.mp4", "test-00002.mp4"]
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert content != (tmp_path / "twins" / name).read_bytes()


def test_annotations_hold_all_captions_or_one_in_rotation(
    splits: dict[str, list[Scene]], tmp_path: Path
) -> None:
    scenes = splits["test"][:4]
    for training in (True, False):
        folder = tmp_path / str(training)
        written(folder, scenes, prefix="x", training=training)
        lines = [json.loads(line) for line in (folder / ANNOTATIONS).read_text().splitlines()]
        for index, (line, one) in enumerate(zip(lines, scenes, strict=True)):
            texts = list(scene_captions(one)) if training else [scene_captions(one)[index % 3]]
            assert line == {
                "key": f"x-{index:05d}",
                "video": f"x-{index:05d}.mp4",
                "captions": texts,
            }


def test_the_annotation_file_is_written_last(
    splits: dict[str, list[Scene]], tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    clips = write_clips(
        folder, splits["test"][:12], prefix="x", seed=1, workers=1, all_wordings=False
    )
    for _ in clips:
        assert not (folder / ANNOTATIONS).exists()
    assert (folder / ANNOTATIONS).exists()
    assert len(list(folder.glob("*.mp4"))) == 12


def test_an_interrupted_clip_has_only_a_temporary_name(tmp_path: Path) -> None:
    frames = render(scene(), 0)

    class Interrupted:
        shape = frames.shape

        def __iter__(self) -> Iterator[np.ndarray]:
            for _ in range(20):  # enough for the encoder to emit packets
                yield from frames
            raise KeyboardInterrupt

    clip: Any = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        write_clip(tmp_path / "clip.mp4", clip)
    assert not (tmp_path / "clip.mp4").exists()
    assert list(tmp_path.iterdir()) != []  # the partial file has a temporary name
    write_clip(tmp_path / "clip.mp4", frames)
    assert len(decoded(tmp_path / "clip.mp4")) == NUM_FRAMES
