"""Means of groups of keys: against a loop, with gradients, both implementations."""

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.summarize_keys import numba_cpu, summarize_keys, torch_means
from ssa_framework.ops.summarize_keys.api import group_means


def by_loop(x: Tensor, members: Tensor, count: int) -> tuple[Tensor, Tensor]:
    batch, heads = x.shape[:2]
    means, sizes = torch.zeros(batch, heads, count, x.shape[3], dtype=x.dtype), torch.zeros(batch, heads, count)
    for b in range(batch):
        for h in range(heads):
            for c in range(count):
                mine = (members[b % members.shape[0], h % members.shape[1]] == c).any(0)
                sizes[b, h, c] = mine.sum()
                means[b, h, c] = x[b, h, mine].sum(0) / max(1, int(mine.sum()))
    return means, sizes.int()


def random_members(*shape: int, levels: int, count: int) -> Tensor:
    """The groups of level r are those whose number leaves r when divided by the number of levels; one stays empty."""
    groups = max(1, (count - 1) // levels)
    members = torch.randint(-1, groups, (*shape[:2], levels, shape[2])).int()
    return torch.where(members < 0, -1, members * levels + torch.arange(levels)[:, None].int()).int()


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("levels", "count"), [(1, 0), (1, 1), (1, 5), (2, 9), (3, 9)])
def test_means_sizes_and_gradients(shape: tuple[int, int], levels: int, count: int) -> None:
    k = torch.randn(2, 3, 23, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, 23, 2, dtype=torch.float64, requires_grad=True)
    members = random_members(*shape, 23, levels=levels, count=count)
    if not count:
        members.fill_(-1)
    mean_k, mean_v, log_size = summarize_keys(k, v, members, count)
    for got, x in ((mean_k, k), (mean_v, v)):
        want, sizes = by_loop(x, members, count)
        torch.testing.assert_close(got, want)
        assert torch.equal(log_size.exp().round().int(), sizes)
        torch.testing.assert_close(torch_means.means(x, members, sizes), want)
        if count:
            weight = torch.randn_like(want)
            wanted = torch.autograd.grad((want * weight).sum(), x)[0]
            torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), x)[0], wanted)
            for module in (numba_cpu, torch_means):
                torch.testing.assert_close(module.spread(weight, members, sizes), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    k = torch.randn(1, 2, 40, 8, dtype=dtype, requires_grad=True)
    members = torch.randint(-1, 3, (1, 2, 1, 40)).int()
    mean_k, _, log_size = summarize_keys(k, k, members, 3)
    assert mean_k.dtype == log_size.dtype == torch.float32
    torch.testing.assert_close(mean_k, by_loop(k.float(), members, 3)[0])
    mean_k.sum().backward()
    assert k.grad is not None
    assert k.grad.dtype == dtype


def test_opcheck() -> None:
    x = torch.randn(2, 2, 9, 3, requires_grad=True)
    members = torch.randint(-1, 4, (2, 2, 1, 9)).int()
    torch.library.opcheck(group_means, (x, members, by_loop(x, members, 4)[1]))
