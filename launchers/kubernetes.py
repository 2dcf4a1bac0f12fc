"""Renders a job as a Kubernetes manifest: a PyTorchJob of Kubeflow's training operator, v1.

Experimental: no cluster has run it yet. The operator sets the rendezvous variables that torchrun
reads (PET_*), and restarts failed pods. An evicted pod gets SIGTERM and a grace period to save.
The manifest is JSON, which is valid YAML.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tvr.launchers.job import Container, Job, job_environment, parse_time_limit
from tvr.launchers.process import is_tvr_command

IMAGE_FILES = "/tmp/tvr"
SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory"}}
# The operator requires a container of this name.
MAIN_CONTAINER = "pytorch"


def pytorch_job(job: Job) -> str:
    """Renders the manifest.

    `job.container.mounts` are CLAIM:PATH: claims of persistent volumes and their mount points.

    Raises:
        ValueError: the job has no image, or uses a SLURM feature that a PyTorchJob lacks.
    """
    container = job.container
    if container is None:
        raise ValueError("container=None: pods need an image (--container)")
    for name in ("array", "dependency", "partition", "account", "qos", "exclude", "sbatch"):
        if getattr(job, name):
            raise ValueError(f"{name}={getattr(job, name)!r} is for SLURM only")
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": job.policy.max_failures}
    if job.time_limit is not None and (limit_s := parse_time_limit(job.time_limit)):
        policy["activeDeadlineSeconds"] = limit_s
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
        "name": MAIN_CONTAINER,
        "image": container.image,
        "workingDir": job.directory,
        "command": _command(job, container),
        "env": [{"name": name, "value": value} for name, value in _environment(job).items()],
        "resources": {"limits": _limits(job)},
        # Loader workers pass batches through shared memory.
        "volumeMounts": [*mounts, {"name": SHARED_MEMORY["name"], "mountPath": "/dev/shm"}],
    }
    spec = {
        "terminationGracePeriodSeconds": job.notice_s,
        "containers": [main],
        "volumes": [*volumes, SHARED_MEMORY],
    }
    return {"replicas": replicas, "restartPolicy": "OnFailure", "template": {"spec": spec}}


def _command(job: Job, container: Container) -> list[str]:
    if not is_tvr_command(job.command):
        return [container.python, "-m", "torch.distributed.run", "--no-python", *job.command]
    agent = [
        container.python,
        "-m",
        "tvr.launchers.torchrun.quiet_main",
        f"{IMAGE_FILES}-ended.json",
    ]
    return [*agent, "-m", "tvr.launchers.rank_main", f"{IMAGE_FILES}-ranks", *job.command[1:]]


def _environment(job: Job) -> dict[str, str]:
    # By default, torchrun kills ranks that still save after 30 s.
    return job_environment(job) | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.notice_s)}


def _limits(job: Job) -> dict[str, str]:
    limits: dict[str, str] = {}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    if job.cpus_per_rank is not None:
        limits["cpu"] = str(job.cpus_per_rank * job.ranks_per_node)
    if job.memory is not None:
        # SLURM's G is Gi in Kubernetes; without a unit, SLURM means M.
        number = job.memory.rstrip("KMGTPkmgtpiBb")
        limits["memory"] = f"{number}{job.memory[len(number) :][:1].upper() or 'M'}i"
    return limits


def _claim(mount: str) -> tuple[str, str]:
    claim, colon, path = mount.partition(":")
    if not colon or not path.startswith("/"):
        raise ValueError(f"mount {mount!r} must be CLAIM:PATH (--container-mounts)")
    return claim, path


def _label(text: str) -> str:
    """Converts text to a Kubernetes name: lower-case letters, digits and dashes."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].rstrip("-")
    if not label:
        raise ValueError(f"name={text!r} must contain a letter or a digit (--name)")
    return label
