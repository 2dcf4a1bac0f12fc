"""PE-Core: features as open_clip's and timm's, loading by names, training and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pe_core_files import SIDE, WIDTH, inputs, save_pe_core, weights
from builders.tiny import MAX_WORDS, make_tiny_data, tiny_config
from safetensors.torch import load_file, save_file

from tvr.launchers.cli import main
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.evaluation.export import load_exported
from tvr.trainer.evaluation.model_source import load_source
from tvr.trainer.evaluation.saved_run import load_run
from tvr.trainer.loop import train
from tvr.trainer.model.model import build_model, image_size
from tvr.trainer.model.pe_core_family import VISION_SHAPES, pe_core_towers
from tvr.trainer.model.pe_vision import PeVision, PeVisionConfig
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.model.tower_depth import depths
from tvr.trainer.model.tower_folders import default_words, embed_width

GOLDEN = Path(__file__).parents[1] / "golden" / "pe_core.json"
CONFIG = "open_clip_config.json"


def test_features_are_those_of_open_clip_and_timm(tmp_path: Path) -> None:
    save_pe_core(tmp_path)
    towers = pe_core_towers(str(tmp_path), weights=True)
    ids, mask, pixels = inputs()
    with torch.no_grad():
        sentence, words = towers.family.encode_text(towers.text.eval(), ids, mask)
        frames = towers.family.encode_frames(towers.image.eval(), pixels)
    golden = json.loads(GOLDEN.read_text())
    for found, name in ((sentence, "sentence"), (frames, "frames")):
        expected = torch.tensor(golden[name])
        assert found.shape == expected.shape == (2, WIDTH)
        assert torch.allclose(found, expected, atol=1e-5), name
        assert (expected[0] - expected[1]).abs().max() > 1e-3
    # The sentence is the word of the end token.
    ends = [5, ids.shape[1] - 1]
    assert torch.allclose(words[range(2), ends], sentence, atol=1e-6)


def test_a_folder_is_read_without_weights(tmp_path: Path) -> None:
    save_pe_core(tmp_path)
    config = ModelConfig(pretrained=str(tmp_path))
    assert (image_size(config), embed_width(config)) == (SIDE, WIDTH)
    assert default_words(str(tmp_path)) == 16
    (tmp_path / "open_clip_model.safetensors").unlink()
    towers = pe_core_towers(str(tmp_path), weights=False)
    assert depths(towers.image)[1] == 12
    assert depths(towers.text)[1] == 2
    depth, _ = depths(towers.image)
    assert {name for name, below in depth.items() if below == 13} == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "norm_pre.weight",
        "norm_pre.bias",
    }
    with pytest.raises(ValueError, match=r"holds no open_clip_model\.safetensors"):
        pe_core_towers(str(tmp_path), weights=True)


def test_the_published_shapes() -> None:
    """Numbers of parameters as timm counts them, with the published projections."""
    expected = {
        "vit_pe_core_base_patch16_224": (224, 1024, 93_673_984),
    }
    for name, (side, width, count) in expected.items():
        with torch.device("meta"):
            shape = VISION_SHAPES[name]
            tower = PeVision(PeVisionConfig(image_size=side, projected=width, **shape))
            out = tower(torch.zeros(2, 3, side, side))
        assert out.shape == (2, width)
        assert sum(p.numel() for p in tower.parameters()) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "'vit_base'; supported are those of PE"),
        ({"vision_cfg": {"timm_pool": "avg"}}, "pools by 'avg'"),
        ({"text_cfg": {"hf_model_name": "bert"}}, "text_cfg has the keys"),
    ],
)
def test_another_model_of_open_clip_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_pe_core(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    for name, values in change.items():
        content["model_cfg"][name] |= values
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        pe_core_towers(str(tmp_path), weights=False)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_pe_core(tmp_path)
    kept = {name: value for name, value in weights().items() if "blocks.3.attn.qkv" not in name}
    save_file(kept, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)holds no whole model.*blocks\.3\.attn\.qkv"):
        pe_core_towers(str(tmp_path), weights=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pe")
    make_tiny_data(root, num_train=16)
    words = load_tokenizer(root / "tokenizer", MAX_WORDS)
    save_pe_core(root / "towers", words.vocab_size, MAX_WORDS)
    config = tiny_config(
        root,
        model={"pretrained": str(root / "towers"), "lora_rank": 2},
        train={"steps": 2, "zero_stage": 3, "encoder_learning_rate": 1e-2},
        metrics={"enabled": False},
    )
    train(config, root / "run")
    assert main(["export", "--run-dir", str(root / "run"), "--out", str(root / "out")]) == 0
    return root


def test_an_export_has_the_published_layout(run: Path) -> None:
    theirs = load_file(run / "towers" / "open_clip_model.safetensors")
    ours = load_file(run / "out" / "open_clip_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    model_cfg = [
        json.loads((run / each / CONFIG).read_text())["model_cfg"] for each in ("towers", "out")
    ]
    assert model_cfg[0] == model_cfg[1]
    # LoRA adapted queries and values of the text tower, and the fused layer of the vision tower.
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    layers = {name.rpartition(".")[2] if "in_proj" in name else name for name in changed}
    assert {"in_proj_weight", "visual.trunk.blocks.11.attn.qkv.weight", "logit_scale"} <= layers
    assert all(
        "in_proj_weight" in n or "attn.qkv.weight" in n or n == "logit_scale" for n in changed
    )
    card = (run / "out" / "README.md").read_text()
    assert "import open_clip" in card
    assert "AutoProcessor" not in card


def test_an_export_reproduces_the_run(run: Path) -> None:
    from tvr.trainer.run_dir import read_config

    model, tokenizer, _ = load_run(run / "run", read_config(run / "run"))
    again = load_exported(run / "out").eval()
    frames = torch.randint(0, 256, (2, 3, 3, SIDE, SIDE), dtype=torch.uint8)
    from builders.clip_files import plain_captions

    ids, mask = tokenizer(plain_captions("a small red circle", "a large blue square moves"))
    with torch.no_grad():
        inputs = (frames, torch.ones(2, 3, dtype=torch.long), ids, mask)
        here, there = model.eval()(*inputs), again(*inputs)
    for name in ("sentence", "words", "frames", "word_logits"):
        assert torch.allclose(getattr(here, name), getattr(there, name), atol=1e-5), name
    assert not any("lora" in name for name in again.state_dict())


def test_a_plain_folder_is_a_source(run: Path) -> None:
    load_tokenizer(run / "tokenizer", MAX_WORDS).backend.save_pretrained(run / "towers")
    source = load_source(run / "towers")
    assert source.mean_of_frames
    assert source.max_words == MAX_WORDS
    sentence = source.encode_texts(["a small red circle"]).sentence
    assert sentence.shape == (1, WIDTH)


def test_layers_are_recomputed_and_frozen(run: Path) -> None:
    from tvr.trainer.model.model import checkpoint_activations

    words = load_tokenizer(run / "tokenizer", MAX_WORDS)
    config = ModelConfig(pretrained=str(run / "towers"), freeze=2)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(config, LossConfig(), words, num_frames=1)
        if recompute:
            checkpoint_activations(model)
        ids = torch.arange(2 * MAX_WORDS).view(2, MAX_WORDS) % 50
        ids[:, -1] = words.eos_token_id
        frames = torch.arange(2 * 3 * SIDE * SIDE).view(2, 1, 3, SIDE, SIDE) % 251
        found = model(
            frames.to(torch.uint8), torch.ones(2, 1, dtype=torch.long), ids, torch.ones_like(ids)
        )
        (found.frames[..., 0].sum() + found.words[..., 0].sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "image_tower.blocks.2.attn.qkv.weight" in gradients[0]
    assert "image_tower.blocks.1.attn.qkv.weight" not in gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
