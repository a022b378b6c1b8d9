"""The choosing kernel: the K best of the scores of one query, as a list of keys in ascending order."""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.select_neighbors.triton_slices import key_at

_GUESSES = tl.constexpr(20)
_LOWEST = tl.constexpr(-3.4028232635611926e38)  # the one below stands for scores that compare with nothing


@triton.jit
def _as_float(x):
    """The float32 that compare as the int32 ``x`` do."""
    return tl.where(x < 0, x ^ 0x7FFFFFFF, x).to(tl.float32, bitcast=True)


@triton.jit
def _normal_quantile(share):
    """The number that a standard normal variable exceeds with probability ``share``; Abramowitz & Stegun 26.2.22."""
    tail = tl.minimum(share, 1.0 - share)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(share < 0.5, z, -z)


@triton.jit
def guess(x, total, budget):
    """A number that about ``budget`` of the ``total`` scores above -inf reach, and how many do reach it.

    The first guess takes the scores for normally distributed; the next ones follow the counts.
    """
    kept = tl.where(x > -float("inf"), x, 0.0)
    mean = tl.sum(kept, 0) / total
    deviation = tl.sqrt(tl.maximum(tl.sum(kept * kept, 0) / total - mean * mean, 0.0))
    number = mean + deviation * _normal_quantile(budget / total.to(tl.float32))
    reach = tl.sum((x >= number).to(tl.int32), 0)
    # regula falsi, after Illinois: an end that stays counts half, so that both ends close in
    low = number - 3.0 * deviation
    high = number + 3.0 * deviation
    excess = (total - budget).to(tl.float32)
    lack = tl.zeros_like(excess) + budget
    rounds = tl.zeros_like(reach)
    enough = reach > budget
    while (reach != budget) & (rounds < _GUESSES):
        stays = enough == (reach > budget)
        enough = reach > budget
        distance = (reach - budget).to(tl.float32)
        low = tl.where(enough, number, low)
        high = tl.where(enough, high, number)
        half = tl.where(stays & (rounds > 0), 0.5, 1.0)
        excess = tl.where(enough, distance, excess * half)
        lack = tl.where(enough, lack * half, -distance)
        number = low + (high - low) * (excess / (excess + lack))
        reach = tl.sum((x >= number).to(tl.int32), 0)
        rounds += 1
    return number, reach


@triton.jit
def highest(x, budget):
    """The highest number that at least ``budget`` of the scores ``x`` reach, by halving the interval of floats."""
    low = tl.full((), -2139095040, tl.int32)  # the lowest finite number
    high = tl.full((), 0x7F800001, tl.int32)  # above infinity
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = tl.sum((x >= _as_float(middle)).to(tl.int32), 0) >= budget
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _as_float(low)


