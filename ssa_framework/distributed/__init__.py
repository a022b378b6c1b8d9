"""Context and tensor parallelism on torch.distributed, checks across ranks, and checkpoints to resume from."""

from ssa_framework.distributed.agreement import check_agreement
from ssa_framework.distributed.checkpoint import load_checkpoint, save_checkpoint
from ssa_framework.distributed.collectives import Traffic, count_traffic
from ssa_framework.distributed.context_parallel import (
    ContextParallel,
    ContextParallelAttention,
    ShardGraph,
    context_parallel_attention,
    parallelize_context,
)
from ssa_framework.distributed.layout import SequenceLayout
from ssa_framework.distributed.tensor_parallel import tensor_parallel_plan
from ssa_framework.distributed.thread_ranks import run_ranks

__all__ = [
    "ContextParallel",
    "ContextParallelAttention",
    "SequenceLayout",
    "ShardGraph",
    "Traffic",
    "check_agreement",
    "context_parallel_attention",
    "count_traffic",
    "load_checkpoint",
    "parallelize_context",
    "run_ranks",
    "save_checkpoint",
    "tensor_parallel_plan",
]
