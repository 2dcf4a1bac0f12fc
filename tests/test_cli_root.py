"""The root command: what it lists, what it passes on, what it leaves unimported, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import pytest

from tvr.launchers import cli
from tvr.launchers.launch_cli import launch


def run_tvr(*argv: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tvr.launchers.cli", *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Makes `tvr fake` call a function of ours; the lists of arguments it got are returned."""

    def install(outcome: int | BaseException) -> list[list[str]]:
        calls: list[list[str]] = []

        def fake(argv: list[str]) -> int:
            calls.append(argv)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = ModuleType("fake_module")
        module.fake = fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_module", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_module:fake", "for a test"))
        return calls

    return install


def test_help_lists_every_command() -> None:
    ended = run_tvr("--help")
    assert ended.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in ended.stdout
        assert command.help in ended.stdout
    assert "exit codes: 0 done, 2 bad usage" in ended.stdout


def test_version() -> None:
    ended = run_tvr("--version")
    assert (ended.returncode, ended.stdout) == (0, f"tvr {version('tvr')}\n")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["--nonsense"]])
def test_bad_usage_ends_with_2_and_names_the_commands(argv: list[str]) -> None:
    ended = run_tvr(*argv)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "tvr COMMAND" in ended.stderr


@pytest.mark.parametrize("argv", [["--help"], ["launch", "--help"], ["launch", "slurm", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from tvr.launchers.cli import main\n"
        "try:\n    main(json.loads(sys.argv[1]))\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'tyro', 'pydantic'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(ended.stderr) == []


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_leads_to_a_function(name: str) -> None:
    assert callable(cli._load(cli.COMMANDS[name].target))


@pytest.mark.parametrize("code", [0, 2, 3])
def test_passes_the_line_on_untouched_and_the_code_back(
    code: int, answer_with: Callable[..., list[list[str]]]
) -> None:
    calls = answer_with(code)
    argv = ["--help", "--version", "-x", "--", "a b", ""]
    assert cli.main(["fake", *argv]) == code
    assert calls == [argv]


def test_an_unforeseen_error_ends_with_3_and_its_traceback(
    answer_with: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(RuntimeError("the reason"))
    assert cli.main(["fake"]) == 3
    assert "RuntimeError: the reason" in capsys.readouterr().err


def test_interrupt_ends_with_3_without_a_traceback(
    answer_with: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(KeyboardInterrupt())
    assert cli.main(["fake"]) == 3
    assert capsys.readouterr().err == "tvr fake: interrupted\n"


def test_sub_commands_find_the_commands_beside_the_interpreter(
    answer_with: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(0)
    monkeypatch.setenv("PATH", "/usr/bin")
    cli.main(["fake"])
    folder, *others = os.environ["PATH"].split(os.pathsep)
    assert os.path.exists(os.path.join(folder, "ninja"))
    assert others == ["/usr/bin"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["local", "--", "tvr", "train"], "--ranks"),
        (["local", "--ranks", "2"], "after `--`"),
        (["local", "--ranks", "2", "--"], "after `--`"),
        (["local", "--ranks", "2", "tvr", "train"], "after `--`"),
        (["status", "runs/a", "--", "tvr", "train"], "status takes no command"),
        (["status", "runs/nowhere"], "runs/nowhere was not launched on a cluster"),
        (["local", "--ranks", "0", "--", "tvr", "train"], "--ranks 0 must be at least 1"),
        (["elsewhere", "--ranks", "2", "--", "tvr", "train"], "invalid choice"),
    ],
)
def test_launch_refuses_bad_usage(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = launch(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert reason in capsys.readouterr().err
