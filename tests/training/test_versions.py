"""The names of older versions of torch and transformers lead to the same results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import nn

from tvr.trainer.distributed import collectives as collectives_file
from tvr.trainer.distributed.collectives import all_gather_rows_no_grad, reduce_scatter_rows
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.versions import versions
from tvr.trainer.versions.versions import bare_tower, new_clip_tokenizer, renamed

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NEW_NAMES = ("all_gather_single", "reduce_scatter_single")
CAPTIONS = (
    "two dogs run",
    "The DOG's 2nd run: caf\u00e9, cafe\u0301 ...!!",
    "\u4e8c\u5339\u306e\u72ac \U0001f415\t\n  <|endoftext|> x<|startoftext|>y",
    "",
)


def test_newer_name_goes_before_older_one() -> None:
    newer, older = SimpleNamespace(all_gather_single=1), SimpleNamespace(all_gather_into_tensor=2)
    both = SimpleNamespace(all_gather_single=1, all_gather_into_tensor=2)
    assert [renamed(x, "all_gather_single") for x in (newer, older, both)] == [1, 2, 1]
    with pytest.raises(AttributeError, match="all_gather_into_tensor"):
        renamed(SimpleNamespace(), "all_gather_single")


class OlderDistributed:
    """torch.distributed without the names that torch 2.13 introduced."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in NEW_NAMES:
            raise AttributeError(name)
        self.called.append(name)
        return getattr(dist, name)


def test_collectives_run_under_their_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    older = OlderDistributed()
    with join_world():
        monkeypatch.setattr(collectives_file, "dist", older)
        world, rows = World(rank=0, world_size=1, device=CPU), torch.arange(6.0).view(3, 2)
        assert torch.equal(all_gather_rows_no_grad(rows, world, (3,)), rows)
        assert torch.equal(reduce_scatter_rows(rows, world, (3,)), rows)
        monkeypatch.undo()
    assert older.called == ["all_gather_into_tensor", "reduce_scatter_tensor"]


def test_no_other_module_takes_a_name_that_older_versions_lack() -> None:
    direct = re.compile(rf"\b(dist|transformers)\.({'|'.join(versions.OLDER_NAMES)})\b")
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / "trainer").rglob("*.py"))
        for name in direct.findall(file.read_text())
    ]
    assert found == []


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of CLIP's form, with every byte and a few merges."""
    letters = bytes_to_letters()
    merges = [("d", "o"), ("do", "g</w>"), ("r", "u"), ("ru", "n</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def bytes_to_letters() -> list[str]:
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in own] + [chr(256 + n) for n in range(256 - len(own))]


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4")
def test_rules_of_clips_tokeniser_are_those_of_transformers_5() -> None:
    tokens, merges = vocabulary()
    newer = new_clip_tokenizer(tokens, merges)
    rules = versions._clip_rules(tokens, merges)
    ours, theirs = json.loads(rules.to_str()), json.loads(newer.backend_tokenizer.to_str())
    for part in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == theirs[part], part


def test_tokeniser_built_by_rules_encodes_every_text_alike() -> None:
    tokens, merges = vocabulary()
    built = new_clip_tokenizer(tokens, merges, model_max_length=77)
    rules = versions._clip_rules(tokens, merges)
    from_rules = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    for caption in CAPTIONS:
        ids = [tool(caption, return_offsets_mapping=True) for tool in (built, from_rules)]
        assert ids[0]["input_ids"] == ids[1]["input_ids"], caption
        assert ids[0]["offset_mapping"] == ids[1]["offset_mapping"], caption
    first, *dogs, last = built("dog dogs")["input_ids"]
    assert (first, last) == (tokens["<|startoftext|>"], tokens["<|endoftext|>"])
    assert dogs[0] == tokens["dog</w>"]


def test_tower_of_transformers_4_gets_the_names_of_transformers_5() -> None:
    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model = nn.Linear(2, 2)

    older, newer = Older(), nn.Linear(2, 2)
    assert bare_tower(older).state_dict().keys() == newer.state_dict().keys()
    assert bare_tower(newer) is newer
