"""``faiss``: approximate nearest neighbors from any index that faiss can build (extra ``faiss``)."""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssa_framework.plugin import (
    Candidates,
    ConfigError,
    LayerSpec,
    MissingExtraError,
    NeighborSource,
    Registrar,
    RoutingContext,
    hookimpl,
)

_POINTS_PER_CENTROID = 39  # what faiss recommends (ClusteringParameters.min_points_per_centroid)
_CODE_BOOK = 256  # entries of the usual 8-bit code book, for indices that do not say how many theirs has
_SMALLEST_GRAPH = 256  # NSG ends the process below about a hundred keys
_SCORES_AT_ONCE = 2**22  # elements of the largest temporary of an exact scan


class FaissIndex(NeighborSource):
    """The keys that a faiss index finds for the query, by inner product.

    One index holds the keys of one document of one batch element and KV head; padding is never indexed. faiss works
    on the CPU in float32, whatever the device and dtype. Each query asks for ``num_neighbors`` keys, so that enough
    remain after the router has dropped those that the band and the columns cover. (Keys that an ``attn_mask`` or a
    ``mask_mod`` forbids are found too, and dropped: such masks leave slots empty.)

    Decoding adds each block to its index when the next one begins; `reorder` of a cache, and `crop` into an indexed
    block, build the indices anew.

    Causal: nothing is computed from keys after the query. The keys are taken in blocks of positions; the queries of
    a block search the index of all earlier blocks, and their own block exactly.

    An index that needs training (IVF, PQ) is exact, with every key scored, until it has keys to train on. Not
    causal: at least one key per centroid, else the search stays exact. Causal: ``train_size`` keys, 39 per centroid
    if left out; it is trained once, on the past alone, and then only grows.

    Args:
        index: a string of `faiss.index_factory`, such as ``"Flat"``, ``"IVF256,Flat"`` or ``"HNSW32"``.
        nprobe: lists that a query looks into, for IVF; what faiss says if left out, which is 1.
        ef_search: size of the candidate queue, for HNSW; what faiss says if left out, which is 16.
        train_size: keys to train on; all (not causal), or 39 per centroid (causal), if left out.
        block: key positions of a causal block.

    Raises:
        MissingExtraError: faiss is not installed. ConfigError: the string is none that faiss can build for this head
        dim and inner products, or an option that does not apply to it.
    """

    rebuilds = False

    def __init__(
        self,
        layer: LayerSpec,
        *,
        index: str = "Flat",
        nprobe: int | None = None,
        ef_search: int | None = None,
        train_size: int | None = None,
        block: int = 512,
    ) -> None:
        super().__init__(layer)
        _load_faiss()
        if not isinstance(index, str):
            raise ConfigError(f"faiss: index must be an index_factory string such as 'Flat' or 'HNSW32', got {index!r}")
        optional = {"nprobe": nprobe, "ef_search": ef_search, "train_size": train_size}
        given = {name: value for name, value in optional.items() if value is not None}
        for name, value in {**given, "block": block}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"faiss: {name} must be an integer >= 1, got {value!r}")
        self.recipe = _Recipe(index, layer.head_dim, layer.seed, nprobe, ef_search, train_size)
        self.recipe.check()
        self.block = block

    def propose(self, ctx: RoutingContext) -> Candidates:
        kept = _Kept() if ctx.state is None else ctx.state
        first = kept.blocks * self.block  # the keys before are in the indices
        queries, keys = _as_float32(ctx.q), _as_float32(ctx.shared_k[:, :, first:])
        positions = ctx.positions.cpu().expand(ctx.batch, -1)
        count = min(self.layer.num_neighbors, ctx.num_keys)
        width = count + min(count, self.block) if ctx.causal else count
        found = torch.full((*queries.shape[:3], width), -1, dtype=torch.int32)
        compared: int | None = 0
        group = ctx.graph_heads // keys.shape[1]
        enough = self.recipe.enough_keys if ctx.causal else self.recipe.fewest_keys
        for batch, rows, members in _documents(ctx):
            members = members[members >= first]
            for kv_head in range(keys.shape[1]):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                q = queries[batch, heads][:, rows].flatten(0, 1)  # [g · rows, D]
                k = keys[batch, kv_head, members - first]
                index = _KeyIndex(self.recipe, enough)
                if ctx.decoding:
                    index = kept.indices.setdefault((batch, kv_head), index)
                if ctx.causal:
                    at = positions[batch, rows].repeat(group)
                    result, scored = self._search_past(index, kept.blocks, q, at, k, members, count, width)
                else:
                    index.add(k, members)
                    result, scored = index.search(q, count)
                found[batch, heads, rows] = result.unflatten(0, (group, -1))
                compared = None if compared is None or scored is None else compared + scored
        if ctx.decoding:
            kept.blocks = int(positions.max()) // self.block
        return Candidates(found.to(ctx.device), keys_scored=compared)

    def init_state(self, ctx: RoutingContext) -> _Kept:
        return _Kept()

    def append(self, state: _Kept, ctx: RoutingContext) -> _Kept:
        return state  # keys join when the first query behind their block has come: earlier ones must not find them

    def crop(self, state: _Kept, length: int) -> _Kept | None:
        return state if state.blocks * self.block <= length else None

    def _search_past(
        self, index: _KeyIndex, blocks: int, q: Tensor, at: Tensor, k: Tensor, members: Tensor, count: int, width: int
    ) -> tuple[Tensor, int | None]:
        """Search for each query at position ``at [n]`` the keys ``k [m, D]`` whose positions ``members [m]`` are not
        after it, and those of the first ``blocks`` blocks, which the index holds; it will hold all blocks before that
        of the last query. Returns: int32 ``[n, width]`` and the number of pairs compared."""
        found = torch.full((q.shape[0], width), -1, dtype=torch.int32)
        compared: int | None = 0
        query_block, key_block = at // self.block, members // self.block
        last = int(query_block.max()) if q.shape[0] else -1
        for number in range(blocks, last + 1):
            own = (key_block == number).nonzero()[:, 0]
            rows = (query_block == number).nonzero()[:, 0]
            if rows.numel():
                past, scored = index.search(q[rows], count)
                here, scanned = _scan(q[rows], at[rows], k[own], members[own], count)
                found[rows, :count] = past
                found[rows, count : count + here.shape[1]] = here
                compared = None if compared is None or scored is None else compared + scored + scanned
            if number < last:
                index.add(k[own], members[own])
        return found, compared

    def extra_repr(self) -> str:
        return f"index={self.recipe.factory!r}, block={self.block}"


