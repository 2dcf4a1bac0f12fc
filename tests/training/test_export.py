"""`tvr export`: the folder reproduces the run's similarities, and transformers can load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pretrained import save_siglip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, make_tiny_data, tiny_config
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPModel, SiglipModel

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.launchers.cli import main
from tvr.trainer.config import Config
from tvr.trainer.data import ordered_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation import export as export_file
from tvr.trainer.evaluation.export import exported_config, load_exported
from tvr.trainer.evaluation.saved_run import load_run
from tvr.trainer.loop import train
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import TextVideoModel, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.run_dir import read_config
from tvr.trainer.versions.versions import siglip_processor_crops

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU)
KINDS = ("clip", "siglip") if siglip_processor_crops() else ("clip",)
WHOLE = {"clip": CLIPModel, "siglip": SiglipModel}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and their exports: a new CLIP with LoRA, and a SigLIP with frozen layers."""
    root = tmp_path_factory.mktemp("exported")
    make_tiny_data(root, num_train=16)
    clips = read_annotations(str(root / "clips" / "train" / ANNOTATIONS))
    captions = [caption for clip in clips for caption in clip.captions]
    save_siglip(root / "towers", captions, max_words=MAX_WORDS, image_size=IMAGE_SIZE)
    models = {
        "clip": {"lora_rank": 2},
        "siglip": {
            "pretrained": str(root / "towers"),
            "tokenizer": None,
            "freeze": 1,
            "matching": "words_to_frames",
        },
    }
    for kind, model in models.items():
        steps = {"steps": 2, "zero_stage": 3, "encoder_learning_rate": 1e-2}
        config = tiny_config(root, model=model, train=steps)
        train(config, root / f"run-{kind}")
    for kind in KINDS:
        assert (
            main(["export", "--run-dir", str(root / f"run-{kind}"), "--out", f"{root / kind}"]) == 0
        )
    return root


def features(model: TextVideoModel, config: Config, tokenizer: Tokenizer) -> Any:
    assert config.data.test is not None
    batches = ordered_batches(
        config.data.test, config.data, config.model, config.train, tokenizer, ALONE
    )
    with torch.no_grad():
        return concat_features([model(*model_inputs(batch, CPU)) for batch in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_exported_model_reproduces_the_similarities(exported: Path, kind: str) -> None:
    config = read_config(exported / f"run-{kind}")
    model, tokenizer, _ = load_run(exported / f"run-{kind}", config)
    exported_model = load_exported(exported / kind)
    words = load_tokenizer(exported / kind, MAX_WORDS)
    ours = features(model.eval(), config, tokenizer)
    theirs = features(exported_model, config, words)
    one = similarity_rows(ours, ours, config.model)
    other = similarity_rows(theirs, theirs, exported_config(exported / kind).model)
    assert one.shape == (10, 10)
    assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert one.std() > 1e-3
    assert not any("lora" in name for name in exported_model.state_dict())
    assert not exported_model.training


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_whose_matching_was_edited_is_refused(
    exported: Path, kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(exported / kind, folder)
    settings = json.loads((folder / "tvr.json").read_text())
    names = ["two_way", "words_to_frames"]
    own = settings["model"]["matching"]
    assert own == names[kind == "siglip"]
    for matching, error in ((names[own == names[0]], "does not fit"), ("both", "matching")):
        settings["model"]["matching"] = matching
        (folder / "tvr.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=error):
            load_exported(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_gives_the_towers_features(exported: Path, kind: str) -> None:
    whole: Any = WHOLE[kind]
    model, found = whole.from_pretrained(exported / kind, output_loading_info=True)
    assert not any(found.values()), found
    assert type(AutoModel.from_pretrained(exported / kind)) is whole
    assert model.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)
    processor = AutoProcessor.from_pretrained(exported / kind)
    captions = ["a small red circle moves left", "a large blue square moves right"]
    texts = processor.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=MAX_WORDS,
        return_tensors="pt",
    )
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (2, 3, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    pictures = [frame.numpy().astype("uint8") for frame in frames.flatten(0, 1)]
    images = processor.image_processor(
        pictures, return_tensors="pt", input_data_format="channels_first"
    )
    # SigLIP was trained without an attention mask.
    given = ("input_ids",) if kind == "siglip" else ("input_ids", "attention_mask")
    ours = load_exported(exported / kind)
    ours.sequence_header = None
    ids, mask = texts["input_ids"], texts["attention_mask"]
    with torch.no_grad():
        sentence = pooled(model.get_text_features(**{name: texts[name] for name in given}))
        frame = pooled(model.get_image_features(**images))
        found = ours(frames.to(torch.uint8), torch.ones(2, 3, dtype=torch.long), ids, mask)
    assert torch.allclose(found.sentence, unit(sentence), atol=1e-5)
    assert torch.allclose(found.frames.flatten(0, 1), unit(frame), atol=1e-5)


def pooled(output: Any) -> Tensor:
    """The vector that `get_text_features` returns: alone in transformers 4, else in a record."""
    return getattr(output, "pooler_output", output)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_model_card_names_results_data_and_initial_weights(exported: Path, kind: str) -> None:
    card = (exported / kind / "README.md").read_text()
    results = json.loads((exported / f"run-{kind}" / "evaluation.json").read_text())
    assert f"# {kind}\n" in card
    assert f"{results['text_to_video']['mean_rank']:8.1f}" in card
    assert "data set\n`train`" in card
    assert "(test)" in card
    assert f"import AutoProcessor, {'CLIPModel' if kind == 'clip' else 'SiglipModel'}\n" in card
    assert ("from scratch" in card) == (kind == "clip")
    assert ("started from `towers`" in card) == (kind == "siglip")


def test_model_card_leaves_out_the_evaluation_of_another_step(
    exported: Path, tmp_path: Path
) -> None:
    from tvr.trainer.evaluation.export import _results

    found = json.loads((exported / "run-clip" / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert _results(tmp_path, found["step"]) is not None
    assert _results(tmp_path, found["step"] + 1) is None
    assert _results(tmp_path / "absent", found["step"]) is None


def test_existing_folder_is_kept(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", "--run-dir", str(exported / "run-clip"), "--out", str(exported / "clip")]
    before = {path.name: path.read_bytes() for path in (exported / "clip").iterdir()}
    assert main(line) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (exported / "clip").iterdir()} == before
    assert not list(exported.glob(".*.partial"))


def test_folder_of_another_program_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not written by tvr export: it has no tvr\.json"):
        load_exported(tmp_path)
    for path in (exported / KINDS[-1]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tvr.json").read_text())
    settings["model"]["sequence_header_layers"] = 2
    (tmp_path / "tvr.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"heads\.safetensors does not fit .*blocks\.1"):
        load_exported(tmp_path)


def test_siglip_is_not_exported_with_a_processor_that_does_not_crop(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_file, "siglip_processor_crops", lambda: False)
    line = ["export", "--run-dir", str(exported / "run-siglip"), "--out", str(tmp_path / "out")]
    assert main(line) == 2
    assert "the export of a SigLIP needs transformers 5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_run_without_a_checkpoint_exports_nothing(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--run-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
