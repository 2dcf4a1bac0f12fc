"""The GPU kit in its shrunk form on the CPU: every part runs, and a fault in any of them shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.exhaustive import everything
from gpu_kit import __main__ as kit
from gpu_kit import parity, parts, shared_slice
from gpu_kit.clock import PoisonedOutputs, Wrong, check_finite
from gpu_kit.gpu_tests import read_outcomes
from gpu_kit.host_reads import count_host_reads
from gpu_kit.parts import PARTS, Part, run_part
from gpu_kit.report import failures, report
from tvr_bench.kernels_task import IMPLEMENTATIONS

from tvr.kernels.similarity import BACKENDS, dmae_similarity

KIT = Path(kit.__file__).parent
TIMEOUT_S = 1200
SMALL = (8, 9, 5, 4, 16)
# The tests and the training steps take most of the time; other files run them as well.
PARTS_HERE = [name for name in PARTS if everything() or name not in ("tests", "step")]
OPTIONS = {"interaction": "att_wti", "neighbour_frames": True}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """JSON and output of `python tests/benchmarks/gpu_kit --shrunk --parts PARTS_HERE`."""
    file = tmp_path_factory.mktemp("kit") / "numbers.json"
    ended = subprocess.run(
        [sys.executable, str(KIT), "--shrunk", "--json", str(file), "--parts", *PARTS_HERE],
        # From another folder, without what the suite added to the paths.
        cwd=file.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(file.read_text()), ended.stdout


@pytest.fixture(scope="module")
def document(ran: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return ran[0]


def cases_of(document: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {case["case"]: case for case in document["parts"][part]["cases"]}


def test_every_part_ran_and_nothing_was_cut(document: dict[str, Any]) -> None:
    assert list(document["parts"]) == PARTS_HERE
    for name, part in document["parts"].items():
        assert (part["status"], part["reason"], part["cut"]) == ("done", None, []), name
        assert part["cases"]
    assert document["shrunk"] is True
    assert document["machine"]["card"] is None
    assert {"python", "torch"} <= document["machine"]["versions"].keys()


def test_the_table_comes_last_and_names_every_part(ran: tuple[dict[str, Any], str]) -> None:
    _, printed = ran
    progress, _, table = printed.partition("small shapes on the CPU")
    for name in PARTS_HERE:
        assert f"[{name}] done" in progress
        assert f"== {name}: done" in table
    assert printed.splitlines()[-1].endswith("numbers.json")


@pytest.mark.exhaustive
def test_the_tests_marked_gpu_are_found_and_skip_here(document: dict[str, Any]) -> None:
    cases = cases_of(document, "tests")
    assert {"similarity/test_similarity_backends.py", "training/test_stopwatch.py"} <= set(cases)
    for name, case in cases.items():
        assert case["skipped"] > 0, name
        assert (case["passed"], case["failed"]) == (0, 0), name


def test_every_backend_is_within_the_suites_bounds(document: dict[str, Any]) -> None:
    cases = cases_of(document, "parity")
    for backend in BACKENDS:
        for dtype, bound in (("float32", 1e-5), ("bfloat16", 2**-8)):
            case = cases[f"{backend} {dtype}"]
            errors = dict(case["errors"])
            assert 0 <= errors.pop("similarity") <= 1e-5, (backend, dtype)
            assert set(errors) == {"sentence", "words", "frames", "word_logits", "frame_logits"}
            assert max(errors.values()) <= bound, (backend, dtype, errors)
            assert case["pairs_compared"] > 0.5
        assert 1e-5 < cases[f"{backend} fast"]["errors"]["similarity"] <= 2**-6
    for dtype in ("float32", "bfloat16"):
        assert cases[f"streamed {dtype}"]["status"] == "done"


@pytest.mark.exhaustive
def test_steps_have_rates_memory_and_counted_host_reads(document: dict[str, Any]) -> None:
    cases = cases_of(document, "step")
    assert list(cases) == [
        "msrvtt_b32, deepspeed",
        "msrvtt_b32, plain torch",
        "msrvtt_b16, deepspeed",
    ]
    for name, case in cases.items():
        lower, upper = case["step_ms_quartiles"]
        assert 0 < lower <= case["step_ms"] <= upper, name
        assert case["samples_per_s"] == pytest.approx(1000 * case["pairs"] / case["step_ms"])
        assert case["mfu"] is None, "the peak of a CPU is unknown"
        assert case["tflops_per_s"] > 0
        assert case["peak_bytes"] > 0
        assert case["estimated_bytes"] > 0
        assert case["host_reads"] == sum(case["host_reads_at"].values()) or (
            case["host_reads"] > 0 and len(case["host_reads_at"]) == 12
        )
        assert any("trainer/" in place or "kernels/" in place for place in case["host_reads_at"])


def test_every_implementation_is_timed_at_every_size(document: dict[str, Any]) -> None:
    cases = cases_of(document, "kernels")
    names = ["bare products", "naive", *(x for x in IMPLEMENTATIONS if x in BACKENDS), "streamed"]
    for name in names:
        for pairs in (16, 48):
            for passes in ("forward", "forward + backward"):
                case = cases[f"{name}, G {pairs}, {passes}"]
                assert case["status"] == "done", case
                lower, upper = case["ms_quartiles"]
                assert 0 < lower <= case["ms"] <= upper
                operations = (3 if case["backward"] else 1) * 2 * case["B"] * pairs * 5 * 3 * 16
                assert case["tflops_per_s"] == pytest.approx(operations / case["ms"] / 1e9)
                if passes != "forward" and name not in ("bare products", "naive"):
                    assert case["compared_with"] == "reference"
    assert cases["torch.compile of naive, G 16, forward + backward"]["status"] == "done"
    assert set(BACKENDS) <= {case.get("implementation") for case in cases.values()}


def test_the_shared_slice_tells_published_numbers_from_its_own(document: dict[str, Any]) -> None:
    cases = cases_of(document, "slice")
    published = [case for case in cases.values() if case.get("published")]
    assert {(x["name"], x["ms"]) for x in published} >= {("LIK", 0.226), ("LIK", 2.10)}
    for name in ("eager", "torch.compile", "one-way", *(f"two-way {x}" for x in BACKENDS)):
        case = cases[f"{name}, 8 x 8, forward + backward"]
        assert case["published"] is False
        assert case["ms"] > 0


# ------------------------------------------------------------------ faults


def test_a_wrong_backend_is_beyond_the_bounds() -> None:
    def wrong(**arguments: Any) -> torch.Tensor:
        return dmae_similarity(**arguments) * (1 + 1e-4)

    arguments = parity._arguments(SMALL, "float32", "cpu")
    errors, share = parity.compare(dmae_similarity, arguments, OPTIONS, {}, gap=1e-4)
    assert max(errors.values()) < 1e-5
    assert share > 0.5
    errors, _ = parity.compare(wrong, arguments, OPTIONS, {}, gap=1e-4)
    assert min(errors.values()) > 2e-5


def test_a_wrong_gradient_alone_is_a_failure(tmp_path: Path) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return 2 * gradients[0]

    def wrong(words: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return dmae_similarity(words=Doubled.apply(words), **arguments)

    arguments = parity._arguments(SMALL, "float32", "cpu")
    errors, _ = parity.compare(wrong, arguments, OPTIONS, {}, gap=1e-4)
    recorder = RecorderInMemory()
    parity.record(recorder, "wrong", "float32", errors)  # type: ignore[arg-type]
    (reason,) = recorder.failures
    assert reason.startswith("words 1 > 1e-05")


def test_an_output_that_nobody_writes_is_seen() -> None:
    def lazy(**arguments: Any) -> torch.Tensor:
        scores = dmae_similarity(**arguments)
        partly = torch.empty_like(scores)
        partly[1:] = scores[1:]
        return partly

    arguments = parity._arguments(SMALL, "float32", "cpu")
    errors, _ = parity.compare(lazy, arguments, OPTIONS, {}, gap=1e-4)
    recorder = RecorderInMemory()
    parity.record(recorder, "lazy", "float32", errors)  # type: ignore[arg-type]
    assert "similarity nan > 1e-05" in recorder.failures[0]
    with PoisonedOutputs():
        forgotten = torch.empty(3)
    with pytest.raises(Wrong, match="scores is not finite, or was not written"):
        check_finite({"scores": forgotten})


def test_wrong_scores_of_the_shared_slice_are_seen() -> None:
    inputs = shared_slice.make_inputs(6, (5, 7, 16), "cpu", 0)
    scores = shared_slice.eager(inputs.words, inputs.frames).detach()
    shared_slice._check("eager", inputs, scores)
    with pytest.raises(Wrong, match="scores differ from the definition"):
        shared_slice._check("eager", inputs, scores * 1.1)


def test_host_reads_are_counted_where_they_happen() -> None:
    x = torch.arange(4.0)
    with count_host_reads("cpu") as found:
        _ = x.sum() + 1
        _ = x[torch.tensor([0, 2])]
    assert found.total() == 0
    with count_host_reads("cpu") as found:
        _ = float(x.sum()), bool(x[0] > 1), x.tolist(), x[x > 1], x.nonzero(), x.cpu()
    assert found.total() == 6
    with count_host_reads("cpu") as found:
        dmae_similarity(**parity._arguments(SMALL, "float32", "cpu"), backend="torch")
    assert any("kernels/" in place for place in found), found


def run(tmp_path: Path, source: str, *, budget_s: float = 60.0) -> dict[str, Any]:
    """Runs a part with this source."""
    (tmp_path / "fake_part.py").write_text(source)
    environment = kit.child_environment(tmp_path / "scratch", on_cpu=True)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    part = Part("fake_part:run", budget_s, "a part of the test")
    return run_part("fake", part, {}, budget_s=budget_s, scratch=tmp_path, environment=environment)


def test_a_missing_package_is_named_and_is_no_failure(tmp_path: Path) -> None:
    part = run(tmp_path, "import nonesuch.module\n")
    assert (part["status"], part["reason"]) == ("not run", "no module nonesuch")
    assert failures({"parts": {"fake": part}}) == []


def test_a_part_beyond_its_budget_is_ended_and_what_is_missing_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "fake.jsonl"

    class Clock:
        """Jumps ahead once the first case is recorded."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic() -> float:
            jump = 1e6 if records.exists() and '"case"' in records.read_text() else 0.0
            return time.monotonic() + jump

    monkeypatch.setattr(parts, "time", Clock)
    source = (
        "import time\n"
        "def run(settings, recorder):\n"
        "    recorder.plan(['first', 'second', 'third'])\n"
        "    recorder.case('first', value=1)\n"
        "    time.sleep(600)\n"
    )
    part = run(tmp_path, source, budget_s=1000.0)
    assert (part["status"], part["reason"]) == ("done", "its time was up")
    assert [case["case"] for case in part["cases"]] == ["first"]
    assert part["cut"] == ["second", "third"]
    no_time = run_part(
        "fake", Part("x:y", 9, ""), {}, budget_s=0.5, scratch=tmp_path, environment={}
    )
    assert (no_time["status"], no_time["cases"]) == ("not run", [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('the reason')", "RuntimeError: the reason"),
        ("import os; print('last words', flush=True); os._exit(7)", "exit code 7: last words"),
    ],
)
def test_a_part_that_breaks_is_a_failure_and_keeps_its_cases(
    body: str, reason: str, tmp_path: Path
) -> None:
    source = f"def run(settings, recorder):\n    recorder.case('first', value=1)\n    {body}\n"
    part = run(tmp_path, source)
    assert (part["status"], part["reason"]) == ("failed", reason)
    assert len(part["cases"]) == 1
    assert failures({"parts": {"fake": part}}) == [f"fake: {reason}"]