class _Kept:
    """The indices of a cache, by batch element and KV head: they hold the first ``blocks`` blocks of positions."""

    def __init__(self) -> None:
        self.indices: dict[tuple[int, int], _KeyIndex] = {}
        self.blocks = 0


@dataclass(frozen=True)
class _Recipe:
    """How to build the index of one set of keys."""

    factory: str
    dim: int
    seed: int
    nprobe: int | None
    ef_search: int | None
    train_size: int | None

    def create(self) -> Any:
        """A new, empty index."""
        faiss = _load_faiss()
        try:
            index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise self._invalid(_reason(error)) from error
        for part in _parts(index):
            for owner in (part, getattr(part, "pq", part), getattr(part, "rq", part)):
                if hasattr(owner, "cp"):
                    owner.cp.seed = self.seed % 2**31
                    owner.cp.min_points_per_centroid = 1  # faiss would print a warning to the terminal
            if hasattr(part, "do_polysemous_training"):
                part.do_polysemous_training = False  # ten seconds for a kind of search that nobody asks for here
            if self.nprobe is not None and isinstance(part, faiss.IndexIVF):
                part.nprobe = self.nprobe
            if self.ef_search is not None and hasattr(part, "hnsw"):
                part.hnsw.efSearch = self.ef_search
        return index

    def check(self) -> None:
        """Raise `ConfigError` for what would fail later, or end the process."""
        faiss = _load_faiss()
        index = self.create()
        parts = list(_parts(index))
        for part in parts:
            if isinstance(part, faiss.IndexIVF) and part.nlist < 1:
                raise self._invalid("IVF needs at least one list")
            # The lowest layer has twice as many links as the string says. With fewer than two, adding keys is a crash.
            if hasattr(part, "hnsw") and faiss.vector_to_array(part.hnsw.cum_nneighbor_per_level)[:2].sum() < 4:
                raise self._invalid("HNSW needs at least 2 links")
        if self.nprobe is not None and not any(isinstance(part, faiss.IndexIVF) for part in parts):
            raise ConfigError(f"faiss: nprobe is for IVF indices such as 'IVF64,Flat', index is {self.factory!r}")
        if self.ef_search is not None and not any(hasattr(part, "hnsw") for part in parts):
            raise ConfigError(f"faiss: ef_search is for HNSW indices such as 'HNSW32', index is {self.factory!r}")
        if self.train_size is not None and index.is_trained:
            raise ConfigError(f"faiss: train_size is for indices that are trained, {self.factory!r} is not")
        if self.train_size is not None and self.train_size < self.fewest_keys:
            raise ConfigError(
                f"faiss: index {self.factory!r} needs train_size >= {self.fewest_keys}, got {self.train_size}"
            )
        if index.is_trained and not _is_graph_built_at_once(index):
            self.fill(index, torch.ones((1, self.dim)))

    def fill(self, index: Any, keys: Tensor) -> None:
        """Add keys ``[n, D]`` to an index."""
        with self._steady(index):
            index.add(keys.numpy())

    def train(self, index: Any, keys: Tensor) -> None:
        """Train an index on keys ``[n, D]``, or on ``train_size`` of them that are spread evenly."""
        if self.train_size is not None and self.train_size < keys.shape[0]:
            keys = keys[torch.arange(self.train_size) * keys.shape[0] // self.train_size]
        with self._steady(index):
            index.train(keys.numpy())

    @contextmanager
    def _steady(self, index: Any) -> Iterator[None]:
        """The same result every time, and what faiss raises as a `ConfigError`."""
        faiss = _load_faiss()
        threads = faiss.omp_get_max_threads()
        try:
            if any(hasattr(part, "hnsw") for part in _parts(index)):
                faiss.omp_set_num_threads(1)  # the links depend on the order in which threads insert keys
            yield
        except RuntimeError as error:
            raise self._invalid(_reason(error)) from error
        finally:
            faiss.omp_set_num_threads(threads)

    @property
    def fewest_keys(self) -> int:
        """Keys without which the index cannot be trained or built; 0 = it takes any number."""
        index = self.create()
        if _is_graph_built_at_once(index):
            return max(_SMALLEST_GRAPH, _code_book(index))
        return 0 if index.is_trained else max(self.dim, _code_book(index))

    @property
    def enough_keys(self) -> int:
        """Keys of the past on which a causal index is trained; 0 = it needs no training."""
        index = self.create()
        if _is_graph_built_at_once(index):
            raise ConfigError(f"faiss: index {self.factory!r} cannot grow, which causal attention needs; 'HNSW32' can")
        if index.is_trained:
            return 0
        return self.train_size or max(self.dim, _POINTS_PER_CENTROID * _code_book(index))

    def _invalid(self, reason: str) -> ConfigError:
        return ConfigError(
            f"faiss: index {self.factory!r} does not work for inner products of {self.dim} dimensions: {reason}; "
            f"examples that work: 'Flat', 'IVF64,Flat', 'HNSW32'"
        )


class _KeyIndex:
    """Searchable keys of one document of one head: exact until there are ``enough`` to train on, frozen then."""

    def __init__(self, recipe: _Recipe, enough: int) -> None:
        self.recipe = recipe
        self.enough = enough
        self.exact = enough > 0
        self.index = _load_faiss().IndexFlatIP(recipe.dim) if self.exact else recipe.create()
        self.positions = torch.empty(0, dtype=torch.int32)
        self.waiting: list[Tensor] = []  # keys to train on

    def add(self, keys: Tensor, positions: Tensor) -> None:
        """keys: ``[n, D]``. positions: int32 ``[n]``."""
        if keys.shape[0] == 0:
            return
        self.positions = torch.cat([self.positions, positions])
        if self.exact:
            self.waiting.append(keys)
            if self.positions.numel() >= self.enough:
                keys = torch.cat(self.waiting)
                self.index = self.recipe.create()
                if not self.index.is_trained:
                    self.recipe.train(self.index, keys)
                self.exact, self.waiting = False, []
        self.recipe.fill(self.index, keys)

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, int | None]:
        """Best keys of ``queries [n, D]``: int32 positions ``[n, count]``, -1 = none, and the number of pairs that
        were compared, ``None`` if faiss does not count them."""
        if self.positions.numel() == 0 or queries.shape[0] == 0:
            return torch.full((queries.shape[0], count), -1, dtype=torch.int32), 0
        faiss = _load_faiss()
        faiss.cvar.indexIVF_stats.reset()
        faiss.cvar.hnsw_stats.reset()
        found = torch.from_numpy(self.index.search(queries.numpy(), count)[1])
        positions = torch.where(found < 0, -1, self.positions[found.clamp(min=0)])
        return positions, self._compared(queries.shape[0] * self.positions.numel())

    def _compared(self, pairs: int) -> int | None:
        faiss = _load_faiss()
        for part in _parts(self.index):
            if isinstance(part, faiss.IndexIVF):
                return min(pairs, int(faiss.cvar.indexIVF_stats.ndis))
            if hasattr(part, "hnsw"):  # counts a pair again where a search comes back to it
                return min(pairs, int(faiss.cvar.hnsw_stats.ndis))
            if hasattr(part, "nsg"):
                return None
            if isinstance(part, (faiss.IndexFlatCodes, faiss.IndexFastScan)):
                return pairs
        return None


