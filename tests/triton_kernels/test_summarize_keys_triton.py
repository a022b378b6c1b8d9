"""The Triton kernels of means of groups, in the interpreter: against plain torch."""

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.summarize_keys import torch_means, triton_cuda

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def random_members(shape: tuple[int, int], levels: int, keys: int, count: int) -> Tensor:
    """Groups of level r are those whose number leaves r when divided by the number of levels."""
    groups = max(1, count // levels)
    members = torch.randint(-1, groups, (*shape, levels, keys))
    return torch.where(members < 0, -1, members * levels + torch.arange(levels)[:, None]).int()


def sizes_of(members: Tensor, count: int) -> Tensor:
    numbers = torch.arange(count)[:, None, None]
    return (members[:, :, None] == numbers).sum((-1, -2)).int()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("levels", "count"), [(1, 1), (2, 9)])
def test_means_and_their_gradients(shape: tuple[int, int], levels: int, count: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 67, 20).to(dtype)
    members = random_members(shape, levels, 67, count)
    sizes = sizes_of(members, count)
    order = triton_cuda.group_order(members, sizes)
    assert order.dtype == torch.int32
    assert order.shape == (*shape, levels * 67)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    got = triton_cuda.means(strided, members, sizes, order)
    torch.testing.assert_close(got, torch_means.means(x, members, sizes))
    assert torch.equal(got, triton_cuda.means(x, members, sizes, order))
    grad = torch.randn_like(got)
    torch.testing.assert_close(triton_cuda.spread(grad, members, sizes), torch_means.spread(grad, members, sizes))


def test_groups_and_keys_that_are_not_there() -> None:
    x, nothing = torch.randn(1, 2, 5, 4), torch.full((1, 1, 1, 5), -1, dtype=torch.int32)
    sizes = torch.zeros(1, 1, 3, dtype=torch.int32)
    order = triton_cuda.group_order(nothing, sizes)
    assert not triton_cuda.means(x, nothing, sizes, order).any()
    assert not triton_cuda.spread(torch.randn(1, 2, 3, 4), nothing, sizes).any()
    none = sizes[..., :0]
    assert triton_cuda.means(x, nothing, none, order).shape == (1, 2, 0, 4)
    assert not triton_cuda.spread(torch.randn(1, 2, 0, 4), nothing, none).any()
    assert not triton_cuda.serves(x.double())
