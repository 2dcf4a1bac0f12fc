"""The weight layers and the sequential header beyond the golden arrays."""

import pytest
import torch
from torch import nn

from tvr.kernels.weight_layers import SequenceHeader, TokenWeightLayer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("arch", "shapes"),
    [
        (1, [(1, 8), (1,)]),
        (2, [(8, 8), (8,), (1, 8), (1,)]),
        (3, [(8, 8), (8,), (8, 8), (8,), (1, 8), (1,)]),
    ],
)
def test_weight_layer_has_the_parameters_of_its_arch(arch: int, shapes: list[tuple]) -> None:
    layer = TokenWeightLayer(8, arch)
    assert [tuple(p.shape) for p in layer.parameters()] == shapes
    assert len(layer.state_dict()) == len(shapes)
    assert layer(torch.randn(3, 5, 8)).shape == (3, 5)
    assert layer(torch.randn(3, 8)).shape == (3,)


def test_weight_layer_applies_relu_between_its_linears() -> None:
    layer = TokenWeightLayer(4, 2)
    first, last = (m for m in layer.layers if isinstance(m, nn.Linear))
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), last(first(x).clamp_min(0)).squeeze(1))


def test_bfloat16_layers_accept_float32_features() -> None:
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5).long()
    assert TokenWeightLayer(8).bfloat16()(x).dtype == torch.bfloat16
    header = SequenceHeader(8, num_layers=1)
    expected = header(x, mask)
    actual = header.bfloat16()(x, mask)
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (64, 1), (128, 2)])
def test_header_has_a_head_per_64_features(width: int, heads: int) -> None:
    header = SequenceHeader(width, num_layers=2)
    assert [block.heads for block in header.blocks] == [heads, heads]
    assert header.positions.shape == (77, width)


def test_masked_frames_are_not_attended_to() -> None:
    header = SequenceHeader(128, num_layers=2).double()
    frames, mask = torch.randn(2, 6, 128).double(), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    changed = frames.clone()
    changed[1, 3:] += torch.randn(3, 128)
    first, second = header(frames, mask), header(changed, mask)
    torch.testing.assert_close(first[1, :3], second[1, :3])
    assert (first[1, 3:] - second[1, 3:]).abs().min() > 0
    # The number of masked frames does not matter either.
    torch.testing.assert_close(header(frames[1:, :3], mask[1:, :3]), first[1:, :3])


def test_header_depends_on_the_order_of_frames() -> None:
    header = SequenceHeader(16, num_layers=1).double()
    frames, mask = torch.randn(1, 4, 16).double(), torch.ones(1, 4).long()
    assert not torch.allclose(header(frames.flip(1), mask), header(frames, mask).flip(1))


def test_gradients_of_the_header_pass_gradcheck() -> None:
    header = SequenceHeader(4, num_layers=1, num_positions=3).double()
    frames, mask = (
        torch.randn(2, 3, 4).double().requires_grad_(),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )
    assert torch.autograd.gradcheck(lambda x: header(x, mask), frames)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: TokenWeightLayer(8, 4), "arch=4"),
        (lambda: SequenceHeader(131), "width=131 must be a multiple of its 2 heads"),
        (
            lambda: SequenceHeader(8, num_positions=3)(
                torch.ones(1, 4, 8), torch.ones(1, 4).long()
            ),
            "4 frames exceed .*num_positions=3",
        ),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
