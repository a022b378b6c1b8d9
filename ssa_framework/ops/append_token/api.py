"""`append_token`: choose an implementation."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

from ssa_framework.ops.append_token import torch_copy
from ssa_framework.ops.append_token.types import TokenPlace

AppendToken = Callable[[TokenPlace, Tensor, Tensor, Tensor, int], None]
"""Puts a token into a place: takes the place, q ``[B, H, 1, D]``, k ``[B, Hkv, 1, D]`` and v ``[B, Hkv, 1, Dv]`` of the
dtypes and on the device of the place, with any strides, and the token's position. It is called for each token, where
the host's microseconds count, so it checks nothing: whoever calls it did."""


def append_token(place: TokenPlace) -> AppendToken:
    """The implementation for a place: one launch where Triton serves it, else a copy for each tensor."""
    if place.q.is_cuda and find_spec("triton") is not None:
        from ssa_framework.ops.append_token import triton_cuda  # Triton takes a moment to import

        return triton_cuda.append_token
    return torch_copy.append_token
