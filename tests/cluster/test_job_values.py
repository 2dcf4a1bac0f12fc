"""No value of a job can end its line or add an option: scripts, ssh commands, manifests."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.launchers import launch_cli
from tvr.launchers.job import Container, Job, captured_environment, from_json, to_json
from tvr.launchers.slurm.script import sbatch_script
from tvr.launchers.ssh.launch import Host, host_command, read_hosts

COMMAND = ("tvr", "train", "--run-dir", "runs/a")
JOB = Job(
    command=COMMAND, run_dir="/disk/runs/a", directory="/disk", python="/venv/bin/python", name="a"
)
INJECTED = "\ntouch injected\n"
TEXT_OPTIONS = (
    *("--mem", "--partition", "--account", "--qos", "--exclude", "--dependency", "--time"),
    *("--array", "--name", "--run-dir", "--interface", "--container", "--targets"),
    "--sbatch",
)
CONTAINER_OPTIONS = ("--container-mounts", "--container-python")


@pytest.mark.parametrize("where", ["slurm", "kubernetes"])
@pytest.mark.parametrize("option", [*TEXT_OPTIONS, *CONTAINER_OPTIONS])
def test_a_newline_in_any_option_is_refused_before_anything_is_written(
    option: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    others = ["--container", "image"] if option in CONTAINER_OPTIONS else []
    line = [where, *others, option, f"x{INJECTED}", "--print", "--", "tvr", "pack", "--task", "%a"]
    if option != "--run-dir":
        line[1:1] = ["--run-dir", "runs/a"]
    assert launch_cli.launch(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "x\\ntouch injected\\n" in captured.err  # the value, shown in one line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "gpu --uid=0"),
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("account", 'a"b'),
        ("qos", "high#low"),
        ("dependency", "afterok:1 --wrap=x"),
        ("memory", "1G --exclusive"),
        ("memory", "all"),
        ("array", "0-3 --wrap=x"),
        ("exclude", ("n1", "n2 --uid=0")),
        ("exclude", ("-n1",)),
        ("name", "a\rb"),
        ("name", "a\u2028b"),
        ("sbatch", ("comment=a\n#SBATCH --uid=0",)),
        ("sbatch", ("gres=gpu:1\\",)),
        ("sbatch", ("comment --uid=0",)),
        ("failed_nodes", ("n1 --uid=0",)),
        ("python", "/bin/python\nid"),
        ("directory", "/disk\nid"),
        ("run_dir", "/disk/\udcff"),
        ("interface", "ib0\nexport X=1"),
        ("targets", "/disk\x00"),
        ("environment", {"NCCL_DEBUG": "INFO\nid"}),
        ("environment", {"NCCL_A;id": "1"}),
        ("environment", {"HF_\u00e9": "1"}),
        ("command", ("tvr", "train\x1b[2J")),
        ("container", Container(image="i\nid")),
        ("container", Container(image="--fakeroot", runtime="apptainer")),
        ("container", Container(image="i", python="-c")),
        ("container", Container(image="i", mounts=("/a:/a\n",))),
    ],
)
def test_hostile_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        replace(JOB, **{name: value})  # type: ignore[arg-type]


def test_a_record_that_was_edited_is_refused() -> None:
    record = to_json(replace(JOB, partition="gpu")).replace('"gpu"', '"gpu\\nid"')
    with pytest.raises(ValueError, match=r"partition='gpu\\nid' must be"):
        from_json(record)


def test_usual_values_are_accepted() -> None:
    job = replace(
        JOB,
        memory="900GB",
        partition="gpu,gpu-long_2",
        account="a.b@c",
        dependency="afterok:17:18?afternotok:19,singleton",
        array="1,3-7:2%4",
        command=("tvr", "pack", "--task", "%a"),
        exclude=("n1", "rack-2.node_03"),
        name="a run's \u00e9 name",
    )
    script = sbatch_script(job, job.record_path("1"))
    assert "#SBATCH --mem=900GB\n#SBATCH --partition=gpu,gpu-long_2\n" in script


def test_a_command_may_have_several_lines(tmp_path: Path) -> None:
    job = replace(JOB, python="echo", command=("bash", "-c", "a\n#SBATCH --uid=0\n\tb"))
    script = sbatch_script(job, tmp_path / "record")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("bash -c a\n#SBATCH --uid=0\n\tb\n")


@given(st.text(max_size=20))
def test_an_accepted_option_of_sbatch_stays_in_its_line(text: str) -> None:
    try:
        job = replace(JOB, sbatch=(f"comment={text}",))
    except ValueError:
        return
    lines = sbatch_script(job, Path("/record")).splitlines()
    plain = sbatch_script(JOB, Path("/record")).splitlines()
    (line,) = set(lines) - set(plain)
    assert len(lines) == len(plain) + 1
    # sbatch reads quotes in a line as a shell does.
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--comment={text}"]


@given(st.text(max_size=20))
def test_accepted_text_stays_in_its_line(text: str) -> None:
    for name in ("partition", "name", "qos", "dependency"):
        try:
            job = replace(JOB, **{name: text})  # type: ignore[arg-type]
        except ValueError:
            continue
        lines = sbatch_script(job, Path("/record")).splitlines()
        plain = sbatch_script(replace(JOB, **{name: "x"}), Path("/record")).splitlines()
        assert len(lines) == len(plain)
        assert sum(line.startswith("#SBATCH") for line in lines) == sum(
            line.startswith("#SBATCH") for line in plain
        )


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=id", "a;id", "a$(id)", "user@-x", "@a", "a/b", "\u00e9\u2028"]
)
def test_a_hostfile_cannot_give_options_to_ssh(name: str) -> None:
    with pytest.raises(ValueError, match="host"):
        read_hosts(f"{name} slots=1\n", source="hosts")
    one = [Host(name="one", ranks=1)]
    with pytest.raises(ValueError, match="--master-addr"):
        host_command(one, 0, ["tvr"], address=name, port=1, environment={})


@pytest.mark.parametrize("name", ["node1", "user@node-1.x.org", "10.0.0.1", "fe80::1", "n_1"])
def test_usual_hosts_are_accepted(name: str) -> None:
    assert read_hosts(f"{name} slots=2", source="hosts") == [Host(name=name, ranks=2)]


def test_a_newline_in_the_environment_is_refused_by_ssh_too() -> None:
    hosts = [Host(name="one", ranks=1)]
    with pytest.raises(ValueError, match="NCCL_DEBUG"):
        host_command(hosts, 0, ["tvr"], address="one", port=1, environment={"NCCL_DEBUG": "x\nid"})


def test_variables_without_an_ascii_name_are_not_captured() -> None:
    assert captured_environment({"HF_\u00e9": "1", "HF_HOME": "/h"}) == {"HF_HOME": "/h"}
