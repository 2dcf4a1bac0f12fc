"""The READMEs are true: commands and flags exist, links lead to files, and code runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from builders.clip_files import numbered_video
from builders.pretrained import save_clip

from tvr.launchers import cli
from tvr.trainer.config import merged
from tvr.trainer.model.tokenizer import train_tokenizer
from tvr.trainer.recipes.recipes import recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
READMES = [
    README,
    ROOT / "AGENTS.md",
    *(ROOT / folder / "README.md" for folder in ("data_prep", "kernels", "launchers", "trainer")),
    *sorted((ROOT / "trainer").glob("*/README.md")),
    ROOT / "tests" / "README.md",
]
ids = [str(path.relative_to(ROOT)) for path in READMES]
# Commands whose second word is a command of its own.
NESTED = {"launch", "bench"}


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a file in these languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [body for language, body in fenced if language in languages]


def command_lines(path: Path) -> list[list[str]]:
    """Every `tvr` command of a file's shell blocks as words; continued lines are joined."""
    lines = []
    for body in blocks(path, "", "bash", "sh", "console"):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            for command in re.findall(r"(?:^|\s|;\s*|=\")(tvr (?!\w+ \|)[^;#\"]+)", line):
                lines.append(shlex.split(command.replace("...", "")))
    return lines


@cache
@cache
def help_of(*command: str) -> str:
    """Output of `tvr COMMAND --help`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return out.getvalue()


def commands_in(words: list[str]) -> list[list[str]]:
    """A command line and the one behind its `--`, each without the word `tvr`."""
    found, rest = [], words[1:]
    if "--" in rest:
        middle = rest.index("--")
        rest, inner = rest[:middle], rest[middle + 1 :]
        if inner[:1] == ["tvr"]:
            found.append(inner[1:])
    return [rest, *found]


@pytest.mark.parametrize("path", READMES, ids=ids)
def test_every_command_and_flag_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for words in command_lines(path):
        for command in commands_in(words):
            name, *arguments = command
            assert name in cli.COMMANDS, words
            chain = command[: 1 + (name in NESTED and bool(arguments))]
            text = help_of(*chain) + (
                help_of(name, "--format", "beton") if "beton" in arguments else ""
            )
            for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
                negated = re.sub(r"(^--|\.)no-", r"\1", flag)
                known = re.escape(flag) if flag in text else re.escape(negated)
                assert re.search(rf"{known}(?![\w-])", text), (words, flag)


@pytest.mark.parametrize("path", READMES, ids=ids)
def test_every_make_target_and_linked_file_exists(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^\s*)make ([a-z][a-z-]+)", path.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_readmes_hold_commands_and_the_root_one_is_short() -> None:
    # Guards the tests above against patterns that find nothing.
    counts = {str(path.relative_to(ROOT)): len(command_lines(path)) for path in READMES}
    assert counts["README.md"] >= 9
    assert min(counts["data_prep/README.md"], counts["launchers/README.md"]) >= 5
    assert counts["trainer/evaluation/README.md"] >= 14
    assert 6_000 <= README.stat().st_size <= 8_192


def test_the_readmes_own_data_becomes_a_model_that_its_python_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types the root README's commands, with its settings at two steps, then runs its code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = [
            {"video": f"{split}-{i}.mp4", "captions": [f"a dog runs {i} times in the {split}"]}
            for i in range(count)
        ]
        for i, row in enumerate(rows):
            video = numbered_video(14, first=16 * i + 100 * (split == "test"))
            (tmp_path / "videos" / row["video"]).write_bytes(video)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = ["a dog runs in the snow", "a man plays the guitar"]
    model = tmp_path / "models" / "clip-vit-base-patch32"
    tokenizer = train_tokenizer(captions, model, vocab_size=560, max_words=32)
    save_clip(model, tokenizer, width=16, image_size=224, patch_size=32)

    (settings,) = blocks(README, "json")
    merged(recipe("demo"), json.loads(settings), where="README.md")
    few = json.loads(settings)
    few["train"] |= {"steps": 2, "global_batch": 8, "micro_batch": 4, "warmup_steps": 0}
    (tmp_path / "my.json").write_text(json.dumps(few))

    (own_data,) = [body for body in blocks(README, "bash") if "tvr export" in body]
    commands = [shlex.split(line) for line in own_data.splitlines()]
    assert [words[1] for words in commands] == ["pack", "pack", "launch", "evaluate", "export"]
    for words in commands:
        line = [sys.executable, "-m", "tvr.launchers.cli", *words[1:]]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)

    assert len(blocks(README, "python")) == 2
    for snippet in blocks(README, "python"):
        namespace: dict[str, object] = {}
        exec(compile(snippet, str(README), "exec"), namespace)
        if "scores" in namespace:
            assert tuple(namespace["scores"].shape) == (2, 3)  # type: ignore[attr-defined]
        else:
            assert namespace["words"].grad.isfinite().all()  # type: ignore[attr-defined]
