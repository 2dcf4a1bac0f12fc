"""Options that `--sbatch` passes on, variables of the shell, and what sbatch prints."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers import launch_cli
from tvr.launchers.job import Job, from_json, parse_time_limit, read_job, to_json
from tvr.launchers.sbatch_options import OTHERS, OWN, gpus_per_node, read_sbatch_options
from tvr.launchers.slurm.nodelist import expand_nodes
from tvr.launchers.slurm.sbatch_reply import SubmittedJob, only_number, read_reply
from tvr.launchers.slurm.script import effective_notice_s
from tvr.launchers.slurm.task_main import number_of_ranks, ranks_on_this_node

JOB = Job(command=("x",), run_dir="/r", directory="/", python="python3", name="x")
SBATCH = """#!/bin/bash
env > '{folder}/environment'; printf '%s\\n' "$@" > '{folder}/arguments'
cat "${{@: -1}}" > '{folder}/script'
{reply}
"""
SCONTROL = """#!/bin/bash
echo "$*" >> '{folder}/calls'; env > '{folder}/scontrol-environment'
echo 'CLUSTER: slaking'
echo "JobId=${{@: -1}} JobState=RUNNING Restarts=0 Reason=None NodeList=n1"
"""


@dataclass(frozen=True)
class Shell:
    """A login shell with fake SLURM commands."""

    folder: Path

    def reply(self, command: str) -> None:
        self._write("sbatch", SBATCH.format(folder=self.folder, reply=command))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def launch(self, *options: str) -> int:
        run_dir = ["--run-dir", str(self.folder / "run")]
        return launch_cli.launch(["slurm", *run_dir, *options, "--", "tvr", "train"])

    @property
    def directives(self) -> list[str]:
        lines = (self.folder / "script").read_text().splitlines()
        return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]

    def variables(self, file: str = "environment") -> dict[str, str]:
        lines = (self.folder / file).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "SRUN")):
            monkeypatch.delenv(name)
    shell = Shell(tmp_path)
    shell.reply("echo 17")
    shell._write("scontrol", SCONTROL.format(folder=tmp_path))
    shell._write("squeue", "#!/bin/bash\nexit 1\n")
    shell._write("scancel", f"#!/bin/bash\necho \"scancel $*\" >> '{tmp_path}/calls'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return shell


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["--gres=gpu:a100:4"], ("gres=gpu:a100:4",)),
        (["--gres gpu:a100:4 --exclusive"], ("gres=gpu:a100:4", "exclusive")),
        (["-C a100|h100"], ("constraint=a100|h100",)),
        (["-Ca100", "-w n[1-3]"], ("constraint=a100", "nodelist=n[1-3]")),
        (['--comment="a b" --nice=-5'], ("comment=a b", "nice=-5")),
        (["--mem-per-cpu=4G", "--reservation=r1,r2"], ("mem-per-cpu=4G", "reservation=r1,r2")),
        (["--x-site-plugin=on"], ("x-site-plugin=on",)),
    ],
)
def test_options_are_read_in_the_forms_of_sbatch(
    texts: list[str], options: tuple[str, ...]
) -> None:
    assert read_sbatch_options(texts) == options


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be an option of sbatch"),
        ("a100", "'a100' must be an option of sbatch"),
        ("--comment=a b", "'b' must be an option of sbatch"),
        ("-Z 1", "sbatch has no option -Z"),
        ('--comment="a', "No closing quotation"),
        ("--comment=a\nb", r"must be without control characters, has U\+000A"),
    ],
)
def test_what_is_no_option_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_sbatch_options([text])


def test_passed_on_options_are_shown_and_submitted(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sbatch", "--gres=gpu:a100:4", "--sbatch", "-C 'a100&ib' --reservation=r"]
    options += ["--sbatch=--comment='say \"x\" # 1'", "--sbatch", "--mem=64G"]
    assert shell.launch("--print", *options) == 0
    script = capsys.readouterr().out
    lines = [
        "#SBATCH --gres=gpu:a100:4",
        "#SBATCH --constraint=a100&ib",
        "#SBATCH --reservation=r",
        '#SBATCH --comment="say \\"x\\" # 1"',
        "#SBATCH --mem=64G",
    ]
    assert "\n".join(lines) in script
    assert shell.launch(*options) == 0
    assert [line.removeprefix("#SBATCH ") for line in lines] == [
        line for line in shell.directives if f"#SBATCH {line}" in lines
    ]
    assert launch_cli.launch(["status", str(shell.folder / "run")]) == 0
    assert "--gres=gpu:a100:4" in capsys.readouterr().out
    job = read_job(shell.folder / "run")
    # The number of GPUs is that of --gres, and the ranks follow it.
    assert (job.gpus_per_node, job.ranks_per_node) == (4, 4)
    assert "--gpus-per-node=4" not in shell.directives
    assert "--ntasks-per-node=4" in shell.directives


@pytest.mark.parametrize("name", sorted(OWN))
def test_an_option_of_tvrs_own_is_refused_with_the_setting_to_use(
    name: str, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.launch("--sbatch", f"--{name}=1") == 2
    assert f"tvr sets --{name} itself; {OWN[name]}" in capsys.readouterr().err
    assert not (shell.folder / "run").exists()


@pytest.mark.parametrize("name", ["nod", "ntasks-per", "outp", "requ", "arr", "sig", "job-nam"])
def test_a_shortened_name_is_refused(
    name: str, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """sbatch would take it for an option that tvr sets."""
    assert shell.launch("--sbatch", f"--{name}=1") == 2
    assert f"--{name} is short for --" in capsys.readouterr().err


def test_a_secret_is_not_passed_on_by_value(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options are stored in the run's folder."""
    assert shell.launch("--sbatch", "--export=ALL,WANDB_API_KEY=abc") == 2
    error = capsys.readouterr().err
    assert "--export gives WANDB_API_KEY a value" in error
    assert not (shell.folder / "run").exists()


