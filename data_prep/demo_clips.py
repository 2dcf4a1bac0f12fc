"""Demo clips: two coloured shapes that move, with captions that describe the motion.

All captions use the same few words. Many clips differ from another clip by a single word, and the
clip with the two colours exchanged has exactly the same words. This gives hard negatives in a small
setting: a model must learn binding (which colour belongs to which shape) and order (which shape
moves first); a bag of words is not enough.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from tvr.launchers.process import end_with_parent

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 40),
    "pink": (245, 90, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 0.10, "large": 0.17}  # half the extent, in frame sides
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
SPEEDS: dict[str, float] = {"slowly": 0.25, "quickly": 0.6}  # distance moved, in frame sides
ORDERS = ("then", "while")

FRAME_SIDE = 64
NUM_FRAMES = 12
FRAME_RATE_HZ = 6
MIN_DISTANCE = 0.3  # between the objects at the start, in frame sides
ANNOTATIONS = "captions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingObject:
    """Appearance and motion of one object."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Two objects of different colour and shape.

    With order "then", the second object moves after the first; with "while", both move at once.
    """

    first: MovingObject
    second: MovingObject
    order: str

    def exchanged(self) -> Scene:
        """Returns the scene with the two objects' colours exchanged; its words are the same."""
        return replace(
            self,
            first=replace(self.first, colour=self.second.colour),
            second=replace(self.second, colour=self.first.colour),
        )

    def identity(self) -> object:
        """Returns a value that is equal for scenes that look alike.

        The order of two objects that move at once is not visible.
        """
        if self.order == "while":
            return frozenset((self.first, self.second))
        return (self.first, self.second)


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """Returns three captions of a scene, each with all its attributes."""
    first, second = _phrase(scene.first), _phrase(scene.second)
    a, b = _verb(scene.first), _verb(scene.second)
    if scene.order == "then":
        return (
            f"a {first} {a}, then a {second} {b}",
            f"first a {first} {a}, afterwards a {second} {b}",
            f"a {second} {b} after a {first} {a}",
        )
    return (
        f"a {first} {a} while a {second} {b}",
        f"a {first} {a} and at the same time a {second} {b}",
        f"a {second} {b} while a {first} {a}",
    )


def demo_scenes(num_train: int, num_test: int, seed: int) -> dict[str, list[Scene]]:
    """Draws the scenes of the splits `train`, `test` and `exchanged`.

    `exchanged` is `test` with the two objects' colours exchanged. No training scene looks like a
    scene of the other splits.

    Raises:
        ValueError: there are not enough distinct scenes.
    """
    test = draw_scenes(num_test, seed, excluded=set())
    exchanged = [scene.exchanged() for scene in test]
    held_out = {scene.identity() for scene in [*test, *exchanged]}
    return {
        "train": draw_scenes(num_train, seed + 1, excluded=held_out),
        "test": test,
        "exchanged": exchanged,
    }


