"""Options of sbatch that a job passes on unchanged, and those that tvr sets itself.

An option is held as `NAME` or `NAME=VALUE`, with the long name and without dashes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from tvr.launchers.job_values import check_texts

FIELD = "sbatch"
NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)
LETTERS = {
    **{"A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint"},
    **{"c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile"},
    **{"G": "gpus", "H": "hold", "h": "help", "i": "input", "J": "job-name", "k": "no-kill"},
    **{"L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks"},
    **{"O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos"},
    **{"S": "core-spec", "s": "oversubscribe", "t": "time", "V": "version", "v": "verbose"},
    **{"W": "wait", "w": "nodelist", "x": "exclude"},
}
OUTPUT = "all output is in RUN/launch; see `tvr launch logs`"
RANKS = "give --nodes and --ranks-per-node"
GPUS = 'give --gpus-per-node, and for a type --sbatch "--gres=gpu:TYPE:N"'
REPLY = "tvr needs sbatch's usual reply"
PREVIEW = "`tvr launch slurm --print` shows the script"
OWN = {
    "array": "give --array",
    "chdir": "change to that folder before the launch",
    "container": "give --container",
    "container-id": "give --container",
    "cpus-per-task": "give --cpus-per-rank",
    "dependency": "give --dependency",
    "error": OUTPUT,
    "exclude": "give --exclude",
    "gpus": GPUS,
    "gpus-per-node": GPUS,
    "help": REPLY,
    "job-name": "give --name",
    "no-requeue": "give --max-restarts 0",
    "nodes": "give --nodes",
    "ntasks": RANKS,
    "ntasks-per-core": RANKS,
    "ntasks-per-gpu": RANKS,
    "ntasks-per-node": "give --ranks-per-node",
    "ntasks-per-socket": RANKS,
    "ntasks-per-tres": RANKS,
    "open-mode": OUTPUT,
    "output": OUTPUT,
    "parsable": REPLY,
    "quiet": REPLY,
    "requeue": "give --max-restarts; a job requeues itself",
    "signal": "give --notice",
    "tasks-per-node": "give --ranks-per-node",
    "test-only": PREVIEW,
    "time": "give --time",
    "usage": REPLY,
    "verbose": REPLY,
    "version": REPLY,
    "wait": "`tvr launch status` shows the job",
    "workdir": "change to that folder before the launch",
    "wrap": "the ranks' command goes after `--`",
}
"""Options that tvr sets itself, each with the setting to use instead."""
# sbatch also takes beginnings of these names, so a name that is only a beginning is refused.
OTHERS = frozenset(
    "account acctg-freq autocomplete batch bb bbf begin cluster-constraint clusters comment"
    " constraint consolidate-segments contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu"
    " deadline delay-boot distribution exclusive export export-file extra extra-node-info"
    " get-user-env gid gpu-bind gpu-freq gpus-per-socket gpus-per-task gres gres-flags hint hold"
    " ignore-pbs immediate input kill-on-invalid-dep licenses mail-type mail-user mcs-label mem"
    " mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist"
    " oom-kill-step overcommit oversubscribe partition power prefer priority profile propagate qos"
    " reboot reservation resv-ports segment share sockets-per-node spread-job stepmgr switches"
    " thread-spec threads-per-core time-min tmp tres-bind tres-per-task uid use-min-nodes"
    " wait-all-nodes wckey".split()
)
# Options that are a field of the job, too.
FIELDS = {"account": "account", "mem": "memory", "partition": "partition", "qos": "qos"}
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
# Ranks of a node must be contiguous: the launcher blames nodes by it, and nodes share downloads.
DISTRIBUTION = re.compile(r"(?:block|\*)(?:[:,].*)?")
# What delays or places the first start only: a job that continues another stays on its cluster.
FIRST_START_ONLY = frozenset({"begin", "clusters", "hold"})


def read_sbatch_options(texts: Iterable[str]) -> tuple[str, ...]:
    """Reads options in sbatch's own forms, such as `--gres=gpu:a100:4`, `-C a100`, `--exclusive`.

    A text may hold several options, and quotes as in a shell.

    Raises:
        ValueError: a text is no option; the message names it.
    """
    options: list[str] = []
    for text in texts:
        check_texts(text, f"--{FIELD}")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"--{FIELD} {text!r}: {error}") from None
        read: list[str] = []
        for word in words:
            if word.startswith("-"):
                read.append(_long_form(word))
            elif read and "=" not in read[-1]:
                read[-1] += f"={word}"
            else:
                raise ValueError(
                    f"--{FIELD} {text!r}: {word!r} must be an option of sbatch such as"
                    " --constraint=a100; a value with spaces needs quotes"
                )
        if not read:
            raise ValueError(
                f"--{FIELD} {text!r} must be an option of sbatch, as --constraint=a100"
            )
        options += read
    return tuple(options)


def check_sbatch_options(options: Sequence[str], fields: Mapping[str, object]) -> None:
    """Checks options of a job.

    Args:
        options: The options.
        fields: The job's fields by name.

    Raises:
        ValueError: tvr sets an option itself, or two settings contradict each other; the message
            names the option and the setting to use.
    """
    names = [option.partition("=")[0] for option in options]
    for option, name in zip(options, names, strict=True):
        _check_name(name)
        if "\\" in option:
            raise ValueError(f"{FIELD}={option!r} must be without backslash")
        if names.count(name) > 1:
            raise ValueError(f"{FIELD}: --{name} is given {names.count(name)} times")
        field = FIELDS.get(name)
        if field is not None and fields[field] is not None:
            raise ValueError(f"{FIELD}: --{name} and {field}={fields[field]!r} are both given")
    given = [name for name in MEMORY if name in names]
    given += ["mem"] * (fields["memory"] is not None)
    if len(given) > 1:
        raise ValueError(f"{FIELD}: only one of --{', --'.join(sorted(set(given)))} can be given")
    distribution = option_value(options, "distribution")
    if distribution is not None and DISTRIBUTION.fullmatch(distribution) is None:
        raise ValueError(
            f"{FIELD}: --distribution={distribution} must begin with block: the ranks of a node"
            " have numbers in sequence"
        )
    gpus = gpus_per_node(options)
    if gpus is not None and gpus != fields["gpus_per_node"]:
        raise ValueError(
            f"gpus_per_node={fields['gpus_per_node']!r} must be {gpus}, as in {FIELD}:"
            f" --gres={option_value(options, 'gres')}"
        )


def option_value(options: Iterable[str], name: str) -> str | None:
    """The value of an option; None if it is not given, or has no value."""
    for option in options:
        found, sign, value = option.partition("=")
        if found == name and sign:
            return value
    return None


def gpus_per_node(options: Iterable[str]) -> int | None:
    """Number of GPUs that `--gres` requests for each node; None if it requests none."""
    counts: list[int] = []
    for item in (option_value(options, "gres") or "").split(","):
        # gpu, gpu:2, gpu:a100 or gpu:a100:2; newer versions of SLURM write gres/gpu:2.
        kind, *rest = re.sub(r"^gres[:/]", "", item.partition("(")[0]).split(":")
        if kind == "gpu":
            counts.append(int(rest[-1]) if rest and rest[-1].isdecimal() else 1)
    return sum(counts) if counts else None


def for_a_later_start(options: Iterable[str]) -> tuple[str, ...]:
    """The options for a job that continues another one."""
    return tuple(o for o in options if o.partition("=")[0] not in FIRST_START_ONLY)


def instead_of(name: str, value: str) -> str:
    """Says which setting of tvr has the effect of an option of sbatch."""
    if name in OWN:
        return OWN[name]
    if name in FIELDS:
        return f"give --{name}={value}"
    return f'give --{FIELD} "--{name}{f"={value}" if value else ""}"'


def _long_form(word: str) -> str:
    if word.startswith("--"):
        name, sign, value = word[2:].partition("=")
        return name + sign + value
    letter, value = word[1:2], word[2:]
    if letter not in LETTERS:
        raise ValueError(f"--{FIELD} {word!r}: sbatch has no option -{letter}")
    # sbatch takes -Cvalue and -C value; users also write -C=value.
    return LETTERS[letter] + (f"={value.removeprefix('=')}" if value else "")


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{FIELD}: --{name} must be the name of an option of sbatch")
    if name in OWN:
        raise ValueError(f"{FIELD}: tvr sets --{name} itself; {OWN[name]}")
    if name in OTHERS:
        return
    longer = sorted(known for known in OTHERS | OWN.keys() if known.startswith(name))
    if longer:
        raise ValueError(f"{FIELD}: --{name} is short for --{' or --'.join(longer)}; write it out")
