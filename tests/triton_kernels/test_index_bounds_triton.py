"""Looking for indices out of bounds, against comparisons in torch."""

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.index_bounds import torch_reduce, triton_cuda
from ssa_framework.proposals import Bounds

CPU = torch.device("cpu")
FIRST = torch.tensor([[0, 3, 5], [2, 2, 7]], dtype=torch.int32)


def outside(*bounds: Bounds) -> bool:
    found = triton_cuda.any_outside(bounds, CPU)
    assert found.shape == ()
    assert torch.equal(found, torch_reduce.any_outside(bounds, CPU))
    return bool(found)


@pytest.mark.parametrize(("low", "high", "wrong"), [(0, 7, False), (1, 7, True), (0, 6, True)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_tensor(low: int, high: int, wrong: bool, dtype: torch.dtype) -> None:
    index = FIRST.to(dtype)
    assert outside(Bounds(index, index, low, high)) is wrong


@pytest.mark.parametrize(("last", "high", "wrong"), [(FIRST, 7, False), (FIRST + 1, 7, True), (FIRST - 1, 7, True)])
def test_pairs(last: Tensor, high: int, wrong: bool) -> None:
    assert outside(Bounds(FIRST, last, 0, high)) is wrong


def test_any_of_several() -> None:
    right, wrong = Bounds(FIRST, FIRST, 0, 7), Bounds(FIRST, FIRST, 3, 7)
    assert not outside(right, right)
    assert outside(right, wrong)
    assert outside(wrong, right)


def test_the_last_of_many_and_nothing() -> None:
    many = torch.zeros(2 * 4096 + 1, dtype=torch.int32)
    assert not outside(Bounds(many, many, 0, 0))
    many[-1] = 1
    assert outside(Bounds(many, many, 0, 0))
    empty = many[:0]
    assert not outside(Bounds(empty, empty, 0, 0), Bounds(empty, empty, 5, 0))
    assert not outside()


def test_views_and_broadcasts() -> None:
    square = torch.arange(16, dtype=torch.int32).view(4, 4)
    assert not outside(Bounds(square.t(), square.t() + 1, 0, 16))
    expanded = torch.tensor([[1], [9]], dtype=torch.int32).expand(2, 5)
    assert not outside(Bounds(expanded, expanded, 1, 9))
    assert outside(Bounds(expanded, expanded, 1, 8))
    assert not outside(Bounds(expanded[:, :1], torch.full((2, 5), 9, dtype=torch.int32), 1, 9))
    assert outside(Bounds(square, square[:1], 0, 16))
