"""Demo clips: two coloured shapes that move, captioned by what they do.

Every caption is assembled from the same few words, so that most wrong clips differ from the right
one by a single word, and the clip with the two colours exchanged shares all of them. That is the
hard-negative regime in miniature: telling the clips apart takes binding (which colour belongs to
which shape) and order (which of the two moves first), not a bag of words.
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

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 40),
    "pink": (245, 90, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 0.10, "large": 0.17}  # half extent, in frame sides
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
SPEEDS: dict[str, float] = {"slowly": 0.25, "quickly": 0.6}  # way in frame sides
ORDERS = ("then", "while")

FRAME_SIDE = 64
NUM_FRAMES = 12
FRAME_RATE_HZ = 6
APART = 0.3  # least distance of the two objects at the start, in frame sides
ANNOTATIONS = "captions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """One object: what it looks like and how it moves."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Two objects of different colour and shape; `order` says if the second waits for the first."""

    first: Mover
    second: Mover
    order: str

    def exchanged(self) -> Scene:
        """The same scene with the two objects' colours exchanged: the same bag of words."""
        return replace(
            self,
            first=replace(self.first, colour=self.second.colour),
            second=replace(self.second, colour=self.first.colour),
        )

    def identity(self) -> object:
        """Equal for scenes that look alike: of two that move at once, neither is the first."""
        if self.order == "while":
            return frozenset((self.first, self.second))
        return (self.first, self.second)


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """Three wordings of one scene; each holds all its attributes."""
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
    """Scenes of the splits `train`, `test`, and `exchanged`: `test` with its colours exchanged.

    No training scene looks like a test scene or like the exchanged counterpart of one.

    Raises:
        ValueError: if there are not that many different scenes.
    """
    test = draw_scenes(num_test, seed, taken=set())
    exchanged = [scene.exchanged() for scene in test]
    unseen = {scene.identity() for scene in [*test, *exchanged]}
    return {
        "train": draw_scenes(num_train, seed + 1, taken=unseen),
        "test": test,
        "exchanged": exchanged,
    }


def draw_scenes(count: int, seed: int, *, taken: set[object]) -> list[Scene]:
    """Draws `count` different scenes; about half differ from the one before by one attribute.

    `taken` holds identities that may not be drawn.

    Raises:
        ValueError: if there are not that many different scenes.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    seen = set(taken)
    for _ in range(100 * count):
        if len(scenes) == count:
            break
        near = bool(scenes) and rng.random() < 0.5
        scene = _one_attribute_away(scenes[-1], rng) if near else _any(rng)
        if scene.identity() not in seen:
            seen.add(scene.identity())
            scenes.append(scene)
    if len(scenes) < count:
        raise ValueError(f"{count} scenes were asked for, only {len(scenes)} different ones found")
    return scenes


def render(scene: Scene, seed: int) -> np.ndarray:
    """Draws the scene as uint8 frames (12, 64, 64, 3); places and background depend on `seed`."""
    rng = np.random.default_rng(seed)
    starts = _start_positions(scene, rng)
    background = rng.integers(15, 50) + rng.normal(0.0, 3.0, (FRAME_SIDE, FRAME_SIDE, 1))
    frames = np.empty((NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
    for index in range(NUM_FRAMES):
        time = index / (NUM_FRAMES - 1)
        image = np.broadcast_to(background, (FRAME_SIDE, FRAME_SIDE, 3)).astype(np.float64)
        for mover, start, done in zip(
            (scene.first, scene.second), starts, _progress(scene.order, time), strict=True
        ):
            centre = start + done * SPEEDS[mover.speed] * np.array(DIRECTIONS[mover.direction])
            cover = _coverage(mover, centre)[..., None]
            image = image * (1 - cover) + cover * np.array(COLOURS[mover.colour], np.float64)
        frames[index] = np.clip(image, 0, 255).astype(np.uint8)
    return frames


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encodes frames (N, H, W, 3) as an H.264 mp4; the name appears only when it is complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE_HZ))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1
        # cpu-independent: x264 with AVX-512 gives other bytes on each run otherwise.
        stream.options = {
            "crf": "18",
            "preset": "veryfast",
            "x264-params": "cpu-independent=1",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    aside.replace(path)


def write_clips(
    folder: Path, scenes: list[Scene], *, prefix: str, seed: int, workers: int, all_wordings: bool
) -> Iterator[str]:
    """Renders `folder`/PREFIX-00000.mp4 ... and captions.jsonl; yields keys as they finish.

    A clip has all its wordings as captions, or one, in turn (so that test captions are as many as
    test clips). The number of a clip picks the objects' places: scene i and its exchanged twin i,
    rendered with the same seed to another folder, differ in nothing but the colours. The annotation
    file comes last, so that its presence means that every clip is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(index, f"{prefix}-{index:05d}", scene) for index, scene in enumerate(scenes)]
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(_write_one, folder, seed), jobs, chunksize=8)
    lines = []
    for index, key, scene in jobs:
        wordings = scene_captions(scene)
        said = wordings if all_wordings else (wordings[index % len(wordings)],)
        lines.append(json.dumps({"key": key, "video": f"{key}.mp4", "captions": said}) + "\n")
    aside = folder / f".{ANNOTATIONS}.partial"
    aside.write_text("".join(lines))
    aside.replace(folder / ANNOTATIONS)


