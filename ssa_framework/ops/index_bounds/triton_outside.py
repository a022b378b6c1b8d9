"""The kernel that looks for a value that is outside."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outside_kernel(first, last, found, count, low, high, BLOCK: tl.constexpr):
    """Writes 1 to ``found`` where ``low <= first <= last <= high`` does not hold for one of ``count`` elements;
    ``last`` is ``None`` where it is ``first``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    smaller = tl.load(first + at, mask=inside, other=0)
    larger = smaller
    if last is not None:
        larger = tl.load(last + at, mask=inside, other=0)
    wrong = inside & ((smaller < low) | (larger > high) | (smaller > larger))
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.store(found, 1)
