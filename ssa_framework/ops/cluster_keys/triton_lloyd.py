"""Kernels of k-means: a program takes one segment through all of its steps; a program averages one cluster."""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import dot


@triton.jit
def _keys_of(segment, place, inside, key_stride, dim_stride, D: tl.constexpr, W: tl.constexpr):
    """Keys ``place [S]`` of a segment: float32 ``[S, W]``."""
    dims = tl.arange(0, W)[None, :]
    at = place[:, None].to(tl.int64) * key_stride + dims * dim_stride
    return tl.load(segment + at, mask=inside[:, None] & (dims < D), other=0.0).to(tl.float32)


@triton.jit
def _nearest(x, centroids, bias, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr):
    """The first of the nearest ``centroids [CLUSTERS, W]`` of each row of ``x [S, W]``."""
    scores = dot(x, tl.trans(centroids), tl.zeros((x.shape[0], CLUSTERS), tl.float32), PRECISION) + bias[None, :]
    number = tl.arange(0, CLUSTERS)[None, :]
    best = scores == tl.max(scores, 1)[:, None]
    # a row of NaNs equals nothing
    return tl.minimum(tl.min(tl.where(best, number, CLUSTERS), 1), CLUSTERS - 1)


@triton.jit
def lloyd_kernel(
    k, k_batch, k_head, k_key, k_dim, starts, starts_batch, segments, initial, owners, counts, length, clusters,
    coarse, coarse_keys, stride, iterations,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``owners`` int32 ``[B, Hkv, F, L]`` and ``counts`` int32 ``[B, Hkv, F, clusters]`` of segment ``program_id(0)``.

    ``coarse`` of the ``iterations`` look at ``coarse_keys`` keys, ``stride`` apart. A segment that is not used is
    computed as if it began at the first key.
    """
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    index = (batch * tl.num_programs(1) + head) * segments + tl.program_id(0)
    start = tl.maximum(tl.load(starts + batch * starts_batch + tl.program_id(0)), 0).to(tl.int64)
    segment = k + batch * k_batch + head * k_head + start * k_key
    number = tl.arange(0, CLUSTERS)
    real = number < clusters
    total = tl.zeros((W,), tl.float32)
    for first in range(0, length, KEYS):
        place = first + tl.arange(0, KEYS)
        total += tl.sum(_keys_of(segment, place, place < length, k_key, k_dim, D, W), 0)
    mean = (total / length)[None, :]
    centroids = _keys_of(segment, tl.load(initial + number, mask=real, other=0), real, k_key, k_dim, D, W)
    centroids = tl.where(real[:, None], centroids - mean, 0.0)
    for step in range(iterations):
        bias = tl.where(real, tl.sum(centroids * centroids, 1) / -2, -float("inf"))
        apart = tl.where(step < coarse, stride, 1)
        keys = tl.where(step < coarse, coarse_keys, length)
        sums = tl.zeros((CLUSTERS, W), tl.float32)
        size = tl.zeros((CLUSTERS,), tl.float32)
        for first in range(0, keys, KEYS):
            nth = first + tl.arange(0, KEYS)
            inside = nth < keys
            x = _keys_of(segment, nth * apart, inside, k_key, k_dim, D, W) - mean
            x = tl.where(inside[:, None], x, 0.0)
            owner = _nearest(x, centroids, bias, CLUSTERS, PRECISION)
            # [CLUSTERS, S]
            members = ((owner[None, :] == number[:, None]) & inside[None, :]).to(tl.float32)
            sums = dot(members, x, sums, PRECISION)
            size += tl.sum(members, 1)
        centroids = tl.where((size > 0)[:, None], sums / tl.maximum(size, 1.0)[:, None], centroids)
    bias = tl.where(real, tl.sum(centroids * centroids, 1) / -2, -float("inf"))
    count = tl.zeros((CLUSTERS,), tl.int32)
    for first in range(0, length, KEYS):
        place = first + tl.arange(0, KEYS)
        inside = place < length
        x = _keys_of(segment, place, inside, k_key, k_dim, D, W) - mean
        owner = _nearest(tl.where(inside[:, None], x, 0.0), centroids, bias, CLUSTERS, PRECISION)
        tl.store(owners + index * length + place, owner, mask=inside)
        count += tl.sum(((owner[None, :] == number[:, None]) & inside[None, :]).to(tl.int32), 1)
    tl.store(counts + index * clusters + number, count, mask=real)


@triton.jit
def average_kernel(
    k, k_batch, k_head, k_key, k_dim, order, start, size, centroids, variances, places,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``centroids`` and ``variances``, float32 ``[B, Hkv, S, D]``, of slot ``program_id(0)``: of the keys
    ``order[start : start + size]``; ``order [B, Hkv, places]``. Zeros for an empty slot."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    of_head = batch * tl.num_programs(1) + head
    slot = of_head * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(size + slot)
    first_key = order + of_head * places + tl.load(start + slot)
    table = k + batch * k_batch + head * k_head
    total = tl.zeros((W,), tl.float32)
    for first in range(0, count, KEYS):
        nth = first + tl.arange(0, KEYS)
        key = tl.load(first_key + nth, mask=nth < count, other=0)
        total += tl.sum(_keys_of(table, key, nth < count, k_key, k_dim, D, W), 0)
    mean = total / tl.maximum(count, 1)
    squares = tl.zeros((W,), tl.float32)
    for first in range(0, count, KEYS):
        nth = first + tl.arange(0, KEYS)
        key = tl.load(first_key + nth, mask=nth < count, other=0)
        apart = _keys_of(table, key, nth < count, k_key, k_dim, D, W) - mean[None, :]
        squares += tl.sum(tl.where((nth < count)[:, None], apart * apart, 0.0), 0)
    dims = tl.arange(0, W)
    tl.store(centroids + slot * D + dims, mean, mask=dims < D)
    tl.store(variances + slot * D + dims, squares / tl.maximum(count, 1), mask=dims < D)
