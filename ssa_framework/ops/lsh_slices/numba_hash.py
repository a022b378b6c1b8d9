"""Numba kernels: center, project and hash, row by row; projections never leave the nearest cache.

A strip holds the directions of a few hash functions, transposed, so that a row times a strip is a handful of vector
products; what follows from the sums (signs, largest coordinates) is taken from them at once. Each row is computed in
the same order of operations wherever it stands, so a key has one code, however many are hashed with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_products import row_by_matrix
from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_vectors import place_of_largest

HYPERPLANE, CROSS_POLYTOPE = 0, 1
LANES = 16
STRIP = 112
"""Columns of a strip, about: with a head dim of 64, it takes 28 KiB of the nearest cache."""
_MAGNITUDE = np.int32(0x7FFFFFFF)
"""Of the bits of a float32, those that order its absolute value."""


@bare_kernel
def center_rows(k: Any, keep: Any, documents: Any, causal: bool, sums: Any, counts: Any, out: Any) -> None:
    """Rows of ``k [M, D]`` without the mean of their document, ``out [M, D]``.

    Args:
        keep: bool ``[M or 0]``. documents: int32 ``[M or 0]``. causal: the mean of the rows up to each, else of all.
        sums: scratch, float64 ``[documents, D]``. counts: scratch, int64 ``[documents]``.
    """
    sums[:] = 0
    counts[:] = 0
    for m in range(0 if causal else k.shape[0]):
        if keep.shape[0] == 0 or keep[m]:
            document = documents[m] if documents.shape[0] > 0 else 0
            counts[document] += 1
            add_row(k[m], sums[document])
    for m in range(k.shape[0]):
        if keep.shape[0] > 0 and not keep[m]:
            continue
        document = documents[m] if documents.shape[0] > 0 else 0
        if causal:
            counts[document] += 1
            add_row(k[m], sums[document])
        center_row(k[m], sums[document], counts[document], out[m])


@device_function
def add_row(row: Any, sums: Any) -> None:
    """Add ``row [D]`` to float64 sums."""
    for d in range(row.shape[0]):
        sums[d] += row[d]


@device_function
def center_row(row: Any, sums: Any, count: Any, out: Any) -> None:
    """``row [D]`` without the mean of ``count`` rows that have these float64 sums."""
    share = 1.0 / count
    for d in range(row.shape[0]):
        out[d] = row[d] - np.float32(sums[d] * share)


class Functions(NamedTuple):
    """The hash functions of one strip.

    Attributes:
        strip: float32 ``[D * W]``, W a multiple of `LANES`. width: W.
        functions: how many. columns: directions of each.
        family: `HYPERPLANE` or `CROSS_POLYTOPE`. single: most bits of one polytope. most: most bits of any query.
    """

    strip: Any
    width: int
    functions: int
    columns: int
    family: int
    single: int
    most: int


class Scratch(NamedTuple):
    """Memory of one task.

    Attributes:
        sums: float32 ``[W]``, projections of a row. bits: the same memory as int32.
        lengths: int32 ``[2, F]``, absolute values of the sums of one function; as integers they have the same order.
        codes, near: int64 and float32 ``[4, room]``, buckets and how near they are; room for the square of the slices
            of a function, or for twice as many.
    """

    sums: Any
    bits: Any
    lengths: Any
    codes: Any
    near: Any


@bare_kernel
def hash_keys(x: Any, hashes: Any, first: Any, last: Any, scratch: Any, codes: Any) -> None:
    """Codes of the keys for every number of bits in whose order they stand.

    Args:
        x: float32 ``[M, D]``. first, last: int32 ``[M]``; see `HashLevels`.
        codes: out, uint16 ``[functions, variants, M]``; one variant for hyperplanes, whose codes for fewer bits are
            the first bits of the code, one per number of bits for polytopes.
    """
    rows, dim = x.reshape(x.size), x.shape[1]
    for m in range(x.shape[0]):
        if first[m] > last[m] or last[m] == 0:
            continue
        row_by_matrix(rows, m * dim, dim, hashes.strip, 0, hashes.width, hashes.width, scratch.sums, 0)
        for f in range(hashes.functions):
            if hashes.family == HYPERPLANE:
                codes[f, 0, m] = _signs(scratch.sums, f * hashes.columns, hashes.most)
            else:
                _polytope_codes(scratch, f * hashes.columns, hashes.single, max(first[m], 1), last[m], codes[f], m)


@device_function
def _signs(sums: Any, base: int, bits: int) -> int:
    code = 0
    for i in range(bits):
        code = 2 * code + (1 if sums[base + i] > 0 else 0)
    return code


@device_function
def _take_lengths(scratch: Any, base: int, size: int, number: int) -> None:
    """Absolute values of ``size`` sums, and -1 up to a whole register."""
    lengths = scratch.lengths[number]
    for j in range(size):
        lengths[j] = scratch.bits[base + j] & _MAGNITUDE
    for j in range(size, LANES):
        lengths[j] = -1


@device_function
def _vertex(sums: Any, base: int, place: int, size: int) -> int:
    return place + (size if sums[base + place] < 0 else 0)


@device_function
def _polytope_codes(scratch: Any, base: int, single: int, first: int, last: int, codes: Any, m: int) -> None:
    """``codes[bits, m]`` for ``first`` to ``last`` bits."""
    for bits in range(last, max(first, single + 1) - 1, -1):
        codes[bits, m] = _code_of_two(scratch, base, single, bits)
    last = min(last, single)
    if first <= last:
        _take_lengths(scratch, base, 1 << (last - 1), 0)
    for bits in range(last, first - 1, -1):  # the coordinates for fewer bits are the first ones of those
        size = 1 << (bits - 1)
        at = place_of_largest(scratch.lengths[0], 0, max(size, LANES))
        codes[bits, m] = _vertex(scratch.sums, base, at, size)
        for j in range(size // 2, size):
            scratch.lengths[0, j] = -1


@device_function
def _code_of_two(scratch: Any, base: int, single: int, bits: int) -> int:
    """The code of a key by two polytopes."""
    low = bits // 2
    large, small = 1 << (bits - low - 1), 1 << (low - 1)
    other = base + (1 << (single - 1))
    _take_lengths(scratch, base, large, 0)
    _take_lengths(scratch, other, small, 1)
    at = place_of_largest(scratch.lengths[0], 0, max(large, LANES))
    beside = place_of_largest(scratch.lengths[1], 0, max(small, LANES))
    return _vertex(scratch.sums, base, at, large) << low | _vertex(scratch.sums, other, beside, small)


@device_function
def key_code(scratch: Any, base: int, hashes: Any, bits: int) -> int:
    """The code of a key for exactly ``bits`` bits, at least 1, from the sums of one function."""
    if hashes.family == HYPERPLANE:
        return _signs(scratch.sums, base, bits)
    if bits > hashes.single:
        return _code_of_two(scratch, base, hashes.single, bits)
    size = 1 << (bits - 1)
    _take_lengths(scratch, base, size, 0)
    return _vertex(scratch.sums, base, place_of_largest(scratch.lengths[0], 0, max(size, LANES)), size)


@bare_kernel
def order_keys(
    codes: Any, family: int, most: int, first: Any, last: Any, documents: Any, num_documents: int, firsts: Any,
    cursor: Any, order: Any,
) -> None:  # fmt: skip
    """The order of the keys by bucket, numbers of bits one after the other: a counting sort.

    Args:
        codes: uint16 ``[variants, M]``, of `hash_keys`. most: bits of the codes of hyperplanes.
        documents: int32 ``[M or 0]``.
        firsts: out, int32 ``[buckets + 1]``, where each bucket starts. cursor: scratch, int32 ``[buckets]``.
        order: out, int32 ``[L]``.
    """
    firsts[:] = 0
    for m in range(first.shape[0]):
        for bits in range(first[m], last[m] + 1):
            firsts[_bucket(codes, family, documents, num_documents, bits, most, m) + 1] += 1
    for i in range(cursor.shape[0]):
        firsts[i + 1] += firsts[i]
        cursor[i] = firsts[i]
    for m in range(first.shape[0]):
        for bits in range(first[m], last[m] + 1):
            bucket = _bucket(codes, family, documents, num_documents, bits, most, m)
            order[cursor[bucket]] = m
            cursor[bucket] += 1


@bare_kernel
def hash_queries(
    x: Any, hashes: Any, levels: Any, documents: Any, num_documents: int, flips: Any, firsts: Any, number: int,
    functions: int, scratch: Any, start: Any, end: Any,
) -> None:  # fmt: skip
    """The slices of the queries.

    Args:
        x: float32 ``[N, D]``. levels: int32 ``[N]``. documents: int32 ``[N or 0]``.
        flips: int64 ``[most + 1, probes]``, of `flip_table`. firsts: int32 ``[count, buckets + 1]``.
        number: of the first function of the strip. functions: S, of all strips.
        start, end: out, int32 ``[N, S, 1 + probes]``.
    """
    slices = start.shape[2]
    rows, dim = x.reshape(x.size), x.shape[1]
    for n in range(x.shape[0]):
        bits, document = levels[n], documents[n] if documents.shape[0] > 0 else 0
        if bits < 0 or document < 0:
            start[n, number : number + hashes.functions] = 0
            end[n, number : number + hashes.functions] = 0
            continue
        base = num_documents * ((1 << bits) - 1) + (document << bits)
        if bits == 0:
            for f in range(hashes.functions):
                low, high = firsts[f, base], firsts[f, base + 1]
                width = (high - low + functions * slices - 1) // (functions * slices)
                for p in range(slices):
                    part = (number + f) * slices + p
                    start[n, number + f, p] = min(low + part * width, high)
                    end[n, number + f, p] = min(low + (part + 1) * width, high)
            continue
        row_by_matrix(rows, n * dim, dim, hashes.strip, 0, hashes.width, hashes.width, scratch.sums, 0)
        for f in range(hashes.functions):
            found = probe(scratch, f * hashes.columns, hashes, bits, flips, slices)
            for p in range(slices):
                bucket = base + scratch.codes[0, p] if p < found else 0
                start[n, number + f, p] = firsts[f, bucket] if p < found else 0
                end[n, number + f, p] = firsts[f, bucket + 1] if p < found else 0


@device_function
def probe(scratch: Any, base: int, hashes: Any, bits: int, flips: Any, slices: int) -> int:
    """The codes of the buckets that a query looks into, from the sums of one function, to ``scratch.codes[0]``;
    returns how many."""
    if hashes.family == HYPERPLANE:
        return _hyperplane_probes(scratch, base, bits, flips[bits], scratch.codes[0])
    return _polytope_probes(scratch, base, hashes.single, bits, slices)


@device_function
def _bucket(codes: Any, family: int, documents: Any, num_documents: int, bits: int, most: int, m: int) -> int:
    code = 0
    if bits > 0:
        code = codes[0, m] >> (most - bits) if family == HYPERPLANE else codes[bits, m]
    document = documents[m] if documents.shape[0] > 0 else 0
    return num_documents * ((1 << bits) - 1) + (document << bits) + int(code)


@device_function
def _hyperplane_probes(scratch: Any, base: int, bits: int, flips: Any, out: Any) -> int:
    """Own code and the codes on the other side of the nearest planes; returns how many."""
    own = _signs(scratch.sums, base, bits)
    out[0] = own
    if flips.shape[0] == 0:
        return 1
    ranked = scratch.codes[1]  # bit of the plane that is nearest, second nearest, ...
    lengths = scratch.lengths[0]
    for i in range(bits):
        length, place = scratch.bits[base + i] & _MAGNITUDE, i
        while place > 0 and lengths[place - 1] > length:
            lengths[place] = lengths[place - 1]
            ranked[place] = ranked[place - 1]
            place -= 1
        lengths[place] = length
        ranked[place] = 1 << (bits - 1 - i)
    for p in range(flips.shape[0]):
        if flips[p] == 0:
            return 1 + p
        code = own
        for rank in range(bits):
            if (flips[p] >> rank) & 1:
                code ^= ranked[rank]
        out[1 + p] = code
    return 1 + int(flips.shape[0])


@device_function
def _polytope_probes(scratch: Any, base: int, single: int, bits: int, count: int) -> int:
    """The codes of the ``count`` nearest buckets, or as many as there are, in ``scratch.codes[0]``."""
    if bits <= single:
        return _nearest_vertices(scratch, base, 1 << (bits - 1), count, scratch.codes[0], scratch.near[0])
    low, other = bits // 2, base + (1 << (single - 1))
    codes, near = scratch.codes, scratch.near
    large = _nearest_vertices(scratch, base, 1 << (bits - low - 1), count, codes[1], near[1])
    small = _nearest_vertices(scratch, other, 1 << (low - 1), count, codes[2], near[2])
    for i in range(large):
        for j in range(small):
            codes[3, i * small + j] = codes[1, i] << low | codes[2, j]
            near[3, i * small + j] = near[1, i] + near[2, j]
    return _take_nearest(codes[3], near[3], large * small, count, codes[0])


@device_function
def _nearest_vertices(scratch: Any, base: int, size: int, count: int, codes: Any, near: Any) -> int:
    if count > size:  # vertices on the far side, too
        for j in range(size):
            scratch.codes[3, j], scratch.near[3, j] = j, scratch.sums[base + j]
            scratch.codes[3, size + j], scratch.near[3, size + j] = size + j, -scratch.sums[base + j]
        for i in range(2 * size):
            near[i] = scratch.near[3, i]
        found = _take_nearest(scratch.codes[3], near, 2 * size, count, codes)
        for i in range(found):
            near[i] = scratch.near[3, codes[i]]
        return found
    _take_lengths(scratch, base, size, 0)
    for i in range(count):
        place = place_of_largest(scratch.lengths[0], 0, max(size, LANES))
        scratch.lengths[0, place] = -1
        codes[i] = _vertex(scratch.sums, base, place, size)
        near[i] = abs(scratch.sums[base + place])
    return count


@device_function
def _take_nearest(codes: Any, near: Any, total: int, count: int, out: Any) -> int:
    """The codes of the largest of ``near``, which is used up, the first of equals; returns how many."""
    found = min(count, total)
    for i in range(found):
        best = 0
        for j in range(1, total):
            if near[j] > near[best]:
                best = j
        out[i] = codes[best]
        near[best] = -np.inf
    return found
