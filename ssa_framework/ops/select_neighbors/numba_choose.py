"""Numba kernels that choose, of scored candidates, the neighbors of each query: each key once, the best of all."""

from __future__ import annotations

from typing import Any

import numpy as np

from ssa_framework.ops.numba_runtime import device_function, kernel

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
"""Times a single bit, its top six bits tell which bit it is."""
_BIT_NUMBER = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    _BIT_NUMBER[((1 << _bit) * 0x03F79D71B4CB0A89 & (1 << 64) - 1) >> 58] = _bit

CONTENT, GUARANTEED, FORCED = 0, 1, 2
"""How a source's candidates are kept: by score, before those, or beside the budget."""


BLOCKED = 2**31 - 1
"""In ``seen``: a key that no query of this document may list."""


@device_function
def _new_document(seen: Any, key_keep: Any, key_segments: Any, segment: int) -> None:
    """Start ``seen`` anew for a document: 0, or `BLOCKED` for padding and for keys of other documents."""
    seen[:] = 0
    if key_keep.shape[0] > 0:
        for key in range(seen.shape[0]):
            if not key_keep[key]:
                seen[key] = BLOCKED
    if key_segments.shape[0] > 0:
        for key in range(seen.shape[0]):
            if key_segments[key] != segment:
                seen[key] = BLOCKED


@device_function
def _prepare(
    seen: Any,
    r: int,
    mark: int,
    position: int,
    band: Any,
    columns: Any,
    key_keep: Any,
    query_segments: Any,
    key_segments: Any,
) -> None:
    """Make ``seen[key] < mark`` say that query r may list the key (but for causality)."""
    packed = query_segments.shape[0] > 0
    if r == 0 or (packed and query_segments[r] != query_segments[r - 1]):
        _new_document(seen, key_keep, key_segments, query_segments[r] if packed else 0)
    if band[0] >= 0:
        for key in range(max(position - band[0], 0), min(position + band[1] + 1, seen.shape[0])):
            seen[key] = max(seen[key], mark)
    for c in range(columns.shape[0]):
        seen[columns[c]] = max(seen[columns[c]], mark)


