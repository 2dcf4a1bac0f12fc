"""The rules for text that a launcher writes into a script, an option, a manifest or a command.

Every launcher takes its values from a `Job` or from a hostfile, which apply these rules before
anything is written. So no value can end its line, or add an option that the user did not give.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# Control characters, halves of UTF-16 pairs (bytes that are not UTF-8), line and paragraph
# separators.
REFUSED_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
# Words of a command are quoted arguments. One that is a script may have several lines.
ALLOWED_IN_COMMANDS = frozenset("\n\t")
COMMAND = "command"

# sbatch splits an #SBATCH line at spaces, so a value with a space could add options. Quotes,
# backslashes and # are special as well.
PLAIN_VALUE = re.compile(r"[^\s\"'`\\#;]+")
PLAIN = "without spaces, quotes, backslashes, ; and #"
HOST_RULE = "a host name or address, or USER@HOST"
HOST = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?(?:[A-Za-z0-9_][\w.-]*|[0-9A-Fa-f:.]+)", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# The values of #SBATCH lines that are not quoted there: pattern, what is allowed.
OPTIONS = {
    "memory": (
        re.compile(r"[0-9]+(?:[KMGTP](?:i?B)?)?", re.IGNORECASE),
        "a number and a unit K, M, G or T, as in 64G (--mem)",
    ),
    "partition": (PLAIN_VALUE, f"{PLAIN} (--partition)"),
    "account": (PLAIN_VALUE, f"{PLAIN} (--account)"),
    "qos": (PLAIN_VALUE, f"{PLAIN} (--qos)"),
    "exclude": (re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII), "names of nodes (--exclude)"),
    "failed_nodes": (re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII), "names of nodes"),
    "dependency": (PLAIN_VALUE, f"{PLAIN} (--dependency)"),
    "array": (re.compile(r"[0-9,:%-]+"), "task numbers such as 0-7 or 0-31%4 (--array)"),
}


def check_texts(value: object, name: str, allowed: frozenset[str] = frozenset()) -> None:
    """Refuses control characters in a text, or in any text within a value.

    Args:
        value: A text, a sequence or mapping of values, or a dataclass. Others are ignored.
        name: Name of the value, for the error.
        allowed: Control characters that are allowed.

    Raises:
        ValueError: a text has one; the message names the value.
    """
    if isinstance(value, str):
        refused = sorted({c for c in value if _is_refused(c)} - allowed)
        if refused:
            listed = ", ".join(f"U+{ord(character):04X}" for character in refused)
            raise ValueError(f"{name}={value!r} must be without control characters, has {listed}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_texts(key, f"name in {name}", allowed)
            check_texts(item, f"{name}[{key!r}]", allowed)
    elif isinstance(value, tuple | list):
        for item in value:
            check_texts(item, name, allowed)
    elif is_dataclass(value):
        for field in fields(value):
            check_texts(getattr(value, field.name), f"{name}.{field.name}", allowed)


def check_job_values(values: Mapping[str, Any]) -> None:
    """Checks the fields of a job, by name.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """
    for name, value in values.items():
        check_texts(value, name, ALLOWED_IN_COMMANDS if name == COMMAND else frozenset())
    for name, (pattern, rule) in OPTIONS.items():
        found = values[name]
        for text in (found,) if isinstance(found, str) else found or ():
            if pattern.fullmatch(text) is None:
                raise ValueError(f"{name}={text!r} must be {rule}")
    check_environment(values["environment"])


def check_environment(variables: Mapping[str, str]) -> None:
    """Checks names and values of environment variables.

    Raises:
        ValueError: a name is none that a shell can set, or a value has a control character.
    """
    for name in variables:
        if VARIABLE.fullmatch(name) is None:
            raise ValueError(
                f"the environment variable {name!r} must be named by ASCII letters, digits and _;"
                " unset it before the launch"
            )
    check_texts(variables, "environment")


def check_host(name: str, where: str) -> str:
    """Returns the name of a host.

    A name that begins with a dash would be an option of ssh, and could run a command.

    Raises:
        ValueError: it is no name of a host.
    """
    if HOST.fullmatch(name) is None:
        raise ValueError(f"{where}: host {name!r} must be {HOST_RULE}")
    return name


def _is_refused(character: str) -> bool:
    return unicodedata.category(character) in REFUSED_CATEGORIES
