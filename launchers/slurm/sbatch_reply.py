"""Reads the ID of a submitted job from what sbatch, or a site's wrapper of it, prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# `sbatch --parsable` prints JOB, or JOB;CLUSTER for a cluster that the user names.
PARSABLE = re.compile(r"(\d+)(?:_\S+)?(?:;([\w.-]+))?")
# sbatch without --parsable, for a wrapper that drops the option.
SENTENCE = re.compile(r"Submitted batch job (\d+)(?: on cluster ([\w.-]+))?", re.IGNORECASE)
# A number of its own, which is no part of a date, a version, a path or an amount.
NUMBER = re.compile(r"(?<![\w.,:;/+\-])(\d+)(?![\w/+\-]|[.,:;]\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job that SLURM has accepted."""

    job_id: str
    cluster: str | None = None
    """Name of its cluster if that is not the default one."""


class ReplyLost(ValueError):
    """SLURM may have accepted the job, but its ID is unknown."""


def read_reply(output: str) -> SubmittedJob | None:
    """The job that sbatch's own output names; None if the output has neither of its forms.

    A wrapper may print a banner before or after.
    """
    for line in reversed(output.splitlines()):
        if match := PARSABLE.fullmatch(line.strip()) or SENTENCE.search(line):
            return SubmittedJob(job_id=_plain(match[1]), cluster=match[2])
    return None


def only_number(output: str) -> SubmittedJob | None:
    """The job whose ID is the only number in the output, as in a translated sentence."""
    numbers = {_plain(number) for number in NUMBER.findall(output)}
    return SubmittedJob(job_id=numbers.pop()) if len(numbers) == 1 else None


def job_of_script(listed: str, script: Path) -> SubmittedJob | None:
    """The job of a script in lines `JOB COMMAND` of squeue."""
    for line in listed.splitlines():
        number, _, command = line.strip().partition(" ")
        if number.isdecimal() and command.strip().startswith(str(script)):
            return SubmittedJob(job_id=_plain(number))
    return None


def _plain(digits: str) -> str:
    return str(int(digits))