def _write_one(folder: Path, seed: int, job: tuple[int, str, Scene]) -> str:
    index, key, scene = job
    write_clip(folder / f"{key}.mp4", render(scene, seed * 1_000_003 + index))
    return key


def _phrase(mover: Mover) -> str:
    return f"{mover.size} {mover.colour} {mover.shape}"


def _verb(mover: Mover) -> str:
    return f"moves {mover.direction} {mover.speed}"


def _any(rng: np.random.Generator) -> Scene:
    colours = rng.permutation(list(COLOURS))[:2]
    shapes = rng.permutation(SHAPES)[:2]
    movers = [
        Mover(
            colour=str(colour),
            shape=str(shape),
            size=str(rng.choice(list(SIZES))),
            direction=str(rng.choice(list(DIRECTIONS))),
            speed=str(rng.choice(list(SPEEDS))),
        )
        for colour, shape in zip(colours, shapes, strict=True)
    ]
    return Scene(first=movers[0], second=movers[1], order=str(rng.choice(ORDERS)))


def _one_attribute_away(scene: Scene, rng: np.random.Generator) -> Scene:
    other = _any(rng)
    names = ("colour", "shape", "size", "direction", "speed")
    side = ("first", "second")[rng.integers(2)]
    name = names[rng.integers(len(names))]
    mover = replace(getattr(scene, side), **{name: getattr(getattr(other, side), name)})
    near = replace(scene, **{side: mover})
    clash = near.first.colour == near.second.colour or near.first.shape == near.second.shape
    return _any(rng) if clash else near


def _start_positions(scene: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    for _ in range(100):
        starts = [_start_position(mover, rng) for mover in (scene.first, scene.second)]
        if np.abs(starts[0] - starts[1]).max() > APART:
            return starts
    raise ValueError(f"no two places {APART} apart for {scene}")


def _start_position(mover: Mover, rng: np.random.Generator) -> np.ndarray:
    margin = SIZES[mover.size] + 0.02
    way = SPEEDS[mover.speed] * np.array(DIRECTIONS[mover.direction])
    low = margin - np.minimum(way, 0.0)
    high = np.maximum(1.0 - margin - np.maximum(way, 0.0), low)
    return rng.uniform(low, high)


def _progress(order: str, time: float) -> tuple[float, float]:
    """How much of its way each object has made at `time` in [0, 1]."""
    if order == "while":
        return time, time
    return min(1.0, 2 * time), max(0.0, 2 * time - 1)


def _coverage(mover: Mover, centre: np.ndarray) -> np.ndarray:
    """The share of each pixel that the object covers, from its signed distance: smooth edges."""
    axis = (np.arange(FRAME_SIDE) + 0.5) / FRAME_SIDE
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    radius = SIZES[mover.size]
    if mover.shape == "circle":
        distance = np.hypot(x, y) - radius
    elif mover.shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    elif mover.shape == "triangle":
        distance = np.maximum(0.894 * np.abs(x) - 0.447 * (y + radius), y - 0.9 * radius)
    else:
        arms = np.minimum(
            np.maximum(np.abs(x), 3 * np.abs(y)), np.maximum(3 * np.abs(x), np.abs(y))
        )
        distance = (arms - radius) / 1.5
    return np.clip(0.5 - distance * FRAME_SIDE, 0.0, 1.0)
