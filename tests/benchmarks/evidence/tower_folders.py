"""Writes EfficientNet-Lite0 as a folder for `model.vision_tower`, in timm's form.

    python tests/benchmarks/evidence/tower_folders.py runs/towers

The package's weights are those of TensorFlow's release; timm has the same network under other
names, with its layers in the same order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from evidence.droid_features import PIXEL_MEAN, PIXEL_STD, FrameEncoder, optional  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ARCHITECTURE = "tf_efficientnet_lite0"


def timm_network() -> Any:
    """timm's network with the package's weights, without its classifier.

    Raises:
        ValueError: the two networks do not have the same layers.
    """
    network = optional("timm").create_model(ARCHITECTURE, pretrained=False, num_classes=0)
    given = FrameEncoder().network.state_dict()
    given = {name: value for name, value in given.items() if not name.startswith("_fc.")}
    names = network.state_dict()
    shapes = [value.shape for value in names.values()]
    if shapes != [value.shape for value in given.values()]:
        raise ValueError("the layers of both networks differ: another version of timm?")
    network.load_state_dict(dict(zip(names, given.values(), strict=True)))
    return network.eval()


def write_folder(folder: Path) -> None:
    """Writes config.json and model.safetensors, as transformers' TimmWrapperModel reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    network = timm_network()
    size = 224
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": ARCHITECTURE,
        "num_features": network.num_features,
        "num_labels": 0,
        "num_classes": 0,
        "model_args": {"num_classes": 0},
        "do_pooling": True,
        "global_pool": "avg",
        "pretrained_cfg": {
            "architecture": ARCHITECTURE,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [PIXEL_MEAN] * 3,
            "std": [PIXEL_STD] * 3,
            "num_classes": 0,
            "pool_size": [7, 7],
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }
    weights = {f"timm_model.{k}": v.contiguous() for k, v in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Largest difference between the folder's and the package's pooled vectors, relative."""
    transformers = optional("transformers")
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = FrameEncoder().network.extract_features(pixels).mean((2, 3))
    found = model(pixels).pooler_output
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    place = Path(sys.argv[1]) / "efficientnet_lite0"
    write_folder(place)
    print(json.dumps({"folder": str(place), "largest_difference": largest_difference(place)}))
