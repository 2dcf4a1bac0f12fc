"""Pretrained towers: SigLIP's features, the published shapes of CLIP, freezing and LoRA."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import plain_captions
from builders.pretrained import save_clip, save_siglip, save_siglip2
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipModel,
)

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

from tvr.data_prep.records import Caption, Word, WordKind
from tvr.trainer.config import LossConfig, ModelConfig, TowersConfig, TrainConfig
from tvr.trainer.model.clip_family import joined_clip
from tvr.trainer.model.model import TextVideoModel, build_model, image_size
from tvr.trainer.model.parameter_groups import merge_adapters, parameter_groups
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tvr.trainer.model.tower_depth import depths
from tvr.trainer.model.tower_folders import embed_width, family_of
from tvr.trainer.model.towers import check_tokenizer

MAX_WORDS = 16
CAPTIONS = [
    "a small red circle moves left",
    "a large blue square moves right, then up",
    "two green triangles move slowly",
    "red",
]
TOWERS = TowersConfig(width=32, layers=3, heads=2, embed_width=16, image_size=16, patch_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(4 * CAPTIONS, folder, vocab_size=560, max_words=MAX_WORDS)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SiglipModel]:
    folder = tmp_path_factory.mktemp("siglip")
    return folder, save_siglip(folder, 8 * CAPTIONS, max_words=MAX_WORDS, image_size=24)


def built(tokenizer: Tokenizer, **model: Any) -> TextVideoModel:
    torch.manual_seed(0)
    config = ModelConfig(**({"towers": TOWERS} | model))
    return build_model(config, LossConfig(), tokenizer, num_frames=2)


def pictures(side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(CAPTIONS), 2, 3, side, side)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return frames, torch.ones(shape[:2], dtype=torch.long)


def pooled(output: Any) -> Tensor:
    """The vector that `get_text_features` returns: alone in transformers 4, else in a record."""
    return getattr(output, "pooler_output", output)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_a_siglip_folder_gives_the_features_of_siglip(siglip: tuple[Path, SiglipModel]) -> None:
    folder, theirs = siglip
    config = ModelConfig(pretrained=str(folder))
    assert image_size(config) == 24
    assert embed_width(config) == 32
    words = load_tokenizer(folder, MAX_WORDS)
    token_ids, word_mask = words(plain_captions(*CAPTIONS))
    frames, frame_mask = pictures(24)
    model = build_model(config, LossConfig(), words, num_frames=2).eval()
    pixels: Any = (frames.flatten(0, 1) / 255 - 0.5) / 0.5
    with torch.no_grad():
        features = model(frames, frame_mask, token_ids, word_mask)
        # As in the published code: padded to all positions, without an attention mask.
        text: Any = theirs.get_text_features(input_ids=token_ids)
        image: Any = theirs.get_image_features(pixel_values=pixels)
        masked: Any = theirs.get_text_features(input_ids=token_ids, attention_mask=word_mask)
    assert torch.allclose(features.sentence, unit(pooled(text)), atol=1e-5)
    assert torch.allclose(features.frames.flatten(0, 1), unit(pooled(image)), atol=1e-5)
    # The sentence is the vector of the last position, and words see the whole context.
    assert torch.allclose(features.words[:, -1], features.sentence, atol=1e-6)
    assert not torch.allclose(features.sentence, unit(pooled(masked)), atol=1e-3)
    # Padding and end have one id; the mask is 1 on the end only.
    ends = (token_ids == words.eos_token_id).sum(dim=1) - (word_mask == 0).sum(dim=1)
    assert ends.tolist() == [1] * len(CAPTIONS)


def test_a_siglip_needs_captions_of_all_its_positions(siglip: tuple[Path, SiglipModel]) -> None:
    folder, _ = siglip
    short = load_tokenizer(folder, MAX_WORDS - 1)
    with pytest.raises(ValueError, match=r"data\.max_words=15 must be 16: siglip takes"):
        built(short, pretrained=str(folder))


def test_siglip2_reads_captions_in_lower_case(tmp_path: Path) -> None:
    theirs = save_siglip2(tmp_path / "own", CAPTIONS, max_words=64, image_size=24)
    words = load_tokenizer(tmp_path / "own", 64)
    mixed, lower = (
        words(plain_captions(text)) for text in ("A RED Circle moves", "a red circle moves")
    )
    assert torch.equal(mixed[0], lower[0])
    assert mixed[0].shape == (1, 64)  # all 64 slots are filled, padding at the end
    assert mixed[0][0, :2].tolist() == [words.backend.get_vocab()[piece] for piece in "a\u2581"]
    assert mixed[0][0, 17:20].tolist() == [words.backend.get_vocab()["s"], 1, 0]
    assert mixed[1].sum() == 19
    # The folder alone does not lower them, and a tokeniser that was saved again still does.
    again = tmp_path / "again"
    words.backend.save_pretrained(again)
    assert torch.equal(load_tokenizer(again, 64)(plain_captions("A RED Circle moves"))[0], lower[0])
    assert "Lowercase" not in (tmp_path / "own" / "tokenizer.json").read_text()
    assert torch.equal(
        torch.tensor(AutoTokenizer.from_pretrained(again)("A RED Circle moves").input_ids),
        lower[0][0, :19],
    )
    # Offsets count the characters of the original caption.
    marked = load_tokenizer(tmp_path / "own", 64, content_words=True)
    caption = Caption(text="A RED", words=(Word(2, 5, WordKind.CONTENT),))
    assert marked([caption])[1][0, :7].tolist() == [1, 1, 2, 2, 2, 1, 0]
    model = build_model(
        ModelConfig(pretrained=str(tmp_path / "own")), LossConfig(), words, num_frames=2
    ).eval()
    with torch.no_grad():
        text: Any = theirs.get_text_features(input_ids=lower[0])
        found = model.encode_texts(*mixed)
    assert torch.allclose(found.sentence, unit(pooled(text)), atol=1e-5)


def test_clips_vocabulary_is_read_with_and_without_tokenizer_json(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A folder that names no class is CLIP's, as in earlier releases."""
    tokenizer.backend.save_pretrained(tmp_path / "whole")
    rules = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]
    folder, captions = tmp_path / "files", plain_captions(*CAPTIONS)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(rules["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in rules["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    for name in (None, "tokenizer.json"):
        if name is not None:
            shutil.copy(tmp_path / "whole" / name, folder)
        found = load_tokenizer(folder, MAX_WORDS)(captions)
        assert torch.equal(found[0], tokenizer(captions)[0])


def test_the_patch_form_of_siglip2_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"NaFlex form.*siglip2-base-patch16-224"):
        built(tokenizer, pretrained=str(tmp_path))


def test_content_words_are_refused_with_siglip(siglip: tuple[Path, SiglipModel]) -> None:
    with pytest.raises(ValueError, match=r"data\.content_words needs"):
        load_tokenizer(siglip[0], MAX_WORDS, content_words=True)


def test_a_siglip_without_sentencepiece_names_the_extra(
    siglip: tuple[Path, SiglipModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(ValueError, match=r"pip install 'tvr\[siglip\]'.*SentencePiece"):
        load_tokenizer(siglip[0], MAX_WORDS)


def test_towers_from_scratch_need_a_start_token(
    siglip: tuple[Path, SiglipModel],
) -> None:
    words = load_tokenizer(siglip[0], MAX_WORDS)
    with pytest.raises(ValueError, match="no bos_token, which towers from scratch need"):
        built(words)


def test_another_family_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match=r"type 'blip'; supported are clip, siglip, vision"):
        built(tokenizer, pretrained=str(tmp_path))


def test_a_clip_that_also_lies_there_as_open_clip_writes_it_is_read_as_a_clip(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """As in LAION's folders."""
    save_clip(tmp_path, tokenizer, width=16, image_size=16)
    shape = {"model_cfg": {"embed_dim": 16, "vision_cfg": {"layers": 12}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(shape))
    assert built(tokenizer, pretrained=str(tmp_path)).family.name == "clip"
    # timm's config.json names no type.
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit"}))
    assert family_of(str(tmp_path)) == "pe_core"


def published(patch: int, *, large: bool, eos: int) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Returns the configurations of openai/clip-vit-{base,large}-patchP."""
    width, hidden, layers = (768, 1024, 24) if large else (512, 768, 12)
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        projection_dim=width,
        eos_token_id=eos,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=224,
        patch_size=patch,
        projection_dim=width,
    )
    return text, vision


@pytest.mark.parametrize("patch", [32, 16])
def test_folders_of_the_published_base_shapes(
    patch: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text, vision = published(patch, large=False, eos=tokenizer.eos_token_id)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512
    )
    with no_init_weights():
        CLIPModel(config).half().save_pretrained(tmp_path)
    model = built(tokenizer, pretrained=str(tmp_path), freeze=10, sequence_header_layers=1).eval()
    frames, frame_mask = pictures(224)
    token_ids, word_mask = tokenizer(plain_captions(*CAPTIONS[:2]))
    with torch.no_grad():
        features = model(frames[:1], frame_mask[:1], token_ids, word_mask)
    assert features.sentence.shape == (2, 512)
    assert features.words.shape == (2, MAX_WORDS, 512)
    assert features.frames.shape == (1, 2, 512)
    assert model.image_tower.config.patch_size == patch


def test_the_published_large_shape() -> None:
    text, vision = published(14, large=True, eos=49407)
    with torch.device("meta"):  # shapes without values
        towers = joined_clip(
            CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision)
        )
        model = TextVideoModel(
            towers, ModelConfig(), LossConfig(), num_frames=12, num_words=MAX_WORDS
        )
        frames = towers.family.encode_frames(towers.image, torch.zeros(4, 3, 224, 224))
        words = towers.text.text_projection(torch.zeros(2, MAX_WORDS, text.hidden_size))
    assert frames.shape == (4, 768)
    assert words.shape == (2, MAX_WORDS, 768)
    train = train_config(layer_decay=0.75)
    groups: list[Any] = parameter_groups(model, train)
    lowest = min(group["peak"] for group in groups)
    assert lowest == pytest.approx(train.encoder_learning_rate * 0.75**25)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def train_config(**changes: Any) -> TrainConfig:
    usual = {"learning_rate": 1e-3, "encoder_learning_rate": 1e-4}
    return TrainConfig(steps=1, global_batch=1, micro_batch=1, **(usual | changes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_model.embeddings.token_embedding.weight", 4),
        ("embeddings.position_embedding.weight", 4),
        ("vision_model.embeddings.class_embedding", 4),
        ("vision_model.pre_layrnorm.weight", 4),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", 3),
        ("encoder.layers.2.mlp.fc1.bias", 1),
        ("vision_model.post_layernorm.bias", 0),
        ("text_projection.weight", 0),
        ("head.attention.in_proj_weight", 0),
    ],
)
def test_depth(name: str, expected: int) -> None:
    class Named(nn.Module):
        def named_parameters(self, *args: Any, **options: Any) -> Any:
            layers = [f"encoder.layers.{index}.norm.weight" for index in range(3)]
            return ((each, nn.Parameter()) for each in (name, *layers))

    depth, layers = depths(Named())
    assert (depth[name], layers) == (expected, 3)


def test_rates_fall_towards_the_embeddings(tokenizer: Tokenizer) -> None:
    model = built(tokenizer)
    groups: list[Any] = parameter_groups(model, train_config(layer_decay=0.5))
    peaks = {id(p): group["peak"] for group in groups for p in group["params"]}
    expected = {
        "text_tower.text_projection.weight": 1e-4,
        "text_tower.text_model.encoder.layers.2.mlp.fc1.weight": 0.5e-4,
        "text_tower.text_model.encoder.layers.0.mlp.fc1.bias": 0.125e-4,
        "image_tower.vision_model.embeddings.patch_embedding.weight": 0.0625e-4,
        "text_weight.layers.0.weight": 1e-3,
    }
    for name, peak in expected.items():
        assert peaks[id(model.get_parameter(name))] == pytest.approx(peak), name
    assert all(group["lr"] == group["peak"] for group in groups)


def trained_names(model: TextVideoModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_bottom_layers_are_frozen(tokenizer: Tokenizer) -> None:
    everything = trained_names(built(tokenizer))
    model = built(tokenizer, freeze=2)
    frozen = everything - trained_names(model)
    expected = {
        name
        for name in everything
        if any(part in name for part in (".layers.0.mlp", ".layers.0.self", ".layers.0.layer_norm"))
        or any(part in name for part in (".layers.1.", "embeddings.", "pre_layrnorm"))
    }
    expected = {name for name in expected if "tower." in name}
    assert frozen == expected
    grouped = [p for group in parameter_groups(model, train_config()) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == len(everything) - len(frozen)
    assert all(p.requires_grad for p in grouped)


@pytest.mark.parametrize(
    ("what", "frozen_sides"),
    [("text", ("text",)), ("image", ("image",)), ("both", ("text", "image"))],
)
def test_whole_towers_are_frozen(
    tokenizer: Tokenizer, what: str, frozen_sides: tuple[str, ...]
) -> None:
    names = trained_names(built(tokenizer, freeze=what))
    for side in ("text", "image"):
        assert any(name.startswith(f"{side}_tower.") for name in names) == (
            side not in frozen_sides
        )
    assert any(name.startswith("frame_weight") for name in names)


def test_invalid_freezing_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"model\.freeze=4: the text tower has only 3 layers"):
        built(tokenizer, freeze=4)
    with pytest.raises(
        ValueError, match=r"freeze='text' cannot be combined with model\.lora_rank=2"
    ):
        built(tokenizer, freeze="text", lora_rank=2)
    bare = build_model(
        ModelConfig(towers=TOWERS, interaction="ti", freeze="both"),
        LossConfig(tpm_cl=0),
        tokenizer,
        num_frames=2,
    )
    with pytest.raises(ValueError, match=r"nothing is left to train: model\.freeze"):
        parameter_groups(bare, train_config())


def lora_clip(tokenizer: Tokenizer, folder: Path) -> TextVideoModel:
    return built(tokenizer, lora_rank=2)


def lora_siglip(tokenizer: Tokenizer, folder: Path) -> TextVideoModel:
    words = load_tokenizer(folder, MAX_WORDS)
    return built(words, pretrained=str(folder), lora_rank=2)


@pytest.mark.parametrize("make", [lora_clip, lora_siglip])
def test_lora_starts_at_the_towers_and_merges_into_them(
    tokenizer: Tokenizer,
    siglip: tuple[Path, SiglipModel],
    make: Callable[[Tokenizer, Path], TextVideoModel],
) -> None:
    model = make(tokenizer, siglip[0])
    of_towers = {name for name in trained_names(model) if "tower." in name}
    # Two matrices each for queries and values, in every layer of both towers.
    layers = sum(tower.config.num_hidden_layers for tower in (model.text_tower, model.image_tower))
    assert len(of_towers) == 4 * layers
    assert all(".lora_" in name for name in of_towers)
    assert any(name.startswith("frame_weight") for name in trained_names(model))

    frames, frame_mask = pictures(model.image_tower.config.image_size)
    token_ids = torch.arange(4 * MAX_WORDS).view(4, MAX_WORDS) % 30
    inputs = (frames, frame_mask, token_ids, torch.ones_like(token_ids))
    with torch.no_grad():
        before = model.eval()(*inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        changed = model(*inputs)
        for tower in (model.text_tower, model.image_tower):
            merge_adapters(tower)
        merged = model(*inputs)
    assert not torch.allclose(changed.sentence, before.sentence, atol=1e-2)
    assert not torch.allclose(changed.frames, before.frames, atol=1e-2)
    for kind in ("sentence", "words", "frames"):
        assert torch.allclose(getattr(merged, kind), getattr(changed, kind), atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_lora_starts_with_the_features_of_the_towers_alone(tokenizer: Tokenizer) -> None:
    alone, adapted = built(tokenizer).eval(), built(tokenizer, lora_rank=2).eval()
    token_ids = torch.arange(4 * MAX_WORDS).view(4, MAX_WORDS) % 30
    inputs = (*pictures(16), token_ids, torch.ones_like(token_ids))
    with torch.no_grad():
        assert torch.equal(alone(*inputs).frames, adapted(*inputs).frames)
        assert torch.equal(alone(*inputs).words, adapted(*inputs).words)


def test_lora_without_peft_names_the_extra(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank=2 needs peft \(pip install 'tvr\[lora\]'\)"):
        built(tokenizer, lora_rank=2)


def test_check_tokenizer_follows_the_family(tokenizer: Tokenizer) -> None:
    model = built(tokenizer)
    check_tokenizer(
        model.towers, Tokenizer(tokenizer.backend, MAX_WORDS - 1)
    )  # CLIP may have fewer