@triton.jit
def sort_network(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """``x [SIZE]`` ascending: a bitonic network. `tl.sort` takes a sixth more instructions."""
    i = tl.arange(0, SIZE)
    for stage in tl.static_range(1, LOG_SIZE + 1):
        for bit in tl.static_range(stage - 1, -1, -1):
            other = tl.gather(x, i ^ (1 << bit), 0)
            lower = ((i >> bit) & 1) == ((i >> stage) & 1)
            x = tl.where(lower, tl.minimum(x, other), tl.maximum(x, other))
    return x


@triton.jit
def _keys(slices, clipped, batch, head, at, index, mask, SLOTS: tl.constexpr, PER_ORDER: tl.constexpr):
    """The keys whose scores stand at ``index`` in the row of a query; ``at``: where its slices are in ``clipped``."""
    slot = tl.zeros_like(index)
    for halving in tl.static_range(15, -1, -1):
        if (1 << halving) < SLOTS:
            next_slot = slot + (1 << halving)
            onward = mask & (next_slot < SLOTS)
            onward = onward & (tl.load(clipped.offsets + at + next_slot, mask=onward, other=0) <= index)
            slot = tl.where(onward, next_slot, slot)
    place = tl.load(clipped.spans + 2 * (at + slot), mask=mask, other=0) + index
    place -= tl.load(clipped.offsets + at + slot, mask=mask, other=0)
    return key_at(slices, batch, head, (slot // PER_ORDER).to(tl.int64), place, mask).to(tl.int32)


@triton.jit
def _choose(
    start, filled, line, slices, clipped, batch, head, at, num_keys,
    BUDGET: tl.constexpr, SLOTS: tl.constexpr, PER_ORDER: tl.constexpr, SIZE: tl.constexpr, SORTED: tl.constexpr,
    LOG_SORTED: tl.constexpr,
):  # fmt: skip
    """Write the keys of the best of ``filled <= SIZE`` scores; how many they are, and how many there were."""
    # [SIZE]
    index = tl.arange(0, SIZE)
    x = tl.load(start + index, mask=index // 4 * 4 < filled, other=-float("inf"))  # four at once
    x = tl.where(index < filled, x, -float("inf"))
    total = tl.sum((x > -float("inf")).to(tl.int32), 0)
    limit = tl.full((), _LOWEST, tl.float32)
    if total > BUDGET:
        limit, reach = guess(x, total, BUDGET)
        if reach != BUDGET:
            limit = highest(x, BUDGET)
            # of the scores equal to the threshold, the earliest keys
            tied = x == limit
            room = BUDGET - tl.sum((x > limit).to(tl.int32), 0)
            key = _keys(slices, clipped, batch, head, at, index, tied, SLOTS, PER_ORDER)
            low = tl.full((), -1, tl.int32)
            high = num_keys - 1
            while low + 1 < high:
                middle = (low + high) // 2
                enough = tl.sum((tied & (key <= middle)).to(tl.int32), 0) >= room
                low = tl.where(enough, low, middle)
                high = tl.where(enough, middle, high)
            x = tl.where(tied & (key > high), -float("inf"), x)
    taken = (x >= tl.maximum(limit, _LOWEST)).to(tl.int32)
    to = tl.cumsum(taken, 0)
    count = tl.sum(taken, 0)
    tl.store(line + to - 1, index, mask=taken != 0)
    tl.debug_barrier()  # read back in another order than written
    # [SORTED]
    rank = tl.arange(0, SORTED)
    index = tl.load(line + rank, mask=rank < count, other=0)
    key = _keys(slices, clipped, batch, head, at, index, rank < count, SLOTS, PER_ORDER)
    key = sort_network(tl.where(rank < count, key, 2147483647), SORTED, LOG_SORTED)
    tl.debug_barrier()
    tl.store(line + rank, tl.where(rank < count, key, -1), mask=rank < BUDGET)
    return count, total


@triton.jit
def choose_kernel(
    scores, slices, clipped, out, listed, scored, first_head, graph_heads, first_row, all_rows, num_keys, counters,
    BUDGET: tl.constexpr, SLOTS: tl.constexpr, PER_ORDER: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr,
    SMALL: tl.constexpr, SORTED: tl.constexpr, LOG_SORTED: tl.constexpr,
):  # fmt: skip
    """``out [B, G, N, BUDGET]`` for query ``first_row + program_id(0)`` and graph head ``first_head + program_id(1)``.

    ``scores``: as `score_kernel` leaves them. ``listed``, ``scored``: how many keys were chosen, and from how many,
    spread over ``counters`` words. Queries with no more than ``SMALL`` scores hold no more than that, the others up to
    ``SIZE``.
    """
    local = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    row = first_row + local
    at = (head * all_rows + row) * SLOTS
    filled = tl.load(clipped.offsets + at + SLOTS - 1) + tl.load(clipped.spans + 2 * (at + SLOTS) - 1)
    start = scores + (head * tl.num_programs(0) + local) * ROOM
    line = out + ((first_head + head) * all_rows + row) * BUDGET
    if filled <= SMALL:
        count, total = _choose(
            start, filled, line, slices, clipped, b, g, at, num_keys,
            BUDGET, SLOTS, PER_ORDER, SMALL, SORTED, LOG_SORTED,
        )  # fmt: skip
    else:
        count, total = _choose(
            start, filled, line, slices, clipped, b, g, at, num_keys,
            BUDGET, SLOTS, PER_ORDER, SIZE, SORTED, LOG_SORTED,
        )  # fmt: skip
    word = tl.program_id(0) % counters
    tl.atomic_add(listed + word, count.to(tl.int64), sem="relaxed")
    tl.atomic_add(scored + word, total.to(tl.int64), sem="relaxed")
