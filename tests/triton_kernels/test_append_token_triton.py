"""The launch that takes in a token, in the interpreter, beside plain copies."""

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.append_token import TokenPlace, torch_copy, triton_cuda

ROOM = 5


def place(batch: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> TokenPlace:
    return TokenPlace(
        torch.full((batch, heads, 1, dim), 7.0, dtype=dtype),
        torch.full((1, 1), -1, dtype=torch.int32),
        torch.full((batch, kv_heads, ROOM, dim), 7.0, dtype=dtype),
        torch.full((batch, kv_heads, ROOM, value_dim), 7.0, dtype=dtype),
    )


def as_projected(x: Tensor) -> Tensor:
    """The same numbers with heads innermost but one, as a layer's projection leaves them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def strided(x: Tensor) -> Tensor:
    """The same numbers, with gaps between the coordinates."""
    return torch.stack([x, -x], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "value_dim"),
    [(1, 8, 2, 16, 16), (2, 3, 3, 24, 40), (3, 2, 2, 1, 5)],
    ids=["grouped", "odd sizes", "narrow"],
)
def test_same_as_copies(batch: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    shapes = [(batch, heads, 1, dim), (batch, kv_heads, 1, dim), (batch, kv_heads, 1, value_dim)]
    for arranged in (torch.clone, as_projected, strided):
        q, k, v = (arranged(torch.randn(shape).to(dtype)) for shape in shapes)
        want, got = (place(batch, heads, kv_heads, dim, value_dim, dtype) for _ in range(2))
        for position in (0, ROOM - 1):
            torch_copy.append_token(want, q, k, v, position)
            triton_cuda.append_token(got, q, k, v, position)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert want.position.tolist() == [[ROOM - 1]]
        torch.testing.assert_close(want.keys[:, :, 0], k[:, :, 0], rtol=0, atol=0)
        assert bool((want.keys[:, :, 1:-1] == 7).all())
