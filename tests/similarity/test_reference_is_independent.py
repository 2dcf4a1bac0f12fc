"""The reference shares no code with the paths that are tested against it."""

import ast
from pathlib import Path

import pytest
import torch
from builders.similarity_inputs import similarity_inputs

from tvr.kernels import numerics, reference, similarity, token_sets

KERNELS = Path(__file__).parents[2] / "kernels"
REFERENCE = KERNELS / "reference.py"
OTHERS = sorted(file for file in KERNELS.rglob("*.py") if file != REFERENCE)


def imported_modules(file: Path) -> set[str]:
    """Modules that a file imports; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_reference_imports_nothing_of_tvr() -> None:
    assert {name.split(".")[0] for name in imported_modules(REFERENCE)} == {"jaxtyping", "torch"}


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: str(file.relative_to(KERNELS)))
def test_no_kernel_imports_the_reference(file: Path) -> None:
    assert "tvr.kernels.reference" not in imported_modules(file)


def test_a_fault_in_the_fast_paths_does_not_reach_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = similarity_inputs()
    expected = reference.dmae_similarity(**arguments)
    monkeypatch.setattr(token_sets, "NEIGHBOUR_FACTOR", 0.0)
    monkeypatch.setattr(token_sets, "masked_softmax", lambda logits, mask: logits)
    monkeypatch.setattr(numerics, "unit", lambda x: 2 * x)
    assert torch.equal(reference.dmae_similarity(**arguments), expected)
    assert not torch.allclose(similarity.dmae_similarity(**arguments), expected)
