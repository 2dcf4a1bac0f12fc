"""A job as a manifest for Kubernetes: a PyTorchJob of Kubeflow's training operator, v1.

The operator tells every pod of the meeting place and of its number (variables PET_*, which torchrun
reads) and starts pods that fail again; a pod that is to leave gets SIGTERM and some time to save.
The manifest is JSON, which is YAML.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tvr.launchers.job import Container, Job, environment_of, seconds
from tvr.launchers.torchrun.launch import is_tvr

IMAGE_FILES = "/tmp/tvr"
MEMORY_DISK = {"name": "shm", "emptyDir": {"medium": "Memory"}}
# The operator looks for a container of this name.
MAIN = "pytorch"


def pytorch_job(job: Job) -> str:
    """The manifest's text. `container.mounts` are CLAIM:PATH, claims of persistent volumes.

    Raises:
        ValueError: the job has no image, or something that a PyTorchJob has not.
    """
    container = job.container
    if container is None:
        raise ValueError("container=None: pods need an image (--container)")
    for what in ("array", "dependency", "partition", "account", "qos", "exclude"):
        if getattr(job, what):
            raise ValueError(f"{what}={getattr(job, what)!r} is for SLURM: a PyTorchJob has none")
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": job.policy.max_failures}
    if job.time_limit is not None:
        policy["activeDeadlineSeconds"] = seconds(job.time_limit)
    replicas = {"Master": _replica(job, container, 1)}
    if job.nodes > 1:
        replicas["Worker"] = _replica(job, container, job.nodes - 1)
    manifest = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _label(job.name)},
        "spec": {
            "nprocPerNode": str(job.ranks_per_node),
            "runPolicy": policy,
            "pytorchReplicaSpecs": replicas,
        },
    }
    return json.dumps(manifest, indent=2) + "\n"


def _replica(job: Job, container: Container, replicas: int) -> dict[str, Any]:
    claims = [_claim(mount) for mount in container.mounts]
    volumes = [
        {"name": _label(claim), "persistentVolumeClaim": {"claimName": claim}}
        for claim in dict.fromkeys(claim for claim, _ in claims)
    ]
    mounts = [{"name": _label(claim), "mountPath": path} for claim, path in claims]
    main = {
        "name": MAIN,
        "image": container.image,
        "workingDir": job.directory,
        "command": _command(job, container),
        "env": [{"name": name, "value": value} for name, value in _environment(job).items()],
        "resources": {"limits": _limits(job)},
        # Loader workers hand over batches in shared memory.
        "volumeMounts": [*mounts, {"name": MEMORY_DISK["name"], "mountPath": "/dev/shm"}],
    }
    spec = {
        "terminationGracePeriodSeconds": job.notice_s,
        "containers": [main],
        "volumes": [*volumes, MEMORY_DISK],
    }
    return {"replicas": replicas, "restartPolicy": "OnFailure", "template": {"spec": spec}}


def _command(job: Job, container: Container) -> list[str]:
    if not is_tvr(job.command):
        return [container.python, "-m", "torch.distributed.run", "--no-python", *job.command]
    agent = [
        container.python,
        "-m",
        "tvr.launchers.torchrun.quiet_main",
        f"{IMAGE_FILES}-ended.json",
    ]
    return [*agent, "-m", "tvr.launchers.rank_main", f"{IMAGE_FILES}-ranks", *job.command[1:]]


def _environment(job: Job) -> dict[str, str]:
    # Otherwise torchrun kills ranks that still save after 30 s.
    return environment_of(job) | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.notice_s)}


def _limits(job: Job) -> dict[str, str]:
    limits: dict[str, str] = {}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    if job.cpus_per_rank is not None:
        limits["cpu"] = str(job.cpus_per_rank * job.ranks_per_node)
    if job.memory is not None:
        # Kubernetes writes Gi for what SLURM calls G.
        limits["memory"] = job.memory + ("i" if job.memory[-1:] in "KMGT" else "Mi")
    return limits


def _claim(mount: str) -> tuple[str, str]:
    claim, colon, path = mount.partition(":")
    if not colon:
        raise ValueError(f"mount {mount!r} must be CLAIM:PATH (--container-mounts)")
    return claim, path


def _label(text: str) -> str:
    """As names in Kubernetes are: lower-case letters, digits and dashes."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].rstrip("-")
    if not label:
        raise ValueError(f"name={text!r} must hold a letter or a digit (--name)")
    return label
