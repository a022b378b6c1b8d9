"""The Triton kernels that look for summaries of later keys, in the interpreter: against plain torch."""

import pytest
import torch

from ssa_framework.ops.summary_reach import torch_search, triton_cuda


@pytest.mark.parametrize(("batch", "members_batch"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("levels", [1, 2])
def test_groups_that_end_after_a_query(batch: int, members_batch: int, levels: int) -> None:
    keys, size = 150, 4
    count = levels * 38
    group = torch.arange(keys) // size
    members = torch.stack([group + level * 38 for level in range(levels)]).int()
    members = members.expand(members_batch, 2, -1, -1).clone()
    members[:, 1, :, 100:] = -1
    positions = torch.arange(keys, dtype=torch.int32)[None]
    # a query attends the groups that are full before it
    stop = torch.stack([positions // size + level * 38 for level in range(levels)], dim=-1).expand(batch, -1, -1)
    first = torch.zeros_like(stop) + torch.arange(levels, dtype=torch.int32) * 38
    arguments = [members, count, first, stop.clone(), positions]
    assert not torch_search.reaches_later(*arguments)
    assert not triton_cuda.reaches_later(*arguments)
    for row in (0, 62, 64, 98):  # none of them is the last key of its group
        late = stop.clone()
        late[-1, row, -1] += 1
        arguments[3] = late
        assert torch_search.reaches_later(*arguments)
        assert triton_cuda.reaches_later(*arguments)


def test_empty_groups_and_intervals_reach_nothing() -> None:
    members = torch.full((1, 1, 1, 9), -1, dtype=torch.int32)
    interval = torch.tensor([[[0]], [[5]]], dtype=torch.int32).view(2, 1, 1)
    positions = torch.zeros((1, 1), dtype=torch.int32)
    for first, stop, count in (
        (interval[:1], interval[1:], 5),
        (interval[1:], interval[:1], 5),
        (interval, interval, 0),
    ):
        members[..., 3] = 2 if count and first[0] == 5 else -1
        for module in (torch_search, triton_cuda):
            found = module.reaches_later(members, count, first, stop, positions)
            assert found.dtype == torch.bool
            assert found.dim() == 0
            assert not found
