"""Part "tests": the test suite's tests that are marked `gpu`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_kit.child import Recorder

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"
MISSING = re.compile(r"No module named '([\w.]+)'")


def gpu_tests(settings: dict[str, Any], recorder: Recorder) -> None:
    """Runs pytest on the files that hold marked tests; a case is one file."""
    files = sorted(
        path for path in TESTS.glob("*/test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")
    )
    names = {str(path.relative_to(TESTS)): path for path in files}
    recorder.plan(names)
    if find_spec("pytest") is None:
        raise ModuleNotFoundError("No module named 'pytest'", name="pytest")
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "tests.xml")
        line = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        line += ["--continue-on-collection-errors", f"--junitxml={xml}"]
        line += ["-o", "junit_family=xunit1"]  # names each test's file
        if find_spec("beartype") is None:
            line += ["-o", "addopts=--strict-markers"]
        ended = subprocess.run(
            [*line, *map(str, names.values())],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(1.0, recorder.left_s),
            check=False,
        )
        if not xml.exists():
            text = ended.stdout + ended.stderr
            if missing := MISSING.search(text):
                raise ModuleNotFoundError(missing[0], name=missing[1])
            raise RuntimeError((text.strip().splitlines() or ["pytest wrote nothing"])[-1])
        outcomes = read_outcomes(xml)
    for name in names:
        counts, reasons = outcomes.get(name, (Counter(), []))
        values = {key: counts[key] for key in ("passed", "failed", "skipped")}
        missing = [found[1] for reason in reasons if (found := MISSING.search(reason))]
        if missing:
            recorder.not_run(name, f"no module {missing[0]}")
        elif counts["failed"]:
            recorder.failed(name, f"{counts['failed']} failed: {reasons[0]}", **values)
        else:
            recorder.case(name, **values)


def read_outcomes(xml: Path) -> dict[str, tuple[Counter[str], list[str]]]:
    """By test file: the numbers of passed, failed and skipped tests, and why tests failed."""
    found: dict[str, tuple[Counter[str], list[str]]] = {}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        # A file that cannot be imported is an error without a file, named as a module.
        file = case.get("file") or f"{case.get('name', '').replace('.', '/')}.py"
        counts, reasons = found.setdefault(file.removeprefix("tests/"), (Counter(), []))
        problem = next((x for x in case if x.tag in ("failure", "error")), None)
        if problem is not None:
            text = problem.get("message") or problem.text or ""
            if missing := MISSING.search(problem.text or ""):
                text = missing[0]
            counts["failed"] += 1
            reasons.append(f"{case.get('name')}: {text.strip().splitlines()[0] if text else ''}")
        else:
            skipped = any(x.tag == "skipped" for x in case)
            counts["skipped" if skipped else "passed"] += 1
    return found
