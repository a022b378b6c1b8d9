"""`peak_memory`: the most extra memory that one call holds at a time."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler import profile

_SILENT = "99"  # above every level that Kineto logs at


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that one call of ``fn`` allocates and holds at its peak, its result included.

    On CUDA this is what torch's caching allocator counts, beyond what was allocated before. On the CPU it is the
    running sum of every allocation and release that goes through torch's allocator, as its profiler records them:
    exact to the byte, whatever the process did before. It does not see memory that others take, such as NumPy
    arrays, Python objects, or scratch space inside BLAS, oneDNN or JIT-compiled code, nor the release of tensors
    from before the call. Neither counts fragmentation.

    ``fn`` is called once; call it before if it fills caches on first use. What other threads allocate meanwhile is
    counted on CUDA, not on the CPU. Not to be used inside another profiler.

    Args:
        fn: what to measure, without arguments.
        device: where it allocates, ``"cpu"`` or a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak(fn, device)
    with _quiet_kineto(), _traced_arrays() as arrays, profile(profile_memory=True) as recorded:
        result = fn()
        arrays.stop()
        del result  # inside the recording, so that it is still counted when it is the peak
    assert recorded.kineto_results is not None
    held = peak = 0
    for event in sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak + arrays.peak


def _cuda_peak(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Arrays:
    """Bytes that Python objects and NumPy arrays took at their peak, beyond what there was before."""

    def __init__(self) -> None:
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        self.peak = 0

    def stop(self) -> None:
        self.peak = max(0, tracemalloc.get_traced_memory()[1] - self._before)


@contextmanager
def _traced_arrays() -> Iterator[_Arrays]:
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield _Arrays()
    finally:
        if not was_tracing:
            tracemalloc.stop()


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Some builds of torch's profiler print a line to stderr on every start and stop."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = _SILENT
    try:
        yield
    finally:
        del os.environ[name]
