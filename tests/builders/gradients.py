"""Comparison of the gradients of two computations of one loss."""

from __future__ import annotations

from torch import Tensor

Gradients = dict[str, Tensor]


def assert_equal_gradients(ours: Gradients, theirs: Gradients, *, relative: float) -> None:
    """Compares every gradient to `relative` of its own largest entry.

    The gradient of an attention layer's key bias is compared to `relative` of the model's largest
    entry. That bias shifts all scores of a softmax alike, so its true gradient is 0, and the
    computed one is rounding noise that depends on the order of summation.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        bound = relative * float(gradient.abs().max())
        if name.endswith("k_proj.bias"):
            bound = relative * largest
        difference = float((ours[name] - gradient).abs().max())
        assert difference <= max(bound, 1e-7 * largest), (name, difference, bound)