def test_own_and_other_options_are_apart() -> None:
    assert OWN.keys() & OTHERS == set()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-N 2"], "tvr sets --nodes itself; give --nodes"),
        (["--gres=a:1 --gres=b:2"], "--gres is given 2 times"),
        (["--mem=1G --mem-per-gpu=2G"], "only one of --mem, --mem-per-gpu can be given"),
        (["-m cyclic"], "--distribution=cyclic must begin with block"),
    ],
)
def test_contradictions_are_refused(
    options: list[str], reason: str, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [word for option in options for word in ("--sbatch", option)]
    assert shell.launch(*line) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--mem", "1G", "--sbatch", "--mem=2G"), "--mem and memory='1G' are both given"),
        (("--mem", "1G", "--sbatch", "--mem-per-cpu=2G"), "only one of --mem, --mem-per-cpu"),
        (("--partition", "a", "--sbatch", "-p b"), "--partition and partition='a' are both"),
        (
            ("--gpus-per-node", "2", "--sbatch", "--gres=gpu:a100:4"),
            "gpus_per_node=2 must be 4, as in sbatch: --gres=gpu:a100:4",
        ),
    ],
)
def test_two_settings_of_one_thing_are_refused(
    options: tuple[str, ...], reason: str, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.launch(*options) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gres", "number"),
    [
        ("gpu", 1),
        ("gpu:2", 2),
        ("gpu:a100", 1),
        ("gpu:a100:4", 4),
        ("gpu:1g.10gb:2,gpu:a100:1", 3),
        ("gres/gpu:a100:8(S:0-1)", 8),
        ("craynetwork:0,gpu:2", 2),
        ("shard:3", None),
    ],
)
def test_gpus_of_a_gres_are_counted(gres: str, number: int | None) -> None:
    assert gpus_per_node([f"gres={gres}"]) == number


def test_the_notice_regards_the_shortest_limit() -> None:
    job = replace(JOB, time_limit="60", sbatch=("time-min=4",))
    assert effective_notice_s(job) == 120
    unlimited = replace(JOB, time_limit="UNLIMITED")
    assert effective_notice_s(unlimited) == 300
    assert parse_time_limit("infinite") == 0


def test_a_record_of_an_earlier_version_is_read() -> None:
    """Its job may run for days."""
    record = json.loads(to_json(JOB))
    for name in ("sbatch", "continues", "failed_nodes"):
        del record[name]
    assert from_json(json.dumps(record)) == JOB


