"""The command `tvr`: help, dispatch to sub-commands, lazy imports, and exit codes."""

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
def fake_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Installs the sub-command `tvr fake`; returns the argument lists of its calls."""

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
    result = run_tvr("--help")
    assert result.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in result.stdout
        assert command.help in result.stdout
    assert "exit codes: 0 done, 2 bad usage" in result.stdout


def test_version() -> None:
    result = run_tvr("--version")
    assert (result.returncode, result.stdout) == (0, f"tvr {version('tvr')}\n")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["--nonsense"]])
def test_bad_usage_exits_with_2_and_prints_usage(argv: list[str]) -> None:
    result = run_tvr(*argv)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "tvr COMMAND" in result.stderr


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
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(result.stderr) == []


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_a_function(name: str) -> None:
    assert callable(cli._load(cli.COMMANDS[name].target))


@pytest.mark.parametrize("code", [0, 2, 3])
def test_arguments_and_exit_code_pass_unchanged(
    code: int, fake_command: Callable[..., list[list[str]]]
) -> None:
    calls = fake_command(code)
    argv = ["--help", "--version", "-x", "--", "a b", ""]
    assert cli.main(["fake", *argv]) == code
    assert calls == [argv]


def test_unexpected_error_exits_with_3_and_a_traceback(
    fake_command: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(RuntimeError("the reason"))
    assert cli.main(["fake"]) == 3
    assert "RuntimeError: the reason" in capsys.readouterr().err


def test_interrupt_exits_with_3_without_a_traceback(
    fake_command: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(KeyboardInterrupt())
    assert cli.main(["fake"]) == 3
    assert capsys.readouterr().err == "tvr fake: interrupted\n"


def test_sub_commands_find_scripts_of_the_virtual_environment(
    fake_command: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(0)
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
