"""Exports a run's model as a Hugging Face folder (`tvr export`), and loads such a folder.

    config.json, model.safetensors       both towers, for CLIPModel, SiglipModel or
                                         VisionTextDualEncoderModel (for PE-Core
                                         open_clip_config.json, open_clip_model.safetensors)
    tokenizer*, processor_config.json    for AutoTokenizer and AutoProcessor
    heads.safetensors                    all other weights: header, weight layers, predictors
    tvr.json                             the run's settings
    README.md                            model card

LoRA weights are merged into the towers. The folder can also serve as `model.pretrained`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvr.trainer.checkpoint.choice import CheckpointChoice
from tvr.trainer.config import Config, LossConfig, from_json, to_json
from tvr.trainer.data import training_sets
from tvr.trainer.evaluation.results import stored_results
from tvr.trainer.evaluation.saved_run import load_run
from tvr.trainer.model.model import TextVideoModel, build_model, image_size
from tvr.trainer.model.parameter_groups import merge_adapters
from tvr.trainer.model.pe_core_family import PE_CORE
from tvr.trainer.model.siglip_family import SIGLIP
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.model.tower_folders import has_imported
from tvr.trainer.records import results_table
from tvr.trainer.run_dir import read_config
from tvr.trainer.versions.versions import clip_image_processor, siglip_processor_crops

HEADS, SETTINGS, CARD = "heads.safetensors", "tvr.json", "README.md"
TOWER_PREFIXES = ("text_tower.", "image_tower.", "text_projection.", "visual_projection.")


def export_run(run_dir: Path, out: Path, choice: CheckpointChoice = "newest") -> int:
    """Writes a run's newest intact checkpoint, or the chosen one, to the new folder `out`.

    The folder appears under its name once it is complete.

    Returns:
        The step of the checkpoint, which the model card names.

    Raises:
        ValueError: `out` exists, there is no run or no such checkpoint, or the installed
            transformers has no processor that prepares frames as the training does.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists already; give another folder, or remove it")
    config = read_config(run_dir)
    model, tokenizer, step = load_run(run_dir, config, choice=choice)
    if model.family.name == SIGLIP.name and not siglip_processor_crops():
        raise ValueError(
            "the export of a SigLIP needs transformers 5: the processor of transformers"
            f" {transformers.__version__} cannot crop frames as the training does"
        )
    if has_imported(config.model):
        raise ValueError(f"{run_dir}: a model of imported features has no towers to export")
    if config.model.lora_rank:
        for tower in (model.text_tower, model.image_tower):
            merge_adapters(tower)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_towers(model, config.loss, partial)
    _write_processor(model, tokenizer, image_size(config.model), partial)
    save_file(_heads(model), partial / HEADS)
    (partial / SETTINGS).write_text(to_json(config))
    (partial / CARD).write_text(_card(model, config, step, _results(run_dir, step), out.name))
    partial.rename(out)
    return step


def load_exported(folder: Path | str) -> TextVideoModel:
    """Loads the model of a folder that `tvr export` wrote.

    `load_tokenizer(folder, max_words)` loads its tokeniser.

    Returns:
        The model in evaluation mode, in fp32 on the CPU.

    Raises:
        ValueError: another program wrote the folder, or its files do not fit together.
    """
    folder = Path(folder)
    config = exported_config(folder)
    tokenizer = load_tokenizer(folder, config.data.max_words)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    heads = load_file(folder / HEADS)
    if heads.keys() != _heads(model).keys():
        differing = sorted(heads.keys() ^ _heads(model).keys())
        raise ValueError(f"{folder / HEADS} does not fit {folder / SETTINGS}: {differing[0]}")
    model.load_state_dict(heads, strict=False)
    return model.eval()


def exported_config(folder: Path) -> Config:
    """The settings in a folder of `tvr export`, with its own towers.

    Raises:
        ValueError: another program wrote the folder.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise ValueError(f"{folder} was not written by tvr export: it has no {SETTINGS}")
    config = from_json(path.read_text(), where=str(path))
    # The towers, and the side of their frames, are those of the folder.
    own = replace(
        config.model,
        pretrained=str(folder),
        text_tower=None,
        vision_tower=None,
        tokenizer=None,
        freeze=0,
        lora_rank=0,
    )
    return replace(config, model=own)


def _heads(model: TextVideoModel) -> dict[str, Tensor]:
    """All weights except the towers'."""
    return {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(TOWER_PREFIXES)
    }


def _write_towers(model: TextVideoModel, loss: LossConfig, folder: Path) -> None:
    """Writes both towers as one model of their family."""
    scale = torch.tensor(-math.log(loss.temperature))
    model.family.joined(model.towers, scale).save_pretrained(folder)


def _write_processor(model: TextVideoModel, tokenizer: Tokenizer, side: int, folder: Path) -> None:
    """Writes tokeniser and image processor."""
    # Both families get the preprocessing of training: scale the short side, then crop.
    images = clip_image_processor()(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(model.family.pixel_mean),
        image_std=list(model.family.pixel_std),
    )
    model.family.processor(images, tokenizer.backend).save_pretrained(folder)


def _results(run_dir: Path, step: int) -> str | None:
    """The results of the evaluation of a step as text; None if it was not evaluated."""
    summary = stored_results(run_dir, step)
    return None if summary is None else results_table({**summary, "data": _name(summary["data"])})


def _card(model: TextVideoModel, config: Config, step: int, results: str | None, name: str) -> str:
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("model_card.md.jinja")
    return template.render(
        name=name,
        step=step,
        results=results,
        config=config,
        settings=to_json(config),
        train=[_name(each.url) for each in training_sets(config.data)],
        start=[
            _name(each)
            for each in (
                config.model.pretrained,
                config.model.text_tower,
                config.model.vision_tower,
            )
            if each is not None
        ],
        init_from=None if config.model.init_from is None else _name(config.model.init_from),
        init_parts=config.model.init_parts,
        whole=None if model.family.name == PE_CORE else model.family.whole.__name__,
        text_code=model.family.text_code,
        image_code=model.family.image_code,
    )


def _name(url: str) -> str:
    """Last part of a path or URL, so that the card shows no path of the training machine."""
    return url.rstrip("/").rsplit("/", 1)[-1]