def test_failed_cases_are_the_last_lines_and_the_exit_code(document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    case = changed["parts"]["parity"]["cases"][0]
    case |= {"status": "failed", "reason": "words 0.1 > 1e-05"}
    case["errors"]["words"] = None
    assert failures(document) == []
    assert failures(changed) == [f"parity, {case['case']}: words 0.1 > 1e-05"]
    text = report(changed, None)
    assert f"FAILED parity, {case['case']}: words 0.1 > 1e-05" in text.splitlines()[-2]
    assert "NaN" in text


def test_a_failing_and_a_broken_test_file_are_told_apart(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase file="tests/a/test_x.py" name="one"/>'
        '<testcase file="tests/a/test_x.py" name="two"><failure message="AssertionError: no"/>'
        '</testcase><testcase file="tests/a/test_x.py" name="three"><skipped message="x"/>'
        '</testcase><testcase name="tests.b.test_y"><error message="collection failure">'
        "ModuleNotFoundError: No module named 'webdataset'</error></testcase>"
        "</testsuite></testsuites>"
    )
    outcomes = read_outcomes(xml)
    counts, reasons = outcomes["a/test_x.py"]
    assert dict(counts) == {"passed": 1, "failed": 1, "skipped": 1}
    assert reasons == ["two: AssertionError: no"]
    assert outcomes["b/test_y.py"][1] == ["tests.b.test_y: No module named 'webdataset'"]


def test_without_a_gpu_only_the_shrunk_form_runs() -> None:
    ended = subprocess.run(
        [sys.executable, str(KIT)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 2
    assert "torch finds no CUDA device here; --shrunk" in ended.stderr


class RecorderInMemory:
    """Keeps the reasons of failed cases."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def case(self, name: str, **values: Any) -> None:
        pass

    def failed(self, name: str, reason: str, **values: Any) -> None:
        self.failures.append(reason)
