"""Dual encoders: any text encoder beside any vision encoder, from two folders or from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import plain_captions
from builders.tower_pairs import (
    MEAN,
    SIDE,
    STD,
    TEXT_SHAPES,
    VISION_SHAPES,
    save_text_encoder,
    save_vision_encoder,
)
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel

from tvr.trainer.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TowersConfig,
    TrainConfig,
)
from tvr.trainer.dry_run.synthetic_step import random_batches
from tvr.trainer.evaluation.model_source import load_source
from tvr.trainer.explanation.tokens import token_texts
from tvr.trainer.memory.model_memory import activation_bytes
from tvr.trainer.model.model import (
    TextVideoModel,
    build_empty_model,
    build_model,
    checkpoint_activations,
    image_size,
)
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.model.tower_depth import depths, tower_layers
from tvr.trainer.model.tower_folders import embed_width

MAX_WORDS, D = 16, 24
CAPTIONS = ["A small red circle moves left", "a Large blue square moves right, then up"]
ALSO_HEADS = ("text_projection.weight", "visual_projection.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    for kind in TEXT_SHAPES:
        save_text_encoder(root / kind, kind, CAPTIONS)
    for kind in VISION_SHAPES:
        save_vision_encoder(root / kind, kind)
    save_text_encoder(root / "mean", "bert", CAPTIONS, pooling="mean_tokens")
    save_text_encoder(root / "cls", "bert", CAPTIONS, pooling="cls_token")
    return root


def settings(folders: Path, text: str, vision: str, **changes: Any) -> ModelConfig:
    return ModelConfig(
        text_tower=str(folders / text),
        vision_tower=str(folders / vision),
        towers=TowersConfig(embed_width=D),
        **changes,
    )


def built(folders: Path, text: str = "bert", vision: str = "vit", **changes: Any) -> TextVideoModel:
    torch.manual_seed(0)
    words = load_tokenizer(folders / text, MAX_WORDS)
    model = settings(folders, text, vision, **changes)
    return build_model(model, LossConfig(), words, num_frames=2)


def inputs(folders: Path, text: str, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, mask = load_tokenizer(folders / text, MAX_WORDS)(plain_captions(*CAPTIONS))
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 2, 3, side, side), dtype=torch.uint8, generator=generator)
    return frames, torch.ones(2, 2, dtype=torch.long), ids, mask


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def pixels(frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (frames.flatten(0, 1) / 255 - mean) / std


SENTENCE = {kind: "pooler" for kind in TEXT_SHAPES} | {
    "distilbert": "class",
    "electra": "class",
    "modernbert": "class",
    "mean": "mean",
    "cls": "class",
}
FRAME = {kind: "pooler" for kind in VISION_SHAPES} | {"pvt": "class", "pvt_v2": "mean"}
PAIRS = [(text, "vit") for text in SENTENCE] + [("bert", vision) for vision in FRAME]


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_features_are_those_of_the_encoders(folders: Path, text: str, vision: str) -> None:
    from transformers import AutoModel

    model = built(folders, text, vision).eval()
    frames, frame_mask, ids, mask = inputs(folders, text)
    with torch.no_grad():
        found = model(frames, frame_mask, ids, mask)
        texts: Any = AutoModel.from_pretrained(folders / text)(input_ids=ids, attention_mask=mask)
        images: Any = AutoModel.from_pretrained(folders / vision)(pixel_values=pixels(frames))
        words = texts.last_hidden_state
        rows = [row[: int(valid.sum())].mean(0) for row, valid in zip(words, mask, strict=True)]
        sentences = {"class": words[:, 0], "mean": torch.stack(rows)}
        sentence = texts.pooler_output if SENTENCE[text] == "pooler" else sentences[SENTENCE[text]]
        hidden = images.last_hidden_state
        if FRAME[vision] == "pooler":
            frame = images.pooler_output.flatten(1)
        else:
            frame = hidden[:, 0] if FRAME[vision] == "class" else hidden.mean((2, 3))
        assert model.text_projection is not None
        assert model.visual_projection is not None
        projected = [unit(model.text_projection(each)) for each in (sentence, words)]
        frame = unit(model.visual_projection(frame))
    assert torch.allclose(found.sentence, projected[0], atol=1e-5)
    assert torch.allclose(found.words, projected[1], atol=1e-5)
    assert torch.allclose(found.frames.flatten(0, 1), frame, atol=1e-5)
    assert found.sentence.shape == (2, D)
    # Sentences and frames differ from each other: nothing is constant.
    assert not torch.allclose(found.sentence[0], found.sentence[1], atol=1e-4)
    assert not torch.allclose(found.frames[0, 0], found.frames[1, 1], atol=1e-4)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_every_trained_weight_gets_a_gradient(folders: Path, text: str, vision: str) -> None:
    model = built(folders, text, vision, freeze=1)
    checkpoint_activations(model)
    found = model(*inputs(folders, text))
    assert found.margin_hinge is not None
    total = sum(x.sum() for x in (found.words * torch.randn(D), found.sentence[:, 0]))
    (total + (found.frames * torch.randn(D)).sum() + found.margin_hinge.sum()).backward()
    towers = (model.text_tower, model.image_tower)
    for tower in towers:
        depth, layers = depths(tower)
        assert layers >= 2
        for name, parameter in tower.named_parameters():
            trained = depth[name] < layers and not name.endswith("mask_token")
            assert (parameter.grad is not None) == parameter.requires_grad == trained, name
    for name in ALSO_HEADS:
        assert model.get_parameter(name).grad is not None


RECOMPUTED = [("mpnet", "pvt"), ("bert", "vit"), ("bert", "convnext")]


@pytest.mark.parametrize(("text", "vision"), RECOMPUTED)
def test_layers_are_recomputed(folders: Path, text: str, vision: str) -> None:
    gradients, calls = [], []
    for recompute in (False, True):
        model = built(folders, text, vision)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        towers = (model.text_tower, model.image_tower)
        if recompute:
            checkpoint_activations(model)
        layers = [layer for tower in towers for layer in tower_layers(tower)]
        assert len(layers) == sum(depths(tower)[1] for tower in towers)
        ran: list[int] = []
        for layer in layers:
            norm = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm | nn.Linear))
            norm.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        found = model(*inputs(folders, text))
        total = found.words[..., 0].sum() + found.frames[..., 0].sum()
        (total + found.sentence[:, 1].sum()).backward()
        calls.append(len(ran) / len(layers))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert calls == [1, 2]  # each layer runs again in the backward
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_new_projections_are_heads(folders: Path) -> None:
    model = built(folders, freeze="both")
    train = TrainConfig(
        steps=1, global_batch=1, micro_batch=1, learning_rate=1e-3, encoder_learning_rate=1e-5
    )
    groups: list[Any] = parameter_groups(model, train)
    peaks = {id(p): group["peak"] for group in groups for p in group["params"]}
    assert all(id(p) not in peaks for p in model.text_tower.parameters())
    assert [peaks[id(model.get_parameter(name))] for name in ALSO_HEADS] == [1e-3, 1e-3]
    # They follow the seed alone.
    again = built(folders, freeze="both")
    for name in ALSO_HEADS:
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))


@pytest.mark.parametrize(
    ("text", "vision", "targets"),
    [
        ("bert", "vit", ({"query", "value"}, {"q_proj", "v_proj", "query", "value"})),
        ("distilbert", "pvt", ({"q_lin", "v_lin"}, {"query", "value"})),
        ("mpnet", "pvt_v2", ({"q", "v"}, {"query", "value"})),
        ("modernbert", "swin", ({"Wqkv"}, {"q_proj", "v_proj", "query", "value"})),
    ],
)
def test_lora_adapts_queries_and_values(
    folders: Path, text: str, vision: str, targets: tuple[set[str], set[str]]
) -> None:
    model = built(folders, text, vision, lora_rank=2)
    for tower, expected in zip((model.text_tower, model.image_tower), targets, strict=True):
        trained = {name for name, p in tower.named_parameters() if p.requires_grad}
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
        assert adapted
        assert adapted <= expected
    assert all(model.get_parameter(name).requires_grad for name in ALSO_HEADS)


def test_what_a_tower_does_not_have_is_named(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_rank=2: the image tower ConvNextModel has no"):
        built(folders, vision="convnext", lora_rank=2)
    with pytest.raises(ValueError, match=r"model\.freeze=9: the text tower has only 2 layers"):
        built(folders, freeze=9)


def test_batch_norms_keep_their_statistics(folders: Path) -> None:
    model = built(folders, vision="resnet")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    both = inputs(folders, "bert")
    alone = model.train()(both[0][:1], both[1][:1], both[2][:1], both[3][:1])
    together = model(*both)
    assert torch.allclose(together.frames[0], alone.frames[0], atol=1e-5)
    after = [norm.running_mean for norm in norms if norm.running_mean is not None]
    assert len(before) == len(norms) > 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_folder_without_a_pooler_gives_the_first_token(folders: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    save_text_encoder(tmp_path, "bert", CAPTIONS)
    encoder = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    model = ModelConfig(
        text_tower=str(tmp_path), vision_tower=str(folders / "vit"), towers=TowersConfig()
    )
    words = load_tokenizer(tmp_path, MAX_WORDS)
    found = build_model(model, LossConfig(), words, num_frames=2).eval()
    assert found.family.pooling == ("class", "pooler")
    sentence, tokens = found.text_vectors(*words(plain_captions(*CAPTIONS)))
    assert torch.allclose(sentence, tokens[:, 0], atol=1e-6)


@pytest.mark.parametrize("text", ["bert", "mean"])
def test_a_model_without_values_has_the_same_weights(folders: Path, text: str) -> None:
    model = built(folders, text)
    words = load_tokenizer(folders / text, MAX_WORDS)
    config = settings(folders, text, "vit")
    empty = build_empty_model(config, LossConfig(), words, num_frames=2)
    ours, theirs = (
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in each.named_parameters()]
        for each in (model, empty)
    )
    assert ours == theirs
    assert embed_width(config) == D
    assert image_size(config) == SIDE


def test_a_half_precision_dual_encoder_folder_is_that_of_hugging_face(
    folders: Path, tmp_path: Path
) -> None:
    theirs = VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(folders / "vit"), str(folders / "bert")
    )
    theirs.half().save_pretrained(tmp_path)
    theirs = theirs.float().eval()
    load_tokenizer(folders / "bert", MAX_WORDS).backend.save_pretrained(tmp_path)
    config = ModelConfig(pretrained=str(tmp_path))
    words = load_tokenizer(tmp_path, MAX_WORDS)
    with pytest.raises(ValueError, match=r"model\.pretrained=.* has no preprocessor_config\.json"):
        image_size(config)
    file = "preprocessor_config.json"
    (tmp_path / file).write_text((folders / "vit" / file).read_text())
    model = build_model(config, LossConfig(), words, num_frames=2).eval()
    frames, frame_mask, ids, mask = inputs(folders, "bert")
    with torch.no_grad():
        found = model(frames, frame_mask, ids, mask)
        out: Any = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels(frames))
    assert torch.allclose(found.sentence, out.text_embeds, atol=1e-5)
    assert torch.allclose(found.frames.flatten(0, 1), out.image_embeds, atol=1e-5)
    assert found.sentence.dtype == torch.float32
    assert embed_width(config) == found.sentence.shape[1] == 512
    assert next(model.parameters()).dtype == torch.float32
    source = load_source(tmp_path)
    assert source.mean_of_frames
    assert source.encode_texts(["a small red circle"]).sentence.shape == (1, 512)


def test_word_pieces_mark_content_words(folders: Path) -> None:
    from tvr.data_prep.packing.words import WordTagger

    words = load_tokenizer(folders / "bert", MAX_WORDS, content_words=True)
    (caption,) = WordTagger([]).tag([CAPTIONS[0]])
    ids, mask = words([caption])
    tokens = words.backend.convert_ids_to_tokens(ids[0].tolist())
    assert tokens[0] == "[CLS]"
    end = tokens.index("[SEP]")
    assert mask[0, [0, end]].tolist() == [1, 1]
    assert mask[0, end + 1 :].eq(0).all()
    assert set(tokens[end + 1 :]) == {"[PAD]"}
    assert words.eos_token_id == ids[0, end].item()
    # "A" is no content word, "circle" is one, with all its pieces.
    assert mask[0, 1] == 1
    pieces = [place for place, token in enumerate(tokens) if token.startswith("##")]
    assert pieces
    text = CAPTIONS[0].lower().replace(" ", "")
    assert "".join(tokens[1:end]).replace("##", "") == text
    content = {word.start for word in caption.known_words() if word.kind == 2}
    assert (mask[0] == 2).sum() >= len(content) > 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
        ("preprocessor_config.json", {"size": 32}, "names image_mean=None"),
        (
            "preprocessor_config.json",
            {"size": [32, 16], "image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
            "not squares",
        ),
        ("config.json", {"model_type": "vitmatte"}, "supported are vit, deit, dinov2"),
        ("config.json", None, "holds no config.json"),
    ],
)
def test_a_wrong_vision_folder_is_named(
    folders: Path, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    save_vision_encoder(tmp_path, "swin")
    (tmp_path / name).unlink()
    if change is not None:
        (tmp_path / name).write_text(json.dumps(change))
    with pytest.raises(ValueError, match=rf"model\.vision_tower=.*{message}"):
        built(folders, vision=str(tmp_path))


def test_a_tower_of_timm_names_what_it_needs(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("TimmWrapperConfig requires the timm library")

    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    monkeypatch.setattr(AutoConfig, "from_pretrained", absent)
    with pytest.raises(ValueError, match=r"model\.vision_tower=.*pip install timm torchvision"):
        image_size(settings(folders, "bert", str(tmp_path)))


def test_wrong_settings_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vision_tower=None must be given together"):
        ModelConfig(text_tower="a")
    with pytest.raises(ValueError, match=r"model\.pretrained='a' cannot be given beside"):
        ModelConfig(pretrained="a", text_tower="b", vision_tower="c")
    words = load_tokenizer(folders / "roberta", 40)
    model = settings(folders, "roberta", "vit")
    # RoBERTa counts positions from its padding id + 1.
    with pytest.raises(ValueError, match=r"max_words=40 exceeds the text tower's 39 positions"):
        build_model(model, LossConfig(), words, num_frames=2)
    save_text_encoder(tmp_path, "bert", CAPTIONS, pooling="mean_tokens")
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match=r"pools by \['max'\]; supported are mean or cls"):
        built(folders, text=str(tmp_path))


def test_a_dry_step_and_an_explanation_know_start_and_end(folders: Path) -> None:
    words = load_tokenizer(folders / "bert", MAX_WORDS)
    model = settings(folders, "bert", "vit")
    data = DataConfig(train="", num_frames=2, max_words=MAX_WORDS)
    train = TrainConfig(steps=1, global_batch=2, micro_batch=2)
    batch = next(random_batches(data, model, train, words))
    vocabulary = words.backend.get_vocab()
    assert batch.token_ids[:, 0].tolist() == [vocabulary["[CLS]"]] * 2
    assert batch.token_ids[:, -1].tolist() == [vocabulary["[SEP]"]] * 2
    assert batch.frames.shape == (2, 2, 3, SIDE, SIDE)
    shown = token_texts(words, CAPTIONS[0])
    end = shown.texts.index("[end]")
    assert shown.texts[0] == "[start]"
    assert set(shown.texts[end + 1 :]) == {"[pad]"}
    assert "".join(shown.texts[1:end]) == CAPTIONS[0].replace(" ", "")
    assert any(shown.continues_word)


def test_memory_is_estimated(folders: Path) -> None:
    config = Config(
        data=DataConfig(train="", num_frames=2, max_words=MAX_WORDS),
        model=settings(folders, "bert", "pvt"),
        train=TrainConfig(steps=1, global_batch=4, micro_batch=4),
    )
    words = load_tokenizer(folders / "bert", MAX_WORDS)
    assert activation_bytes(config, words) > 4 * 2 * 3 * SIDE * SIDE * 4
