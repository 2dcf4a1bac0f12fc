"""Kubernetes manifests of jobs, parsed as YAML."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from tvr.launchers.job import Container, Job
from tvr.launchers.kubernetes import pytorch_job
from tvr.launchers.launch_cli import launch
from tvr.launchers.restart_policy import RestartPolicy

JOB = Job(
    command=("tvr", "train", "--run-dir", "/runs/it's a run"),
    run_dir="/runs/it's a run",
    directory="/runs",
    python="/venv/bin/python",
    name="It's a run!",
    nodes=4,
    gpus_per_node=8,
    ranks_per_node=8,
    cpus_per_rank=6,
    memory="900G",
    time_limit="2:00:00",
    notice_s=90,
    interface="eth0",
    environment={"OMP_NUM_THREADS": "6"},
    container=Container(image="registry/tvr:1", mounts=("runs:/runs", "data:/data")),
    policy=RestartPolicy(max_failures=5),
)


def manifest(job: Job) -> dict[str, Any]:
    return yaml.safe_load(pytorch_job(job))


def test_manifest_contains_the_job() -> None:
    job = manifest(JOB)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"] == {"name": "it-s-a-run"}
    spec = job["spec"]
    assert spec["nprocPerNode"] == "8"
    assert spec["runPolicy"]["backoffLimit"] == 5
    assert spec["runPolicy"]["activeDeadlineSeconds"] == 7200
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 3}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 90
    (main,) = pod["containers"]
    assert (main["name"], main["image"]) == ("pytorch", "registry/tvr:1")
    limits = {"nvidia.com/gpu": "8", "cpu": "48", "memory": "900Gi"}
    assert main["resources"] == {"limits": limits}
    assert {entry["name"]: entry["value"] for entry in main["env"]} == {
        "OMP_NUM_THREADS": "6",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TVR_GPUS_PER_NODE": "8",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90",
    }
    assert main["command"][:3] == ["python3", "-m", "tvr.launchers.torchrun.quiet_main"]
    assert main["command"][-3:] == ["train", "--run-dir", "/runs/it's a run"]
    mounts = {entry["name"]: entry["mountPath"] for entry in main["volumeMounts"]}
    assert mounts == {"runs": "/runs", "data": "/data", "shm": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_one_node_has_no_workers_and_other_commands_run_unchanged() -> None:
    job = manifest(replace(JOB, nodes=1, command=("./x", "--y")))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    command = replicas["Master"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["python3", "-m", "torch.distributed.run", "--no-python", "./x", "--y"]


def test_claim_may_be_mounted_at_several_paths() -> None:
    mounts = ("data:/a", "runs:/runs", "data:/b")
    pods = manifest(replace(JOB, container=Container(image="i", mounts=mounts)))["spec"]
    pod = pods["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    mounts = [(e["name"], e["mountPath"]) for e in pod["containers"][0]["volumeMounts"]]
    assert mounts == [("data", "/a"), ("runs", "/runs"), ("data", "/b"), ("shm", "/dev/shm")]
    assert [volume["name"] for volume in pod["volumes"]] == ["data", "runs", "shm"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"container": None}, r"pods need an image \(--container\)"),
        ({"partition": "gpu"}, r"partition='gpu' is for SLURM only"),
        ({"sbatch": ("exclusive",)}, r"sbatch=\('exclusive',\) is for SLURM only"),
        ({"exclude": ("n1",)}, r"exclude=\('n1',\) is for SLURM only"),
        ({"name": "?"}, r"name='\?' must contain a letter or a digit"),
        ({"container": Container(image="i", mounts=("/data",))}, "'/data' must be CLAIM:PATH"),
    ],
)
def test_unsupported_options_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pytorch_job(replace(JOB, **change))


def test_the_command_line_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["kubernetes", "--nodes", "2", "--container", "i", "--run-dir", "/runs/a"]
    command = ["--", "tvr", "train"]
    assert launch([*line, *command]) == 2
    assert "give --print" in capsys.readouterr().err
    assert launch([*line, "--print", *command]) == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1
