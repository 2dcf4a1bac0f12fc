"""What the README tells a user to type is accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tvr.launchers.cli import COMMANDS
from tvr.trainer.config import merged
from tvr.trainer.recipes.recipes import recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_settings_file_is_accepted() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    config = merged(recipe("demo"), json.loads(block), where="README.md")
    assert config.model.pretrained == "/models/clip-vit-base-patch32"
    assert config.data.test_exchanged is None


def test_every_command_and_flag_is_there() -> None:
    lines = [line for line in README.splitlines() if re.match(r"^(tvr |run=|\$run)", line)]
    assert len(lines) >= 8
    for name in re.findall(r"\btvr ([a-z][a-z-]+)", "\n".join(lines)):
        assert name in COMMANDS
    for target in re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
