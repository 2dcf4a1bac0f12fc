"""Job records, batch scripts (golden files, bash, shellcheck) and `tvr launch slurm` options."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tvr.launchers import launch_cli
from tvr.launchers.job import (
    Container,
    Job,
    captured_environment,
    command_run_dir,
    from_json,
    parse_time_limit,
    read_job,
    to_json,
)
from tvr.launchers.restart_policy import RestartPolicy
from tvr.launchers.slurm.script import effective_notice_s, sbatch_script

GOLDEN = Path(__file__).parent / "golden_sbatch"
TRAIN = ("tvr", "train", "--recipe", "msrvtt_b32", "--run-dir", "runs/a")

ONE_RANK = Job(
    command=TRAIN, run_dir="/disk/runs/a", directory="/disk", python="/venv/bin/python", name="a"
)
LARGE = replace(
    ONE_RANK,
    nodes=8,
    gpus_per_node=8,
    ranks_per_node=8,
    cpus_per_rank=12,
    memory="900G",
    partition="gpu",
    account="video",
    qos="high",
    time_limit="1-00:00:00",
    exclude=("gpu07", "gpu11"),
    notice_s=150,
    interface="ib0",
    environment={
        "OMP_NUM_THREADS": "12",
        "NCCL_DEBUG": "WARN",
        "TORCH_EXTENSIONS_DIR": "/disk/ext",
    },
    targets="/disk/prometheus",
)
IMAGE = Container(image="i")
JOBS = {
    "one_rank": ONE_RANK,
    "large": LARGE,
    "quoted": replace(
        ONE_RANK,
        command=("tvr", "train", "--run-dir", 'it\'s "b" at 100% $HOME', "--loss.margin", "0.2"),
        run_dir='/my disk/it\'s "b" at 100% $HOME',
        directory="/my disk",
        name='it\'s "b" at 100% $HOME',
        nodes=2,
        environment={"PATH": "/my bin:/bin", "TORCH_LOGS": 'it\'s "$x"'},
    ),
    "array": replace(
        ONE_RANK,
        command=("tvr", "pack", "--task", "%a/8", "--out", "data/it's", "--annotations", "a.jsonl"),
        array="0-7",
        time_limit="10",
    ),
    "pyxis": replace(
        LARGE,
        nodes=2,
        exclude=(),
        container=Container(image="registry#tvr:1", mounts=("/data:/data", "/models:/m")),
    ),
    "apptainer": replace(
        ONE_RANK,
        nodes=2,
        gpus_per_node=4,
        ranks_per_node=4,
        dependency="afterok:17",
        container=Container(
            image="/images/tvr 1.sif", runtime="apptainer", mounts=("/data:/data",), python="/py"
        ),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_script_equals_golden_file(name: str) -> None:
    assert (
        sbatch_script(JOBS[name], JOBS[name].record_path("RECORD"))
        == (GOLDEN / f"{name}.sh").read_text()
    )


def test_every_golden_file_belongs_to_a_job() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_bash_parses_the_script(name: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sh")], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_reports_nothing() -> None:
    # SC2016 warns about a dollar sign in single quotes, which is intended here.
    line = ["shellcheck", "--enable=all", "--exclude=SC2016", *map(str, sorted(GOLDEN.iterdir()))]
    result = subprocess.run(line, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("name", JOBS)
def test_script_passes_environment_and_arguments_unchanged(name: str, tmp_path: Path) -> None:
    job = replace(JOBS[name], environment={**JOBS[name].environment, "PATH": str(tmp_path)})
    script = sbatch_script(replace(job, python="python"), job.record_path("1"))
    program = tmp_path / "python"
    program.write_text(
        "#!/usr/bin/python3\nimport json, os, sys\nprint(json.dumps([sys.argv, *[os.environ]],"
        " default=dict))\n"
    )
    program.chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": "5"}
    result = subprocess.run(
        ["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    arguments, variables = json.loads(result.stdout)
    task = arguments.index("tvr.launchers.slurm.task_main")
    assert arguments[1:5] == [
        "-m",
        "tvr.launchers.slurm.batch_main",
        str(job.record_path("1")),
        "srun",
    ]
    assert arguments[task + 1 :] == [argument.replace("%a", "5") for argument in job.command]
    assert dict(variables) | job.environment == dict(variables)
    output = next(argument for argument in arguments if argument.startswith("--output="))
    assert output.replace("%%", "%").startswith(f"--output={job.launch_dir}/%j")


@pytest.mark.parametrize("name", JOBS)
def test_records_round_trip(name: str, tmp_path: Path) -> None:
    job = replace(JOBS[name], policy=RestartPolicy(max_failures=7, back_off_s=1.5))
    assert from_json(to_json(job)) == job
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text(to_json(job))
    assert read_job(tmp_path) == job


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "was not launched on a cluster"), ("{}", "written by another version")],
)
def test_missing_or_foreign_record_is_refused(
    content: str | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "launch").mkdir()
        (tmp_path / "launch" / "job.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_job(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nodes": 0}, r"nodes=0 must be at least 1"),
        ({"ranks_per_node": 0}, r"ranks_per_node=0 must"),
        ({"gpus_per_node": -1}, r"gpus_per_node=-1 must be 0 or more"),
        ({"cpus_per_rank": 0}, r"cpus_per_rank=0 must"),
        ({"command": ()}, r"command=\(\) must be a command such as"),
        ({"run_dir": "/a\\b"}, r"run_dir='/a\\\\b' must be without backslash"),
        ({"name": "a\nb"}, r"name='a\\nb' must be without"),
        ({"time_limit": "soon"}, r"time 'soon' must be minutes"),
        ({"array": "0-3", "run_dir": "/runs/%a"}, r"run_dir='/runs/%a' contains %a"),
        (
            {"container": IMAGE, "run_dir": "/a,b"},
            r"run_dir='/a,b' must be without colon and comma",
        ),
        ({"container": IMAGE, "directory": "/a:b"}, r"directory='/a:b' must be without colon"),
        ({"array": "0-3"}, r"array='0-3': every task would do the same; .* must contain %a"),
    ],
)
def test_invalid_jobs_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(ONE_RANK, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:02:03", 3723),
        ("2-1", 49 * 3600),
        ("2-1:30", 49 * 3600 + 1800),
        ("2-1:30:05", 49 * 3600 + 1805),
    ],
)
def test_time_limits_are_parsed_like_slurm(text: str, number: int) -> None:
    assert parse_time_limit(text) == number


def test_notice_is_at_most_half_of_the_time_limit() -> None:
    times = [(None, 300), ("5", 150), ("10", 300), ("60", 300)]
    assert [effective_notice_s(replace(ONE_RANK, time_limit=t)) for t, _ in times] == [
        n for _, n in times
    ]


def test_environment_is_captured_without_secrets() -> None:
    environment = {
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/h",
        "HF_TOKEN": "x",
        "EDITOR": "vi",
    }
    assert captured_environment(environment) == {
        "HF_HOME": "/h",
        "NCCL_DEBUG": "INFO",
        "PATH": "/bin",
    }


@pytest.mark.parametrize(
    ("devices", "kept"),
    [("0,1", None), ("GPU-4f", None), ("MIG-1", None), ("", ""), ("-1", "-1"), (None, None)],
)
def test_selection_of_local_gpus_is_not_captured(
    devices: str | None, kept: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    job = submitted_job(monkeypatch, "--run-dir", str(tmp_path))
    assert job.environment.get("CUDA_VISIBLE_DEVICES") == kept
    assert job.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("options", "expected"), [((), (300, False)), (("--notice", "90"), (90, True))]
)
def test_job_records_whether_the_user_gave_the_notice(
    options: tuple[str, ...],
    expected: tuple[int, bool],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    job = submitted_job(monkeypatch, "--run-dir", str(tmp_path), *options)
    assert (job.notice_s, job.notice_given) == expected


def submitted_job(monkeypatch: pytest.MonkeyPatch, *options: str) -> Job:
    """The job that `tvr launch slurm` submits for these options."""
    jobs: list[Job] = []
    monkeypatch.setattr(launch_cli, "submit_job", lambda job: jobs.append(job) or "1")
    assert launch_cli.launch(["slurm", *options, "--", "tvr", "train"]) == 0
    return jobs[0]


@pytest.mark.parametrize(
    ("line", "found"),
    [("tvr train --run-dir a/b -x", "a/b"), ("tvr train --run-dir=a", "a"), ("tvr pack", None)],
)
def test_run_dir_is_read_from_the_command(line: str, found: str | None) -> None:
    assert command_run_dir(line.split()) == found


def test_print_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "--nodes 2 --gpus-per-node 4 --cpus-per-rank 6 --time 60 --partition gpu --print"
    line += " --exclude n[1,3],m[08-09]"
    assert launch_cli.launch(["slurm", *line.split(), "--", *TRAIN]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in script
    assert f'#SBATCH --output="{tmp_path}/runs/a/launch/%j.out"\n' in script
    assert "#SBATCH --exclude=n1,n3,m08,m09\n" in script
    assert shlex.join(TRAIN) in script
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "command", "reason"),
    [
        ([], ["tvr", "pack"], "--run-dir is missing: the folder for the script and all output"),
        (["--nodes", "0"], TRAIN, "nodes=0 must be at least 1"),
        (["--time", "soon"], TRAIN, "time 'soon' must be"),
        (["--notice", "0"], TRAIN, "notice_s=0 must be at least 1"),
        (["--exclude", "n[1"], TRAIN, "node list 'n[1' must be names such as"),
        (["--max-failures", "0"], TRAIN, "max_failures=0 must be at least 1"),
        ([], TRAIN, "sbatch is not installed"),
    ],
)
def test_invalid_submission_exits_with_2(
    options: list[str],
    command: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch_cli.launch(["slurm", *options, "--", *command]) == 2
    assert f"tvr launch slurm: error: {reason}" in capsys.readouterr().err
