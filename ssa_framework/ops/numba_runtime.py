"""How Numba kernels are compiled, cached and spread over threads.

Kernels are compiled without Numba's own parallel back ends. They release the interpreter lock, and `parallel_for`
runs them on a pool of Python threads. That works from several Python threads at once, in forked children and in
DataLoader workers, which Numba's threading layers do not all survive.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
"""Float liberties of all kernels: sums may be reordered. Never no-NaN or no-Inf: empty rows are -inf on purpose."""

_SAY_AFTER_SECONDS = 0.5


class _CompilerNotice:
    """Says once per process that kernels are being compiled, where it takes long enough to be noticed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said = False
        self.done = 0

    def say(self, name: str) -> None:
        with self._lock:
            first = not self._said
            self._said = True
        if first:
            message = "ssa_framework: compiling CPU kernels, once on this machine (later processes load them) ..."
            print(message, file=sys.stderr, flush=True)
        print(f"ssa_framework:   kernel {self.done + 1}: {name}", file=sys.stderr, flush=True)


_notice = _CompilerNotice()


_kernels: list[Kernel] = []


class Kernel:
    """A jitted function that tells when it compiles. Calling it is calling the function."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self._function = function
        self._dispatcher = _jit(function, **options)
        self.compiling = threading.Lock()
        self.__doc__ = function.__doc__
        with contextlib.suppress(AttributeError):  # no public way to hear of it; without it, nothing is said
            self._compile = self._dispatcher._compile_for_args
            self._dispatcher._compile_for_args = self._compile_and_tell
        _kernels.append(self)

    def __call__(self, *args: Any) -> Any:
        return self._dispatcher(*args)

    def _compile_and_tell(self, *args: Any, **options: Any) -> Any:
        """What Numba calls for arguments whose types it has no code for: it loads some from disk, or compiles."""
        with self.compiling:  # one thread compiles, the others wait for it
            done = threading.Event()
            threading.Thread(target=self._say_if_compiling, args=(self._misses(), done), daemon=True).start()
            try:
                return self._compile(*args, **options)
            finally:
                done.set()
                _notice.done += 1

    def _misses(self) -> int:
        return sum(self._dispatcher.stats.cache_misses.values())

    def _say_if_compiling(self, misses_before: int, done: threading.Event) -> None:
        while not done.wait(_SAY_AFTER_SECONDS):
            if self._misses() > misses_before:  # a slow disk is no compilation
                _notice.say(self._function.__name__)
                return


@functools.cache
def _source_stamp() -> str:
    """Of all kernel sources: Numba itself looks only at the file of a kernel, not at those it takes functions from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("numba_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _warn_of_no_cache() -> None:
    warnings.warn(
        "CPU kernels cannot be cached and will be compiled in every process: Numba found no directory that it may "
        "write to; set NUMBA_CACHE_DIR to one",
        RuntimeWarning,
        stacklevel=4,
    )


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    common = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy", **options}
    try:
        dispatcher = numba.njit(cache=True, **common)(function)
    except RuntimeError:
        _warn_of_no_cache()
        return numba.njit(**common)(function)
    with contextlib.suppress(AttributeError):  # no public way to say this; without it, edited kernels may be stale
        dispatcher._cache._cache_file._source_stamp = _source_stamp()
    return dispatcher


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorator for functions that Python calls: jitted, cached on disk, without the interpreter lock."""
    return Kernel(function)


def bare_kernel(function: Callable[..., Any]) -> Kernel:
    """A `kernel` that allocates nothing, so that arrays need no reference counts.

    Numba else counts the arrays that it hands to a `device_function`, atomically: seconds where that is called for
    every row or edge.
    """
    return Kernel(function, _nrt=False)


def device_function(function: Callable[..., Any]) -> Any:
    """Decorator for functions that kernels call; inlined by LLVM where that pays."""
    return numba.njit(nogil=True, fastmath=FAST_MATH, error_model="numpy")(function)


def inlined_function(function: Callable[..., Any]) -> Any:
    """A `device_function` that is inlined however long it is: for what runs for every row of a tile.

    Else each call would write its arrays to the stack, seven numbers each.
    """
    return numba.njit(nogil=True, fastmath=FAST_MATH, error_model="numpy", forceinline=True)(function)


_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _forget_threads() -> None:
    """A forked child has the parent's pool and locks, but none of the threads that work in it or hold them."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()
    for each in _kernels:
        each.compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="ssa-kernel")
            _pool_size = count
        return _pool


def parallel_for(body: Callable[[int], object], count: int) -> None:
    """Call ``body(i)`` for every i below ``count``, on ``torch.get_num_threads()`` threads.

    Every i must own what it writes. Tasks are handed out one by one, so unequal ones balance. Errors are raised here.
    """
    workers = min(torch.get_num_threads(), count)
    if workers <= 1:
        for i in range(count):
            body(i)
        return
    lock = threading.Lock()
    remaining = iter(range(count))

    def work() -> None:
        while True:
            with lock:
                i = next(remaining, None)
            if i is None:
                return
            body(i)

    futures = [_threads(workers - 1).submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        for future in futures:
            future.result()


class Workspace:
    """Work arrays of one call: every thread has its own, and gets them again for its next task.

    Mapping fresh pages for each task costs more than many a kernel.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str], np.ndarray[Any, Any]] = {}

    def array(self, name: str, size: int, dtype: Any) -> np.ndarray[Any, Any]:
        """``size`` numbers, not initialised."""
        key = threading.get_ident(), name
        kept = self._arrays.get(key)
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._arrays[key] = np.empty(size, dtype)
        return kept[:size]


def as_array(x: Tensor) -> np.ndarray[Any, Any]:
    """A contiguous NumPy view of a CPU tensor, or a copy: half precision becomes float32, other strides contiguous."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return x.contiguous().numpy()


def as_matrices(x: Tensor) -> np.ndarray[Any, Any]:
    """`as_array`, where each matrix ``x[.., :, :]`` has to be contiguous, but not all of them together: the keys of a
    cache are seen in place."""
    wide = x.dtype in (torch.float32, torch.float64)
    return x.detach().numpy() if wide and x.stride()[-2:] == (x.shape[-1], 1) else as_array(x)
