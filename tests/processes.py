"""Processes that start quickly: forked from one that has imported everything, and run nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest import mock


def start_process(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Run ``target(*args)``, a function of a module, in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_ranks", "train_ranks", "torch._dynamo"])
    process = context.Process(target=target, args=args)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        process.start()
    return process
