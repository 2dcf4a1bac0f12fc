"""Each extra can be installed with constraints.txt: its pins agree with what the packages require.

The requirements of the installed packages are followed from the project through the extra. An
installed version that differs from its pin is an error, so its requirements are those of the pin.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# A build of torch for a GPU requires NVIDIA's packages, in the versions of that build.
UNPINNED_PARENTS = {"torch"}


def read_pins(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def unmet(requirements: list[str], pins: dict[str, str]) -> tuple[list[str], set[str]]:
    """Lines for requirements that the pins do not meet, and the packages that are not installed."""
    found, absent = [], set()
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [("tvr", Requirement(text)) for text in requirements]
    while left:
        parent, requirement = left.pop()
        name = canonicalize_name(requirement.name)
        pin = pins.get(name)
        if pin is None:
            if parent not in UNPINNED_PARENTS:
                found.append(f"{parent} needs {requirement}, and constraints.txt has no {name}")
            continue
        if not requirement.specifier.contains(pin, prereleases=True):
            found.append(f"{parent} needs {requirement}, and constraints.txt has {name}=={pin}")
            continue
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        # A build's label, such as +cpu, is no part of the pin.
        if installed.version.split("+")[0] != pin:
            found.append(f"{name} {installed.version} is installed, and constraints.txt has {pin}")
        for text in installed.requires or []:
            child = Requirement(text)
            environments = [{"extra": ""}, *({"extra": extra} for extra in requirement.extras)]
            if child.marker is None or any(map(child.marker.evaluate, environments)):
                left.append((name, child))
    return sorted(set(found)), absent


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_extra_can_be_installed_with_the_constraints(extra: str) -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text())
    wanted = [*PROJECT["dependencies"], *(EXTRAS[extra] if extra else ())]
    found, absent = unmet(wanted, pins)
    assert found == []
    if absent:
        pytest.skip(f"not installed: {', '.join(sorted(absent))}; install the extra {extra!r}")


def test_conflicting_and_missing_pins_are_found() -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text())
    found, _ = unmet(["pytest>=9"], {**pins, "pluggy": "99.0"})
    assert any(re.match(r"pytest needs pluggy.*has pluggy==99.0", line) for line in found)
    found, _ = unmet(["pytest>=9"], {key: pin for key, pin in pins.items() if key != "pluggy"})
    assert any("has no pluggy" in line for line in found)
    assert unmet(["pytest<1"], pins)[0] == [
        f"tvr needs pytest<1, and constraints.txt has pytest=={pins['pytest']}"
    ]