def draw_scenes(count: int, seed: int, *, excluded: set[object]) -> list[Scene]:
    """Draws distinct scenes; about half differ from the previous one by a single attribute.

    Args:
        count: Number of scenes.
        seed: Seed of the generator.
        excluded: Identities of scenes that may not be drawn.

    Raises:
        ValueError: there are not enough distinct scenes.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    seen = set(excluded)
    for _ in range(100 * count):
        if len(scenes) == count:
            break
        is_near = bool(scenes) and rng.random() < 0.5
        scene = _one_attribute_away(scenes[-1], rng) if is_near else _random_scene(rng)
        if scene.identity() not in seen:
            seen.add(scene.identity())
            scenes.append(scene)
    if len(scenes) < count:
        raise ValueError(
            f"{count} scenes were requested, but only {len(scenes)} distinct ones were found"
        )
    return scenes


def render(scene: Scene, seed: int, *, shown: np.ndarray | None = None) -> np.ndarray:
    """Renders a scene to uint8 frames (12, 64, 64, 3).

    The positions of the objects and the background depend on `seed`.

    Args:
        shown: (12, 2) bool, False for an object that is not drawn in a frame; None: both objects
            are in all frames, as in the demo.
    """
    rng = np.random.default_rng(seed)
    starts = _start_positions(scene, rng)
    background = rng.integers(15, 50) + rng.normal(0.0, 3.0, (FRAME_SIDE, FRAME_SIDE, 1))
    frames = np.empty((NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
    for index in range(NUM_FRAMES):
        time = index / (NUM_FRAMES - 1)
        image = np.broadcast_to(background, (FRAME_SIDE, FRAME_SIDE, 3)).astype(np.float64)
        for number, (obj, start, done) in enumerate(
            zip((scene.first, scene.second), starts, _progress(scene.order, time), strict=True)
        ):
            if shown is not None and not shown[index, number]:
                continue
            centre = start + done * SPEEDS[obj.speed] * np.array(DIRECTIONS[obj.direction])
            cover = _coverage(obj, centre)[..., None]
            image = image * (1 - cover) + cover * np.array(COLOURS[obj.colour], np.float64)
        frames[index] = np.clip(image, 0, 255).astype(np.uint8)
    return frames


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encodes frames (N, H, W, 3) as an H.264 MP4; the file appears only when it is complete."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with av.open(str(partial_path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE_HZ))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1
        # Without cpu-independent, x264 with AVX-512 gives different bytes on each run.
        stream.options = {
            "crf": "18",
            "preset": "veryfast",
            "x264-params": "cpu-independent=1",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial_path.replace(path)


def write_clips(
    folder: Path, scenes: list[Scene], *, prefix: str, seed: int, workers: int, all_wordings: bool
) -> Iterator[str]:
    """Renders the clips `folder`/PREFIX-00000.mp4 ... and their annotations, captions.jsonl.

    Scene i of two folders written with the same seed has the same positions and background, so
    that a clip and its exchanged counterpart differ in their colours only. The annotation file is
    written last: it exists only if all clips are complete.

    Args:
        folder: Folder to create.
        scenes: Scene of each clip.
        prefix: Prefix of the keys.
        seed: Seed of the rendering.
        workers: Number of processes.
        all_wordings: Annotate each clip with all its captions; otherwise with one of them, in
            rotation, so that there are as many captions as clips.

    Yields:
        The key of each clip, when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(index, f"{prefix}-{index:05d}", scene) for index, scene in enumerate(scenes)]
    with ProcessPoolExecutor(workers, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        yield from pool.map(partial(_write_one, folder, seed), jobs, chunksize=8)
    lines = []
    for index, key, scene in jobs:
        captions = scene_captions(scene)
        if not all_wordings:
            captions = (captions[index % len(captions)],)
        lines.append(json.dumps({"key": key, "video": f"{key}.mp4", "captions": captions}) + "\n")
    partial_path = folder / f".{ANNOTATIONS}.partial"
    partial_path.write_text("".join(lines))
    partial_path.replace(folder / ANNOTATIONS)


def _write_one(folder: Path, seed: int, job: tuple[int, str, Scene]) -> str:
    index, key, scene = job
    write_clip(folder / f"{key}.mp4", render(scene, seed * 1_000_003 + index))
    return key


def _phrase(obj: MovingObject) -> str:
    return f"{obj.size} {obj.colour} {obj.shape}"


def _verb(obj: MovingObject) -> str:
    return f"moves {obj.direction} {obj.speed}"


def _random_scene(rng: np.random.Generator) -> Scene:
    colours = rng.permutation(list(COLOURS))[:2]
    shapes = rng.permutation(SHAPES)[:2]
    objects = [
        MovingObject(
            colour=str(colour),
            shape=str(shape),
            size=str(rng.choice(list(SIZES))),
            direction=str(rng.choice(list(DIRECTIONS))),
            speed=str(rng.choice(list(SPEEDS))),
        )
        for colour, shape in zip(colours, shapes, strict=True)
    ]
    return Scene(first=objects[0], second=objects[1], order=str(rng.choice(ORDERS)))


def _one_attribute_away(scene: Scene, rng: np.random.Generator) -> Scene:
    other = _random_scene(rng)
    names = ("colour", "shape", "size", "direction", "speed")
    side = ("first", "second")[rng.integers(2)]
    name = names[rng.integers(len(names))]
    obj = replace(getattr(scene, side), **{name: getattr(getattr(other, side), name)})
    near = replace(scene, **{side: obj})
    clash = near.first.colour == near.second.colour or near.first.shape == near.second.shape
    return _random_scene(rng) if clash else near


def _start_positions(scene: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    for _ in range(100):
        starts = [_start_position(obj, rng) for obj in (scene.first, scene.second)]
        if np.abs(starts[0] - starts[1]).max() > MIN_DISTANCE:
            return starts
    raise ValueError(f"no two positions at a distance of {MIN_DISTANCE} for {scene}")


def _start_position(obj: MovingObject, rng: np.random.Generator) -> np.ndarray:
    margin = SIZES[obj.size] + 0.02
    displacement = SPEEDS[obj.speed] * np.array(DIRECTIONS[obj.direction])
    low = margin - np.minimum(displacement, 0.0)
    high = np.maximum(1.0 - margin - np.maximum(displacement, 0.0), low)
    return rng.uniform(low, high)


def _progress(order: str, time: float) -> tuple[float, float]:
    """Share of its distance that each object has moved at `time` in [0, 1]."""
    if order == "while":
        return time, time
    return min(1.0, 2 * time), max(0.0, 2 * time - 1)


def _coverage(obj: MovingObject, centre: np.ndarray) -> np.ndarray:
    """Share of each pixel that the object covers, from its signed distance (smooth edges)."""
    axis = (np.arange(FRAME_SIDE) + 0.5) / FRAME_SIDE
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    radius = SIZES[obj.size]
    if obj.shape == "circle":
        distance = np.hypot(x, y) - radius
    elif obj.shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    elif obj.shape == "triangle":
        distance = np.maximum(0.894 * np.abs(x) - 0.447 * (y + radius), y - 0.9 * radius)
    else:
        arms = np.minimum(
            np.maximum(np.abs(x), 3 * np.abs(y)), np.maximum(3 * np.abs(x), np.abs(y))
        )
        distance = (arms - radius) / 1.5
    return np.clip(0.5 - distance * FRAME_SIDE, 0.0, 1.0)
