"""Side, mean and standard deviation of the frames of a vision encoder, from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvr.trainer.model.towers import Channels

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """The frames that a vision encoder takes: (3, side, side), (value in 0 to 1 - mean) / std."""

    side: int
    mean: Channels
    std: Channels


def pixel_format(folder: Path, config: Any, *, fixed_side: bool, setting: str) -> PixelFormat:
    """Reads the format from preprocessor_config.json, or from the configuration of timm.

    Args:
        config: Configuration of the vision encoder.
        fixed_side: True if its own `image_size` holds, not the size of the file.
        setting: Name of the setting that gives the folder, for errors.

    Raises:
        ValueError: nothing names the format, or frames are not squares.
    """
    where = f"{setting}={str(folder)!r}"
    timm = getattr(config, "pretrained_cfg", None)
    found = _image_processor(folder)
    if found is None and isinstance(timm, dict):
        size = timm.get("input_size", (None, None, None))
        found = {
            "size": {"height": size[1], "width": size[2]},
            "image_mean": timm.get("mean"),
            "image_std": timm.get("std"),
        }
    if found is None:
        raise ValueError(
            f"{where} has no {FILES[0]} (nor {FILES[1]} with an image_processor), so the mean,"
            " standard deviation and side of its frames are unknown; save the encoder's image"
            " processor to this folder"
        )
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)
    if found.get("do_normalize", True):
        mean, std = (_channels(found, name, where) for name in ("image_mean", "image_std"))
    crops = found.get("do_center_crop", "crop_size" in found) and found.get("crop_size")
    named = config.image_size if fixed_side else found["crop_size"] if crops else found.get("size")
    return PixelFormat(side=_side(named, where), mean=mean, std=std)


def _image_processor(folder: Path) -> dict[str, Any] | None:
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        content = content.get("image_processor", content)
        if isinstance(content, dict) and ("image_mean" in content or "size" in content):
            return content
    return None


def _channels(found: dict[str, Any], name: str, where: str) -> Channels:
    value = found.get(name)
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{where}: {FILES[0]} names {name}={value!r}; it must be three numbers")
    red, green, blue = map(float, value)
    return red, green, blue


def _side(size: Any, where: str) -> int:
    if isinstance(size, dict):
        sides = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    else:
        sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ValueError(f"{where} takes frames of {size}, not squares of one side")
    return sides[0]
