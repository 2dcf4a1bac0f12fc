"""The model: features and masks, TPM-CL, parameter groups, and towers from a local CLIP folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import plain_captions
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES
from torch import Tensor, nn
from transformers import CLIPModel

from tvr.trainer.config import LossConfig, ModelConfig, TowersConfig, TrainConfig
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.clip_family import CLIP, joined_clip
from tvr.trainer.model.model import (
    Features,
    TextVideoModel,
    build_model,
    image_size,
    tokenizer_folder,
)
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import Tokenizer, train_tokenizer

WIDTH = 16
CAPTIONS = [
    "a small red circle moves left",
    "a large blue square moves right, then a small red circle moves up",
    "two green triangles move slowly",
    "red",
]
TOWERS = TowersConfig(
    width=32, layers=2, heads=2, embed_width=WIDTH, image_size=IMAGE_SIZE, patch_size=8
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(4 * CAPTIONS, folder, vocab_size=560, max_words=MAX_WORDS)


def built(tokenizer: Tokenizer, *, loss: dict[str, Any] | None = None, **model: Any) -> Any:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(towers=TOWERS, **model),
        LossConfig(**(loss or {})),
        tokenizer,
        num_frames=NUM_FRAMES,
    )


def inputs(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns 4 pairs; videos 1 and 3 end with padding, and captions differ in length."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(CAPTIONS), NUM_FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    frame_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    return frames, frame_mask, *tokenizer(plain_captions(*CAPTIONS))


def encoded(model: TextVideoModel, tokenizer: Tokenizer) -> Features:
    with torch.no_grad():
        return model.eval()(*inputs(tokenizer))


def train_config(**changes: Any) -> TrainConfig:
    usual = {"learning_rate": 3e-4, "encoder_learning_rate": 1e-6}
    return TrainConfig(steps=1, global_batch=1, micro_batch=1, **(usual | changes))


def unit_length(x: Tensor) -> bool:
    return torch.allclose(x.norm(dim=-1), torch.ones(x.shape[:-1]), atol=1e-5)


def test_features_have_their_shapes_and_unit_length(tokenizer: Tokenizer) -> None:
    features = encoded(built(tokenizer, sequence_header_layers=1), tokenizer)
    num = len(CAPTIONS)
    assert features.sentence.shape == (num, WIDTH)
    assert features.words.shape == (num, MAX_WORDS, WIDTH)
    assert features.frames.shape == (num, NUM_FRAMES, WIDTH)
    assert features.word_logits is not None
    assert features.word_logits.shape == (num, MAX_WORDS)
    assert features.frame_logits is not None
    assert features.frame_logits.shape == (num, NUM_FRAMES)
    for vectors in (features.sentence, features.words, features.frames):
        assert unit_length(vectors)
    # The sentence is the end token's vector.
    ends = features.word_mask.sum(dim=1) - 1
    assert torch.allclose(features.words[torch.arange(num), ends], features.sentence, atol=1e-6)


def test_captions_and_videos_may_differ_in_number(tokenizer: Tokenizer) -> None:
    model = built(tokenizer).eval()
    frames, frame_mask, token_ids, word_mask = inputs(tokenizer)
    with torch.no_grad():
        features = model(frames[:2], frame_mask[:2], token_ids, word_mask)
        whole = model(frames, frame_mask, token_ids, word_mask)
    assert torch.allclose(features.frames, whole.frames[:2], atol=1e-6)
    assert torch.allclose(features.sentence, whole.sentence, atol=1e-6)
    assert features.margin_hinge is None


def test_the_ti_family_has_no_weight_layers(tokenizer: Tokenizer) -> None:
    for interaction, weighted in (("ti", 0), ("att_ti", 0), ("wti", 2), ("att_wti", 2)):
        model = built(tokenizer, interaction=interaction)
        layers = [name for name, _ in model.named_parameters() if "_weight.layers" in name]
        assert len(layers) == 2 * weighted  # a weight and a bias each
        features = encoded(model, tokenizer)
        assert (features.word_logits is None) == (features.frame_logits is None) == (not weighted)
    deep = built(tokenizer, weight_layers=3)
    assert len([name for name, _ in deep.named_parameters() if "_weight.layers" in name]) == 12


def test_the_margin_is_computed_in_training_only(tokenizer: Tokenizer) -> None:
    model = built(tokenizer)
    hinge = model.train()(*inputs(tokenizer)).margin_hinge
    assert hinge.shape == (len(CAPTIONS),)
    assert (hinge > 0).all()  # an untrained model violates every margin
    assert hinge.requires_grad
    assert encoded(model, tokenizer).margin_hinge is None


def test_without_tpm_cl_there_are_no_predictors(tokenizer: Tokenizer) -> None:
    with_it, without = built(tokenizer), built(tokenizer, loss={"tpm_cl": 0})
    names = {name.split(".")[0] for name, _ in with_it.named_parameters()}
    others = {name.split(".")[0] for name, _ in without.named_parameters()}
    assert names - others == {"word_predictor", "frame_predictor"}
    assert without.train()(*inputs(tokenizer)).margin_hinge is None


def test_the_hinge_follows_its_settings(tokenizer: Tokenizer) -> None:
    def hinge(**loss: Any) -> Tensor:
        return built(tokenizer, loss=loss).train()(*inputs(tokenizer)).margin_hinge.detach()

    usual = hinge()
    assert torch.equal(hinge(), usual)
    assert torch.allclose(hinge(tpm_cl=2) + hinge(tpm_cl=3), usual, atol=1e-6)
    assert torch.allclose(hinge(margin=0.9), usual + 3 * 0.3, atol=1e-5)
    assert not torch.allclose(hinge(mask_threshold=0.2), usual)
    assert not torch.allclose(
        hinge(tpm_cl=3, normalise_partial=True, mask_threshold=0.2),
        hinge(tpm_cl=3, mask_threshold=0.2),
    )


@pytest.mark.parametrize("padded", ["words", "frames"])
def test_padding_gets_predictor_weight_unless_masked(tokenizer: Tokenizer, padded: str) -> None:
    frames, frame_mask, token_ids, word_mask = inputs(tokenizer)
    whole = {"frames": frame_mask, "words": word_mask}
    whole["words" if padded == "frames" else "frames"][:] = 1  # no padding on the other side
    loss = {"mask_threshold": 0.9}
    hinges = [
        built(tokenizer, loss={**loss, "mask_padding_weights": masked})
        .train()(frames, frame_mask, token_ids, word_mask)
        .margin_hinge
        for masked in (False, True)
    ]
    assert not torch.allclose(*hinges, atol=1e-3)


def test_the_frame_predictor_gets_a_gradient_with_straight_through_only(
    tokenizer: Tokenizer,
) -> None:
    for straight_through in (False, True):
        model = built(tokenizer, loss={"straight_through": straight_through}).train()
        model(*inputs(tokenizer)).margin_hinge.sum().backward()
        gradients = [parameter.grad for parameter in model.frame_predictor.parameters()]
        reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert all(reached) if straight_through else not any(reached)
        assert model.word_predictor.mix.weight.grad.any()


def test_the_sequence_header(tokenizer: Tokenizer) -> None:
    off = built(tokenizer)
    assert off.sequence_header is None
    plain = encoded(off, tokenizer).frames
    on = encoded(built(tokenizer, sequence_header_layers=2), tokenizer).frames
    raw = encoded(
        built(tokenizer, sequence_header_layers=2, unit_after_header=False), tokenizer
    ).frames
    assert unit_length(plain)
    assert unit_length(on)
    assert not torch.allclose(on, plain, atol=1e-3)
    assert ((raw.norm(dim=-1) - 1).abs() > 0.1).all()  # the sum of two nearly parallel vectors
    assert torch.allclose(raw / raw.norm(dim=-1, keepdim=True), on, atol=1e-5)


def test_the_sequence_header_depends_on_the_order_of_frames(tokenizer: Tokenizer) -> None:
    backwards = [2, 1, 0]
    for layers in (0, 1):
        model = built(tokenizer, sequence_header_layers=layers).eval()
        frames, _, token_ids, word_mask = inputs(tokenizer)
        everything = torch.ones(len(frames), NUM_FRAMES, dtype=torch.long)
        with torch.no_grad():
            forth = model(frames, everything, token_ids, word_mask).frames
            back = model(frames[:, backwards], everything, token_ids, word_mask).frames
        assert torch.allclose(back[:, backwards], forth, atol=1e-4) == (layers == 0)


@pytest.mark.parametrize("interaction", ["ti", "att_wti"])
@pytest.mark.parametrize("layers", [0, 1])
def test_the_content_of_padding_does_not_matter(
    tokenizer: Tokenizer, interaction: str, layers: int
) -> None:
    model = built(tokenizer, interaction=interaction, sequence_header_layers=layers).eval()
    frames, frame_mask, token_ids, word_mask = inputs(tokenizer)
    other_frames, other_ids = frames.clone(), token_ids.clone()
    other_frames[frame_mask == 0] = 255 - other_frames[frame_mask == 0]
    other_ids[word_mask == 0] = torch.arange(int((word_mask == 0).sum())) % 500
    assert not torch.equal(other_ids, token_ids)
    with torch.no_grad():
        before = model(frames, frame_mask, token_ids, word_mask)
        after = model(other_frames, frame_mask, other_ids, word_mask)
    real_words, real_frames = word_mask == 1, frame_mask == 1
    assert not torch.allclose(after.words[~real_words], before.words[~real_words], atol=1e-3)
    assert not torch.allclose(after.frames[~real_frames], before.frames[~real_frames], atol=1e-3)
    assert torch.allclose(after.sentence, before.sentence, atol=1e-6)
    assert torch.allclose(after.words[real_words], before.words[real_words], atol=1e-6)
    assert torch.allclose(after.frames[real_frames], before.frames[real_frames], atol=1e-6)
    config = ModelConfig(interaction=interaction)  # pyright: ignore[reportArgumentType]
    ours, theirs = (similarity_rows(f, f, config) for f in (after, before))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert theirs.std() > 1e-3


def test_every_parameter_is_in_one_group_and_only_matrices_decay(tokenizer: Tokenizer) -> None:
    model = built(tokenizer, sequence_header_layers=1, weight_layers=2)
    groups: list[Any] = parameter_groups(model, train_config(weight_decay=0.1))
    kinds = {(group["name"], group["weight_decay"]) for group in groups}
    assert kinds == {(name, decay) for name in ("encoder", "head") for decay in (0.0, 0.1)}
    for group in groups:
        peak = {"encoder": 1e-6, "head": 3e-4}[group["name"]]
        assert group["peak"] == group["lr"] == peak
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len({id(parameter) for parameter in members})
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}

    group_of = {id(p): group for group in groups for p in group["params"]}
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert any(m.weight.ndim == 2 for m in norms)  # those of the predictors
    for norm in norms:
        assert group_of[id(norm.weight)]["weight_decay"] == 0.0
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        tower = name.startswith(("text_tower.", "image_tower."))
        assert group["name"] == ("encoder" if tower else "head"), name
        if name.endswith("bias"):
            assert group["weight_decay"] == 0.0, name
    for name in (
        "text_tower.text_projection.weight",
        "image_tower.visual_projection.weight",
        "sequence_header.positions",
        "sequence_header.blocks.0.mlp_in.weight",
        "text_weight.layers.0.weight",
        "word_predictor.mix.weight",
        "frame_predictor.score.weight",
    ):
        assert group_of[id(model.get_parameter(name))]["weight_decay"] == 0.1, name


def test_equal_seeds_give_equal_weights(tokenizer: Tokenizer) -> None:
    first, second = (built(tokenizer, sequence_header_layers=1).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    other = build_model(
        ModelConfig(towers=TOWERS, sequence_header_layers=1),
        LossConfig(),
        tokenizer,
        num_frames=NUM_FRAMES,
    ).state_dict()
    assert not torch.equal(
        other["text_tower.text_projection.weight"], first["text_tower.text_projection.weight"]
    )


@pytest.fixture(scope="module")
def clip_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, save_clip(folder, tokenizer, width=WIDTH, image_size=24)


def test_a_clip_folder_gives_the_embeddings_of_clip(
    clip_folder: tuple[Path, CLIPModel], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    folder, clip = clip_folder
    config = ModelConfig(pretrained=str(folder))
    assert image_size(config) == 24
    assert tokenizer_folder(config) == str(folder)
    torch.manual_seed(99)  # the weights come from the folder, not from the seed
    model = build_model(config, LossConfig(), tokenizer, num_frames=2).eval()
    assert not caplog.records  # neither tower warns about the weights of the other
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (4, 2, 3, 24, 24), dtype=torch.uint8, generator=generator)
    token_ids, word_mask = tokenizer(plain_captions(*CAPTIONS))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP.pixel_mean, CLIP.pixel_std))
    pixels = (frames.flatten(0, 1) / 255 - mean) / std
    with torch.no_grad():
        features = model(frames, torch.ones(4, 2, dtype=torch.long), token_ids, word_mask)
        texts = clip.get_text_features(input_ids=token_ids, attention_mask=word_mask)
        images = clip.get_image_features(pixel_values=pixels)  # pyright: ignore[reportArgumentType]
    expected: list[Tensor] = [getattr(x, "pooler_output", x) for x in (texts, images)]  # type: ignore[union-attr]
    sentence, per_frame = (x / x.norm(dim=-1, keepdim=True) for x in expected)
    assert torch.allclose(features.sentence, sentence, atol=1e-5)
    assert torch.allclose(features.frames.flatten(0, 1), per_frame, atol=1e-5)
    assert (sentence[0] - sentence[1]).abs().max() > 1e-2


def test_a_tokenizer_of_another_model_is_refused(
    clip_folder: tuple[Path, CLIPModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder, _ = clip_folder
    config = ModelConfig(pretrained=str(folder), tokenizer=str(tmp_path))
    assert tokenizer_folder(config) == str(tmp_path)
    captions = [f"caption {'abcdefgh'[i % 8]}{'klmnopqr'[i // 8]}xyz" for i in range(64)]
    larger = train_tokenizer(captions, tmp_path, vocab_size=700, max_words=MAX_WORDS)
    assert larger.vocab_size > tokenizer.vocab_size
    message = rf"has {larger.vocab_size} tokens, the text tower only {tokenizer.vocab_size}"
    with pytest.raises(ValueError, match=message):
        build_model(config, LossConfig(), larger, num_frames=2)
    longer = Tokenizer(tokenizer.backend, MAX_WORDS + 1)
    with pytest.raises(ValueError, match=r"data\.max_words=21 exceeds the text tower's 20"):
        build_model(config, LossConfig(), longer, num_frames=2)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_model_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    config = ModelConfig(pretrained=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"model\.pretrained='.*{name}' holds no config\.json"):
        build_model(config, LossConfig(), tokenizer, num_frames=2)


def test_a_missing_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set model\.tokenizer"):
        tokenizer_folder(ModelConfig())


def test_towers_of_two_widths_are_refused(tokenizer: Tokenizer) -> None:
    one, other = (
        build_model(
            ModelConfig(towers=TowersConfig(width=32, layers=1, heads=2, embed_width=width)),
            LossConfig(),
            tokenizer,
            num_frames=2,
        )
        for width in (16, 8)
    )
    with pytest.raises(ValueError, match="text tower projects to width 16, the image tower to 8"):
        joined_clip(one.text_tower, other.image_tower)


def test_a_clip_folder_saved_in_half_precision_is_trained_in_fp32(
    clip_folder: tuple[Path, CLIPModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    CLIPModel.from_pretrained(clip_folder[0]).half().save_pretrained(tmp_path)
    model = build_model(
        ModelConfig(pretrained=str(tmp_path)), LossConfig(), tokenizer, num_frames=3
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(module.training for module in model.modules())


def test_a_clip_folder_without_all_weights_is_refused(
    clip_folder: tuple[Path, CLIPModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clip = CLIPModel.from_pretrained(clip_folder[0])
    weights = {k: v for k, v in clip.state_dict().items() if k != "text_projection.weight"}
    clip.save_pretrained(tmp_path, state_dict=weights)
    config = ModelConfig(pretrained=str(tmp_path))
    with pytest.raises(ValueError, match=r"lacks 1 weights of a tower, such as text_projection"):
        build_model(config, LossConfig(), tokenizer, num_frames=3)
