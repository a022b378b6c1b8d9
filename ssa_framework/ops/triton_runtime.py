"""What Triton kernels share: whether they run in the interpreter, a matrix product that works there too, and the device
that they are launched on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether ``TRITON_INTERPRET=1`` was set when this module was imported: kernels then run on CPU tensors."""

PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)
"""Whether kernels are compiled by way of PTX, so that they may hold some."""


def launches(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, run on the device of its first argument that is a tensor or a device. Triton launches on the
    current device, wherever the tensors lie: for a model whose layers are on several GPUs that would be another one."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        some = next(x for x in args if isinstance(x, (Tensor, torch.device)))
        device = some.device if isinstance(some, Tensor) else some
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return run


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a [m, k] @ b [k, n] + acc [m, n]`` in float32."""
    if INTERPRETED:
        # the interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