# ------------------------------------------------------------ variables


def test_variables_of_the_shell_do_not_change_the_job(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dropped = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_SIGNAL": "TERM@1",
        "SBATCH_GRES": "gpu:8",
        "SBATCH_EXPORT": "ALL,HF_TOKEN=hidden",
        "SRUN_CPUS_PER_TASK": "1",
        "SLURM_TIMELIMIT": "1",
        "CUDA_VISIBLE_DEVICES": "3",
    }
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JWT": "secret",
        "SLURM_SACK_SOCKET": "/run/sack",
        "SLURM_CLUSTERS": "slaking",
        "UNRELATED": "1",
    }
    for name, value in (dropped | kept).items():
        monkeypatch.setenv(name, value)
    assert shell.launch("--time", "60") == 0
    passed_on = shell.variables()
    assert kept.items() <= passed_on.items()
    assert not dropped.keys() & passed_on.keys()
    assert "--time=60" in shell.directives
    errors = capsys.readouterr().err
    assert "secret" not in errors
    assert "hidden" not in errors
    assert "SBATCH_TIMELIMIT=1 is not passed on; give --time\n" in errors
    assert 'SBATCH_GRES=gpu:8 is not passed on; give --sbatch "--gres=gpu:8"\n' in errors
    assert "SRUN_CPUS_PER_TASK=1 is not passed on to the ranks\n" in errors