@kernel
def choose_from_slices(
    order: Any,
    firsts: Any,
    offsets: Any,
    scores: Any,
    positions: Any,
    causal: bool,
    band: Any,
    columns: Any,
    key_keep: Any,
    query_segments: Any,
    key_segments: Any,
    budget: int,
    seen: Any,
    picked: Any,
    picked_scores: Any,
    bits: Any,
    neighbors: Any,
    totals: Any,
) -> None:
    """The neighbors of R queries where all candidates come from the slices of one source.

    Args:
        order: int32 ``[S, L]``. firsts, offsets: of `clip_slices`. scores: of `score_slices`.
        positions: int32 ``[R]``. band: int64 ``[2]``, before and after, -1 = none. columns: int32, ascending.
        key_keep: bool ``[M or 0]``. query_segments, key_segments: int64 ``[R or 0]`` and ``[M or 0]``.
        seen: scratch, int32 ``[M]``. picked, picked_scores: scratch, longer than the candidates of a query and than a
            row of ``neighbors``.
        bits: scratch, uint64, zeros: a bitmap of the keys and one of its words, as `bitmap_size` says.
        neighbors: out, int32 ``[R, K]``, filled with -1. totals: out, int64 ``[2]``: slots filled, keys scored.
    """
    slices = firsts.shape[1] // order.shape[0]
    words = seen.shape[0] // 64 + 1
    for r in range(positions.shape[0]):
        mark = r + 1
        position = positions[r]
        _prepare(seen, r, mark, position, band, columns, key_keep, query_segments, key_segments)
        last_key = position if causal else seen.shape[0]
        # Unsigned places: an index that may be negative costs a check in each of these few instructions.
        stamp = np.int32(mark)
        place = np.uint64(0)
        for i in range(firsts.shape[1]):
            number = r * firsts.shape[1] + i
            offset, first, keys = np.uint64(offsets[number]), np.uint64(firsts[r, i]), order[i // slices]
            for j in range(np.uint64(offsets[number + 1]) - offset):
                key = np.uint32(keys[first + j])
                score = scores[offset + j]
                before = seen[key]
                # a NaN is above nothing: what cannot be compared is not listed
                fresh = np.uint64(before < stamp) & np.uint64(np.int64(key) <= last_key) & np.uint64(score > -np.inf)
                seen[key] = stamp if before < stamp else before
                picked[place] = key  # written in any case, kept if fresh: a branch here would be mispredicted
                picked_scores[place] = score
                place += fresh
        found = np.int64(place)
        totals[1] += found
        totals[0] += mark_best(picked, picked_scores, found, budget, bits, words)
        unpack(bits, words, picked, neighbors[r])


@kernel
def choose(
    offsets: Any,
    keys: Any,
    scores: Any,
    owners: Any,
    kinds: Any,
    positions: Any,
    causal: bool,
    band: Any,
    columns: Any,
    key_keep: Any,
    query_segments: Any,
    key_segments: Any,
    budget: int,
    seen: Any,
    picked: Any,
    picked_scores: Any,
    bits: Any,
    neighbors: Any,
    owner_of: Any,
    listed: Any,
    scored: Any,
) -> None:
    """The neighbors of R queries with candidates of several sources.

    Args:
        offsets: int64 ``[R + 1]``; the candidates of query r are ``keys[offsets[r]:offsets[r + 1]]``, int32, -1 =
            none, with ``scores`` and the source of each in ``owners`` (int8; sources in ascending order).
        kinds: int64, per source `CONTENT`, `GUARANTEED` or `FORCED`; forced sources come first, then guaranteed ones.
        owner_of: scratch, int8 ``[M]``. listed, scored: out, int64 per source, added to.
        others: as in `choose_from_slices`; ``seen`` counts in steps of the number of sources.
    """
    sources = kinds.shape[0]
    words = seen.shape[0] // 64 + 1
    for r in range(positions.shape[0]):
        mark = 1 + r * (sources + 1)  # seen[key] is mark where covered, mark + 1 + the last source that proposed it
        position = positions[r]
        _prepare(seen, r, mark, position, band, columns, key_keep, query_segments, key_segments)
        found = 0
        guaranteed = 0
        for c in range(offsets[r], offsets[r + 1]):
            key = keys[c]
            owner = owners[c]
            if key < 0 or (causal and key > position):
                continue
            before = seen[key]
            if before in (BLOCKED, mark, mark + 1 + owner):
                continue
            seen[key] = mark + 1 + owner
            if kinds[owner] == CONTENT:
                scored[owner] += 1
            if before > mark:
                continue  # an earlier source has it
            owner_of[key] = owner
            if kinds[owner] == CONTENT:
                if not scores[c] > -np.inf:
                    continue  # a NaN is above nothing: what cannot be compared is not listed
                picked[found] = key
                picked_scores[found] = scores[c]
                found += 1
            else:
                _set_bit(bits, words, key)
                guaranteed += kinds[owner] == GUARANTEED
        mark_best(picked, picked_scores, found, budget - guaranteed, bits, words)
        for place in range(unpack(bits, words, picked, neighbors[r])):
            listed[owner_of[neighbors[r, place]]] += 1


def bitmap_size(keys: int) -> int:
    """Words of a bitmap of ``keys`` keys, and of a bitmap that says which of those words have a bit set."""
    words = keys // 64 + 1
    return words + words // 64 + 1


@device_function
def _set_bit(bits: Any, words: int, key: int) -> None:
    place = np.uint64(key)
    word = place >> np.uint64(6)
    bits[word] |= np.uint64(1) << (place & np.uint64(63))
    bits[np.uint64(words) + (word >> np.uint64(6))] |= np.uint64(1) << (word & np.uint64(63))


@device_function
def _mark(picked: Any, first: int, last: int, bits: Any, words: int) -> None:
    for i in range(first, last):
        _set_bit(bits, words, picked[i])


@device_function
def _count_from(scores: Any, last: int, threshold: Any) -> Any:
    total = np.float32(0)  # a float sum, because it vectorises to full width; exact up to 2^24
    for i in range(last):
        total += np.float32(1) if scores[i] >= threshold else np.float32(0)
    return total


@device_function
def _find_threshold(scores: Any, found: int, budget: int) -> Any:
    """A score that exactly ``budget`` of more than ``budget`` scores reach, and True; or, where ties leave no such
    score, the ``budget``-th highest score, and False.
    """
    total = scores[0] * 0
    for i in range(found):
        total += scores[i]
    centre = total / found
    total = scores[0] * 0
    for i in range(found):
        total += (scores[i] - centre) * (scores[i] - centre)
    step = np.sqrt(total / found)
    # a bracket around the threshold: ``budget`` scores or more reach low, fewer reach high; counting is cheap
    low, high = centre, centre
    n = _count_from(scores, found, centre)
    at_low, at_high = n, n
    if n == budget:
        return centre, True
    if step > 0 and step < np.inf:
        while at_high >= budget and high < np.inf:
            low, at_low = high, at_high
            high = high + step
            step = step + step
            at_high = _count_from(scores, found, high)
        while at_low < budget and low > -np.inf:
            high, at_high = low, at_low
            low = low - step
            step = step + step
            at_low = _count_from(scores, found, low)
        if at_low == budget:
            return low, True
        halve = False
        while at_low > budget and at_high < budget:
            # where the threshold is if scores are spread evenly; every other time the middle, which is sure
            share = (at_low - budget) / (at_low - at_high)
            middle = low + (high - low) * (np.float32(0.5) if halve else share)
            halve = not halve
            if not (middle > low and middle < high):
                middle = low + (high - low) / 2
                if not (middle > low and middle < high):
                    break
            n = _count_from(scores, found, middle)
            if n == budget:
                return middle, True
            if n > budget:
                low, at_low = middle, n
            else:
                high, at_high = middle, n
    # ties, or numbers too far apart to subtract
    return np.sort(scores[:found])[found - budget], False


@device_function
def mark_best(picked: Any, scores: Any, found: int, budget: int, bits: Any, words: int) -> int:
    """Set the bits of the ``budget`` keys with the highest of ``found`` scores; ties go to the lower key.

    Returns how many. The arrays are overwritten.
    """
    if budget <= 0 or found == 0:
        return 0
    if found <= budget:
        _mark(picked, 0, found, bits, words)
        return found
    threshold, exact = _find_threshold(scores, found, budget)
    if not exact:
        return _mark_with_ties(picked, scores, found, budget, threshold, bits, words)
    place = np.uint64(0)
    for i in range(np.uint64(found)):  # written in any case, kept if it counts, as above
        picked[place] = picked[i]
        place += np.uint64(scores[i] >= threshold)
    _mark(picked, 0, np.int64(place), bits, words)
    return int(place)


@device_function
def _mark_with_ties(picked: Any, scores: Any, found: int, budget: int, threshold: Any, bits: Any, words: int) -> int:
    """All keys above the threshold, and the lowest keys of those that equal it."""
    chosen, equal = 0, 0
    for i in range(found):
        key, score = picked[i], scores[i]
        if score > threshold:
            _set_bit(bits, words, key)
            chosen += 1
        elif score == threshold:
            picked[equal] = key
            equal += 1
    tied = np.sort(picked[:equal])
    _mark(tied, 0, budget - chosen, bits, words)
    return budget


@device_function
def unpack(bits: Any, words: int, scratch: Any, row: Any) -> int:
    """Keys of the set bits, ascending, into ``row``; the bits are cleared. Returns how many.

    ``scratch`` is int32, longer than ``row``. Where most words have a bit or two, both are written without asking,
    since a branch on the number of bits is mispredicted more often than not; where most have none, only those are
    visited that have one.
    """
    place = np.uint64(0)
    if words < 4 * row.shape[0]:
        for word in range(words):
            rest = bits[word]
            base = word << 6
            scratch[place] = base + _lowest(rest)
            place += np.uint64(rest != 0)
            rest &= rest - np.uint64(1)
            scratch[place] = base + _lowest(rest)
            place += np.uint64(rest != 0)
            rest &= rest - np.uint64(1)
            while rest != 0:
                scratch[place] = base + _lowest(rest)
                place += np.uint64(1)
                rest &= rest - np.uint64(1)
        bits[:] = 0
    else:
        for group in range(words, bits.shape[0]):
            filled = bits[group]
            bits[group] = 0
            while filled != 0:
                word = ((group - words) << 6) + _lowest(filled)
                filled &= filled - np.uint64(1)
                rest = bits[word]
                bits[word] = 0
                while rest != 0:
                    scratch[place] = (word << 6) + _lowest(rest)
                    place += np.uint64(1)
                    rest &= rest - np.uint64(1)
    found = int(place)
    row[:found] = scratch[:found]
    return found


@device_function
def _lowest(word: Any) -> Any:
    """Number of the lowest set bit; any number if there is none."""
    return _BIT_NUMBER[((word & (~word + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]


@kernel
def score_lists(q: Any, k: Any, lists: Any, scores: Any) -> None:
    """``q [R, D]`` by the listed rows of ``k [M, D]``; ``lists`` int32 ``[R or 1, C]``, -1 = none."""
    shared = lists.shape[0] == 1
    for r in range(q.shape[0]):
        row = lists[0 if shared else r]
        for c in range(row.shape[0]):
            key = row[c]
            scores[r, c] = 0
            if key >= 0:
                for d in range(q.shape[1]):
                    scores[r, c] += q[r, d] * k[key, d]


@kernel
def join(
    a_offsets: Any, a_keys: Any, a_scores: Any, a_owners: Any, b_offsets: Any, b_keys: Any, b_scores: Any,
    b_owners: Any, offsets: Any, keys: Any, scores: Any, owners: Any,
) -> None:  # fmt: skip
    """Candidates of two sources as one list per query, those of ``a`` first."""
    place = 0
    offsets[0] = 0
    for r in range(offsets.shape[0] - 1):
        for c in range(a_offsets[r], a_offsets[r + 1]):
            keys[place], scores[place], owners[place] = a_keys[c], a_scores[c], a_owners[c]
            place += 1
        for c in range(b_offsets[r], b_offsets[r + 1]):
            keys[place], scores[place], owners[place] = b_keys[c], b_scores[c], b_owners[c]
            place += 1
        offsets[r + 1] = place


@kernel
def keep_above(
    tile: Any, first_key: int, thresholds: Any, counts: Any, keys: Any, scores: Any, room: int, positions: Any,
    causal: bool, band: Any, columns: Any, key_keep: Any, query_segments: Any, key_segments: Any, seen: Any,
) -> int:  # fmt: skip
    """Of a tile of scores of consecutive keys, append to each query's buffer those above its running threshold.

    Args:
        tile: ``[R, W]``, scores of the keys ``first_key + j``. thresholds: ``[R]``, the K-th best so far or -inf.
        counts: int64 ``[R]``. keys, scores: buffers ``[R, 2·room]``, of which the best ``room`` matter.
        seen: scratch, int32 ``[M]``; others as in `choose_from_slices`.

    Returns: how many pairs were eligible.
    """
    pairs = 0
    plain = key_keep.shape[0] == 0 and key_segments.shape[0] == 0
    covered = columns.shape[0] + (band[0] + band[1] + 1 if band[0] >= 0 else 0)
    for r in range(tile.shape[0]):
        position = positions[r]
        mark = r + 1
        _prepare(seen, r, mark, position, band, columns, key_keep, query_segments, key_segments)
        last = min(tile.shape[1], position - first_key + 1) if causal else tile.shape[1]
        row, marks = tile[r], seen[first_key : first_key + tile.shape[1]]
        free = np.float32(0)  # float counters vectorise to full width; exact up to 2^24
        for j in range(last):
            free += np.float32(1) if marks[j] < mark else np.float32(0)
        pairs += int(free)
        threshold = thresholds[r]
        if plain and counts[r] == 0 and last > 2 * (room + covered):
            # the best of the first tile at once: whatever comes later must beat them
            reached, _ = _find_threshold(row, last, room + covered)
            threshold = np.nextafter(reached, thresholds[r])  # in the direction of -inf
        for start in range(0, last, 64):
            stop = min(start + 64, last)
            above = np.float32(0)
            for j in range(start, stop):
                above += np.float32(1) if row[j] > threshold else np.float32(0)
            if above == 0:
                continue
            for j in range(start, stop):
                if row[j] > threshold and marks[j] < mark:
                    n = counts[r]
                    keys[r, n] = first_key + j
                    scores[r, n] = row[j]
                    counts[r] = n + 1
                    if n + 1 == 2 * room:
                        threshold = _halve(keys[r], scores[r], room)
                        counts[r] = room
        thresholds[r] = threshold
    return pairs


@device_function
def _halve(keys: Any, scores: Any, room: int) -> Any:
    """Keep the best ``room`` of ``2·room`` ascending keys, in order. Returns a score that later keys must exceed."""
    threshold, exact = _find_threshold(scores, 2 * room, room)
    ties = 0
    if not exact:
        ties = room
        for i in range(2 * room):
            ties -= scores[i] > threshold
    place = 0
    for i in range(2 * room):
        keep = scores[i] >= threshold if exact else scores[i] > threshold
        if not keep and ties > 0 and scores[i] == threshold:
            keep = True
            ties -= 1
        if keep:
            keys[place], scores[place] = keys[i], scores[i]
            place += 1
    if exact:  # a later key that equals the lowest score kept loses to it, and so does one below
        threshold = scores[0]
        for i in range(room):
            threshold = min(threshold, scores[i])
    return threshold