def _scan(q: Tensor, at: Tensor, k: Tensor, members: Tensor, count: int) -> tuple[Tensor, int]:
    """The ``count`` best of the keys ``k [m, D]`` at positions ``members [m]`` that are not after their query.

    Returns: int32 positions ``[n, min(count, m)]``, -1 = none, and the number of pairs scored.
    """
    keys = k.shape[0]
    best = min(count, keys)
    found = torch.full((q.shape[0], best), -1, dtype=torch.int32)
    pairs = 0
    step = max(1, _SCORES_AT_ONCE // max(1, keys))
    for start in range(0, q.shape[0] if keys else 0, step):
        rows = slice(start, start + step)
        allowed = members <= at[rows, None]
        scores = (q[rows] @ k.T).masked_fill(~allowed, float("-inf"))
        top = scores.topk(best, dim=-1).indices
        found[rows] = torch.where(allowed.gather(1, top), members[top], -1)
        pairs += int(allowed.sum())
    return found, pairs


def _documents(ctx: RoutingContext) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batch element, query rows int64 ``[n]`` and real key positions int32 ``[m]`` of every document."""
    keys = torch.arange(ctx.num_keys, dtype=torch.int32)
    keep = None if ctx.key_keep is None else ctx.key_keep.cpu().expand(ctx.batch, -1)
    segments = None if ctx.segments is None else [ids.cpu().expand(ctx.batch, -1) for ids in ctx.segments]
    for batch in range(ctx.batch):
        real = torch.ones(ctx.num_keys, dtype=torch.bool) if keep is None else keep[batch]
        if segments is None:
            yield batch, torch.arange(ctx.num_queries), keys[real]
            continue
        query_ids, key_ids = segments[0][batch], segments[1][batch]
        for document in query_ids.unique():
            yield batch, (query_ids == document).nonzero()[:, 0], keys[real & (key_ids == document)]


def _as_float32(x: Tensor) -> Tensor:
    """Contiguous float32 on the CPU. Vectors that are not finite become zeros: some indices cannot hold them."""
    x = x.detach().to("cpu", torch.float32)
    return x.masked_fill(~x.isfinite().all(dim=-1, keepdim=True), 0.0).contiguous()


def _parts(index: Any) -> Iterator[Any]:
    """An index and the indices that it consists of, from the outside in."""
    faiss = _load_faiss()
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        yield from _parts(index.index)
    elif isinstance(index, faiss.IndexRefine):
        yield from _parts(index.base_index)
    elif isinstance(index, faiss.IndexIVF):
        yield from _parts(index.quantizer)
    elif hasattr(index, "storage"):
        yield from _parts(index.storage)


def _is_graph_built_at_once(index: Any) -> bool:
    return any(hasattr(part, "nsg") for part in _parts(index))


def _code_book(index: Any) -> int:
    """Size of the largest set of centroids that an index has to train; 1 = none."""
    faiss = _load_faiss()
    untrained = (
        faiss.IndexFlat,
        faiss.IndexScalarQuantizer,
        faiss.IndexHNSW,
        faiss.IndexNSG,
        faiss.IndexIVFFlat,
        faiss.IndexIVFScalarQuantizer,
        faiss.IndexRefine,
    )
    sizes = [1]
    for part in _parts(index):
        if isinstance(part, faiss.IndexIVF):
            sizes.append(part.nlist)
        if isinstance(part, faiss.IndexPreTransform):
            chain = [faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())]
            sizes += [_CODE_BOOK for transform in chain if isinstance(transform, faiss.OPQMatrix)]
        elif hasattr(part, "pq"):
            sizes.append(part.pq.ksub)
        elif hasattr(part, "rq"):
            sizes.append(2 ** int(faiss.vector_to_array(part.rq.nbits).max()))
        elif not isinstance(part, untrained):
            sizes.append(_CODE_BOOK)
    return max(sizes)


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the place in its source."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error).strip(), flags=re.DOTALL)


@functools.cache
def _load_faiss() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's own, on Python 3.12
            return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError(
            f"the source 'faiss' needs faiss: pip install 'ssa-framework[faiss]' ({error})"
        ) from error


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("faiss", FaissIndex)