def test_the_place_of_a_job_is_taken_from_the_shell_by_name(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ACCOUNT", "PARTITION", "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", name.lower())
    assert shell.launch("--partition", "gpu") == 0
    assert {"--account=account", "--partition=gpu", "--reservation=reservation"} <= set(
        shell.directives
    )
    assert not [name for name in shell.variables() if name.startswith("SBATCH")]
    errors = capsys.readouterr().err
    assert "SBATCH_ACCOUNT=account is used: --account=account\n" in errors
    assert "SBATCH_PARTITION=partition is not passed on; give --partition=partition\n" in errors
    # The record holds them, so that a resubmission from another shell is the same.
    assert read_job(shell.folder / "run").sbatch == ("reservation=reservation",)


def test_a_submission_within_a_job_inherits_nothing_of_it(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"JOB_ID": "5", "CPU_BIND": "mask_cpu:0x1", "MEM_PER_NODE": "1", "NTASKS": "1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert shell.launch() == 0
    names = {name for name in shell.variables() if name.startswith(("SLURM", "PMI"))}
    assert names == {"SLURM_CONF"}
    assert "the variables of job 5, in which this runs, are not passed on" in (
        capsys.readouterr().err
    )


def test_filters_of_the_user_do_not_reach_the_commands(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCONTROL_FEDERATION", "1")
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")
    assert shell.launch() == 0
    assert launch_cli.launch(["cancel", str(shell.folder / "run")]) == 0
    assert not [name for name in shell.variables("scontrol-environment") if name.startswith("SC")]


# ------------------------------------------------------------ replies

BANNER = "Welcome to cluster 5 (slurm 23.11.10)\n--> Verifying jobs per user (max 100)...OK\n"


@pytest.mark.parametrize(
    ("output", "job"),
    [
        ("123\n", ("123", None)),
        ("123;slaking\n", ("123", "slaking")),
        (f"{BANNER}123\n", ("123", None)),
        (f"{BANNER}123;slaking\nCharged to account 42, 99% left\n", ("123", "slaking")),
        ("Submitted batch job 123\n", ("123", None)),
        (f"{BANNER}Submitted batch job 123 on cluster slaking\n", ("123", "slaking")),
        ("123_[0-7]\n", ("123", None)),
    ],
)
def test_replies_of_sbatch_are_read(output: str, job: tuple[str, str | None]) -> None:
    assert read_reply(output) == SubmittedJob(job_id=job[0], cluster=job[1])


@pytest.mark.parametrize(
    ("output", "job_id"),
    [
        ("Stapelauftrag 123 wurde \u00fcbermittelt.\n", "123"),
        ("\u5df2\u63d0\u4ea4\u4f5c\u4e1a 123\n", "123"),
        ("slurm 23.11.10, 2026-01-02 10:20:30\nTrabajo 123 enviado (123)\n", "123"),
        ("job 1 or 2\n", None),
        ("done\n", None),
    ],
)
def test_a_single_number_is_the_job(output: str, job_id: str | None) -> None:
    assert read_reply(output) is None
    found = only_number(output)
    assert (found and found.job_id) == job_id


def test_a_job_of_another_cluster_is_asked_for_there(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.reply("echo '123;slaking'")
    assert shell.launch("--sbatch", "-M slaking") == 0
    assert capsys.readouterr().out == "123\n"
    assert launch_cli.launch(["status", str(shell.folder / "run")]) == 0
    assert "123  RUNNING" in capsys.readouterr().out
    assert launch_cli.launch(["cancel", str(shell.folder / "run")]) == 0
    calls = (shell.folder / "calls").read_text().splitlines()
    assert "--oneliner --clusters=slaking show job 123" in calls
    assert calls[-1] == "scancel --clusters=slaking 123"


def test_status_and_resume_work_without_scontrol(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.launch() == 0
    shell._write("scontrol", "#!/bin/bash\necho 'scontrol: Access denied' >&2; exit 1\n")
    run_dir = str(shell.folder / "run")
    assert launch_cli.launch(["status", run_dir]) == 2
    assert "Access denied" in capsys.readouterr().err
    shell._write("squeue", "#!/bin/bash\necho '17   RUNNING   2   n[1-2]'\n")
    assert launch_cli.launch(["status", run_dir]) == 0
    assert "17   RUNNING  2         n[1-2]" in capsys.readouterr().out
    assert launch_cli.launch(["resume", run_dir]) == 2
    assert "job 17 of" in capsys.readouterr().err
    shell._write("squeue", "#!/bin/bash\necho '17   COMPLETED   2   n[1-2]'\n")
    assert launch_cli.launch(["resume", run_dir]) == 0


@pytest.mark.parametrize(
    "reply",
    [
        "echo 'transmis : voir les 2 files, 3 jobs'",
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1",
    ],
)
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_job_without_a_readable_reply_is_looked_up(
    reply: str, is_listed: bool, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.reply(reply)
    if is_listed:
        path = f"'{shell.folder}/run/launch/jobs/'*.sbatch"
        shell._write("squeue", f'#!/bin/bash\necho "9 /other.sbatch"\necho 123 {path}\n')
    assert shell.launch() == (0 if is_listed else 2)
    captured = capsys.readouterr()
    records = list((shell.folder / "run" / "launch" / "jobs").glob("*.json"))
    # The job may run: its record stays.
    assert len(records) == 1
    if is_listed:
        (line,) = (shell.folder / "run/launch/submitted.jsonl").read_text().splitlines()
        assert (captured.out, json.loads(line)["job_id"]) == ("123\n", "123")
    else:
        assert "see `squeue --me`" in captured.err


# ------------------------------------------------------------ variables of ranks


def test_ranks_are_counted_without_ntasks_per_node() -> None:
    uneven = {"SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7"}
    counts = [ranks_on_this_node(uneven | {"SLURM_NODEID": str(node)}) for node in range(4)]
    assert counts == [2, 2, 2, 1]
    assert number_of_ranks(uneven) == 7


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("n1, n2 ,n3", ["n1", "n2", "n3"]),
        ("node1g[0010,0011],node2g0005,node3g0007", "node1g0010 node1g0011 node2g0005 node3g0007"),
        ("cpn-m11-[16-17],a.b-c", "cpn-m11-16 cpn-m11-17 a.b-c"),
        ("rack[0-1]_blade[0-1]", "rack0_blade0 rack0_blade1 rack1_blade0 rack1_blade1"),
        ("b1u01n1,b2u[05,02]n3", "b1u01n1 b2u05n3 b2u02n3"),
    ],
)
def test_node_lists_of_many_forms(nodelist: str, nodes: list[str] | str) -> None:
    assert expand_nodes(nodelist) == (nodes.split() if isinstance(nodes, str) else nodes)
