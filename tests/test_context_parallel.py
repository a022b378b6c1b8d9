"""Context parallelism on ranks that are threads of one process: results, gradients, bytes and errors."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssa_framework import (
    CachedGraphSparseTransformer,
    SparseAttention,
    SparseTransformer,
    SSAConfig,
    sparse_attention,
)
from ssa_framework.distributed import (
    ContextParallel,
    ContextParallelAttention,
    SequenceLayout,
    context_parallel_attention,
    run_ranks,
)
from ssa_framework.distributed.collectives import pack_bits, unpack_bits
from ssa_framework.distributed.needs import true_places
from ssa_framework.distributed.thread_ranks import ThreadRanks
from ssa_framework.errors import CacheError, ConfigError, DistributedError, GraphError, MaskError, ShapeError, SSAError

EDGES = [[i for i in range(192) for _ in range(3)], [(7 * i + j) % 192 for i in range(192) for j in (0, 50, 101)]]
CLUSTERS = {"levels": [[16, 4], [32, 8]], "keys": 12}
MIXES: dict[str, dict[str, dict[str, Any]]] = {
    "self": {"self": {}},
    "window": {"self": {}, "window": {"size": 5}},
    "wide window": {"window": {"size": 70}},
    "global": {"global": {"tokens": 3}},
    "lsh": {"self": {}, "window": {"size": 4}, "global": {"tokens": 2}, "lsh": {"rounds": 3}},
    "cross-polytope": {"lsh": {"rounds": 2, "hash": "cross_polytope", "probes": 1}},
    "topk": {"topk": {}},
    "faiss": {"self": {}, "faiss": {"block": 16}},
    "blocks": {"self": {}, "blocks": {"size": 8}},
    "blocks, all": {"self": {}, "blocks": {"size": 8, "attend": "all", "keys": 16, "summaries": True}},
    "blocks, mean": {"blocks": {"size": 8, "attend": "all", "rank": "mean", "keys": 16}},
    "clusters": {"window": {"size": 4}, "global": {"tokens": 2}, "clusters": CLUSTERS},
    "clusters, best": {"clusters": {**CLUSTERS, "attend": "topk", "summaries": False}},
    "clusters, best, summaries": {"clusters": {**CLUSTERS, "attend": "topk"}},
    "clusters, lists": {"random": {}, "clusters": {**CLUSTERS, "summaries": False}},
    "clusters and lsh": {"lsh": {"rounds": 2}, "clusters": {**CLUSTERS, "summaries": False}},
    "random": {"random": {"links": 4}},
    "strided": {"self": {}, "strided": {"stride": 7, "count": 3}},
    "edges": {"edges": {"edge_index": EDGES}},
}


@dataclass
class Case:
    """Whole tensors, and what attention over them gives."""

    whole: list[Tensor]
    grad: Tensor
    config: SSAConfig
    masks: dict[str, Tensor]
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        config: SSAConfig,
        length: int = 192,
        packed: bool = False,
        heads: tuple[int, int] = (4, 2),
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Case:
        generator = torch.Generator().manual_seed(length)
        shapes = [(heads[0], 16), (heads[1], 16), (heads[1], 20), (heads[0], 20)]
        q, k, v, grad = (torch.randn((2, h, length, d), generator=generator).to(dtype) for h, d in shapes)
        masks = {}
        if packed:
            documents = torch.stack([torch.arange(length) // 50, torch.arange(length) // 77])
            keep = torch.ones((2, length), dtype=torch.bool)
            keep[0, -7:] = False
            keep[1, 40:43] = False
            masks = {"segment_ids": documents, "key_padding_mask": keep}
        return cls([q, k, v], grad, config, masks, options)

    def alone(self) -> list[Tensor]:
        """Output and gradients of one process."""
        parts = [x.clone().requires_grad_() for x in self.whole]
        out = sparse_attention(*parts, config=self.config, enable_gqa=True, **self.masks, **self.options)
        out.backward(self.grad)
        return [out.detach(), *(x.grad for x in parts if x.grad is not None)]

    def spread(self, ranks: int, layout: Any) -> tuple[list[Tensor], list[Counter[str]]]:
        """Output and gradients of several ranks, put together, and what each of them received."""

        def attend(rank: Any) -> tuple[list[Tensor], Counter[str]]:
            context = ContextParallel(rank, layout)
            parts = [context.shard(x, 2).clone().requires_grad_() for x in self.whole]
            masks = {name: context.shard(x, 1) for name, x in self.masks.items()}
            out = context_parallel_attention(*parts, context, config=self.config, **masks, **self.options)
            out.backward(context.shard(self.grad, 2))
            return [context.unshard(x, 2) for x in (out.detach(), *(x.grad for x in parts))], rank.traffic

        results = run_ranks(ranks, attend)
        return results[0][0], [traffic for _, traffic in results]

    def check(self, ranks: int, layout: Any = None) -> list[Counter[str]]:
        if layout is None:
            layout = "zigzag" if self.config.causal else "contiguous"
        tensors, traffic = self.spread(ranks, layout)
        half = self.whole[0].dtype == torch.bfloat16
        for name, one, many in zip(("out", "q", "k", "v"), self.alone(), tensors, strict=True):
            # gradients of a row are added in another order
            torch.testing.assert_close(
                many, one, rtol=2e-2 if half else 1e-5, atol=3e-2 if half else 2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        return traffic


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("mix", MIXES)
def test_every_source_gives_what_one_process_gives(mix: str, causal: bool, packed: bool) -> None:
    for graph_heads in ("query", "kv"):
        config = SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=causal, graph_heads=graph_heads)
        Case.of(config, packed=packed).check(ranks=4)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_number_of_ranks(ranks: int, layout: str) -> None:
    for mix in ("lsh", "clusters"):
        Case.of(SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=True), length=48 * ranks).check(ranks, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_dtypes(dtype: torch.dtype) -> None:
    for mix in ("lsh", "clusters"):
        Case.of(SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=True), dtype=dtype).check(2)


@pytest.mark.parametrize("dense_below", [0, 1000], ids=["never dense", "dense"])
def test_dense_attention_and_small_sequences(dense_below: int) -> None:
    for mix in ("topk", "clusters", "lsh"):
        config = SSAConfig(sources=MIXES[mix], num_neighbors=64, causal=True, dense_below=dense_below)
        Case.of(config, length=64, packed=True).check(2)
        Case.of(config.replace(causal=False), length=32).check(4)


@pytest.mark.parametrize(("batch", "length"), [(0, 64), (1, 0)], ids=["no batch element", "no token"])
def test_nothing_to_attend(batch: int, length: int) -> None:
    x = torch.zeros((batch, 2, length // 2, 8))
    for mix in ("topk", "clusters", "window"):
        config = SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=True)
        for out in run_ranks(
            2, lambda r, c=config: context_parallel_attention(x, x, x, ContextParallel(r, "zigzag"), config=c)
        ):
            assert out.shape == x.shape


def test_mask_mod_sees_positions_of_the_whole_sequence() -> None:
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key < 100) & ((key + h + b) % 3 > 0)

    for mix in ("lsh", "window"):
        Case.of(SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=True), mask_mod=mask_mod).check(4)


def test_edges_of_the_call_are_numbered_by_position() -> None:
    config = SSAConfig(sources={"edges": {}}, num_neighbors=24)
    Case.of(config, source_inputs={"edges": torch.tensor(EDGES)}).check(4)


@settings(max_examples=12, deadline=None)
@example(ranks=2, pieces=4, cuts=[1], mix="clusters", causal=False)  # no rank has a full segment to cluster
@given(
    ranks=st.integers(1, 5), pieces=st.integers(1, 9), cuts=st.lists(st.integers(1, 40), max_size=4),
    mix=st.sampled_from(["lsh", "clusters", "window"]), causal=st.booleans(),
)  # fmt: skip
def test_any_documents(ranks: int, pieces: int, cuts: list[int], mix: str, causal: bool) -> None:
    case = Case.of(SSAConfig(sources=MIXES[mix], num_neighbors=12, causal=causal), length=2 * ranks * pieces)
    length = case.whole[0].shape[2]
    case.masks = {"segment_ids": torch.bucketize(torch.arange(length), torch.tensor(sorted(cuts)), right=True)[None]}
    case.check(ranks)


# -- what is communicated ---------------------------------------------------------------------------------------------


def received(traffic: Counter[str], purpose: str) -> int:
    return sum(count for name, count in traffic.items() if name == purpose)


def test_a_window_receives_its_neighborhood_alone() -> None:
    traffic = Case.of(SSAConfig(sources={"window": {"size": 5}}, causal=True), length=800).check(4)
    row = 2 * 2 * (16 + 20) * 4  # batch, heads, key and value, float32
    # each of two pieces wants the five keys before it; the first piece of all has none, and the two pieces of the last
    # rank stand side by side
    assert [received(t, "keys and values") for t in traffic] == [5 * row, 10 * row, 10 * row, 5 * row]


def test_documents_of_other_ranks_are_not_received() -> None:
    case = Case.of(SSAConfig(sources={"topk": {}}, num_neighbors=300), length=256)
    case.masks = {"segment_ids": torch.arange(256)[None] // 64}
    for traffic in case.check(4, "contiguous"):
        assert received(traffic, "keys for routing") == received(traffic, "values") == 0


def test_keys_that_routing_gathered_are_not_fetched_again() -> None:
    traffic = Case.of(SSAConfig(sources={"topk": {}}, num_neighbors=8, causal=True)).check(4)
    for one in traffic:
        assert received(one, "keys and values") == 0
        assert 0 < received(one, "values") <= 2 * 2 * 144 * 20 * 4
        assert received(one, "keys for routing") <= 2 * 2 * 144 * 16 * 4


def test_causal_routing_receives_no_later_keys() -> None:
    traffic = Case.of(SSAConfig(sources={"topk": {}}, num_neighbors=8, causal=True), length=160).check(4)
    row = 2 * 2 * 16 * 4
    # rank r ends with piece 7 - r of eight: it reads the 8 - r pieces up to there, of which two are its own
    assert [received(t, "keys for routing") for t in traffic] == [(8 - r - 2) * 20 * row for r in range(4)]


def test_clusters_are_made_once_and_their_keys_stay_where_they_are() -> None:
    config = SSAConfig(sources={"clusters": {"levels": [[16, 4]], "keys": 8}}, num_neighbors=8, causal=True)
    for one in Case.of(config, length=256).check(4):  # pieces of two segments
        assert received(one, "keys for routing") == 0
        assert received(one, "clusters for routing") > 0


READING = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select"}
VIEWS = {
    "alias", "as_strided", "detach", "empty", "expand", "new_empty", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """How many there are in `ssa_framework.distributed`, and how often the host waits for what a device computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, where = function.overloadpacket.__name__, self._caller()
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        # kernels and checks of proposals read on a CPU only
        self.waits += (name in READING or by_mask) and "/ops/" not in where and "proposals" not in where
        self.count += name not in VIEWS and "/distributed/" in where and "thread_ranks" not in where
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _caller() -> str:
        frame = sys._getframe(2)
        while frame is not None and not re.search(r"ssa_(framework|plugins)/", frame.f_code.co_filename):
            frame = frame.f_back
        return frame.f_code.co_filename if frame else ""


class Lists(TorchFunctionMode):
    """How often a tensor becomes a list, which waits for a device and is not dispatched on a CPU."""

    waits = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function is Tensor.tolist
        return function(*args, **(kwargs or {}))


class CountedRanks(ThreadRanks):
    """Ranks that count their exchanges."""

    @cached_property
    def exchanges(self) -> list[str]:
        return []

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        self.exchanges.append(purpose)
        return super().all_gather(x, purpose)

    def all_to_all(self, x: Tensor, send: Any, receive: Any, purpose: str) -> Tensor:
        self.exchanges.append(purpose)
        return super().all_to_all(x, send, receive, purpose)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("mix", "waits", "exchanges", "launches"),
    [("window", 2, 3, 55), ("lsh", 3, 4, 97), ("blocks, all", 4, 9, 275), ("clusters", 4, 9, 330)],
    ids=["window", "lsh", "one level", "two levels"],
)
def test_a_call_takes_few_launches_and_waits(mix: str, waits: int, exchanges: int, launches: int, ranks: int) -> None:
    """Where a GPU is done soon, the host decides how long a call takes: with every launch, with every exchange, and
    with every wait for the device, which then has nothing to do until the next launch.

    Waits: one for the digests, one for the rows of each table whose size depends on what was computed (keys that
    routing gathers or clusters, centroids), and one for keys, values and sums that were selected. Neither they nor
    exchanges may depend on the number of levels or ranks; every level takes some 50 launches.
    """
    case = Case.of(SSAConfig(sources=MIXES[mix], num_neighbors=24, causal=True, graph_heads="kv"))

    def attend(rank: ThreadRanks) -> tuple[int, int, int]:
        for _ in range(2):  # the first call makes what is kept for others
            counted = CountedRanks(None, rank.rank, rank.size, mailbox=rank.mailbox)
            context = ContextParallel(counted, "zigzag")
            parts = [context.shard(x, 2) for x in case.whole]
            with torch.no_grad(), Launches() as steps, Lists() as lists:
                context_parallel_attention(*parts, context, config=case.config)
        return steps.waits + lists.waits, len(counted.exchanges), steps.count

    for found in run_ranks(ranks, attend):
        assert found[:2] == (waits, exchanges)
        assert found[2] <= launches


# -- modules ----------------------------------------------------------------------------------------------------------


def on_ranks(ranks: int, function: Any) -> list[Any]:
    """Run ``function(parallel, context)`` on ranks; ``parallel`` makes a module context parallel."""

    def run(rank: Any) -> Any:
        context = ContextParallel(rank, "zigzag")

        def parallel(model: torch.nn.Module) -> torch.nn.Module:
            for layer in model.modules():
                if isinstance(layer, SparseAttention):
                    layer.__class__ = ContextParallelAttention
                    layer.context = context
            return model

        return function(parallel, context)

    return run_ranks(ranks, run)


def small_config(**changes: Any) -> SSAConfig:
    options = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_neighbors": 12, "causal": True}
    return SSAConfig(**(options | {"window_size": 3, "num_hash_rounds": 2, "rope_base": 10000.0} | changes))


@pytest.mark.parametrize("kind", [SparseTransformer, CachedGraphSparseTransformer], ids=["layers", "cached graph"])
def test_a_transformer_with_rotary_positions(kind: type[SparseTransformer]) -> None:
    torch.manual_seed(0)
    model = kind(small_config(), num_layers=2, vocab_size=30)
    tokens = torch.randint(30, (2, 96))
    out, _ = model(tokens)
    out.square().sum().backward()
    state = model.state_dict()

    def train(parallel: Any, context: ContextParallel) -> tuple[Tensor, dict[str, Tensor]]:
        one = kind(small_config(), num_layers=2, vocab_size=30)
        one.load_state_dict(state)
        parallel(one)
        mine, stats = one(context.shard(tokens), return_stats=True)
        assert stats[0]["neighbors_shape"][:3] == (2, 4, 24)
        mine.square().sum().backward()
        return context.unshard(mine.detach()), {name: p.grad for name, p in one.named_parameters()}

    results = on_ranks(4, train)
    torch.testing.assert_close(results[0][0], out.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        total = sum(grads[name] for _, grads in results)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_copies_and_autocast() -> None:
    layer = SparseAttention(small_config())
    x = torch.randn(1, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, _ = layer(x)

    def attend(parallel: Any, context: ContextParallel) -> Tensor:
        one = copy.deepcopy(layer)
        again = copy.deepcopy(parallel(one))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return context.unshard(again(context.shard(x))[0].detach())

    for out in on_ranks(2, attend):
        torch.testing.assert_close(out, wanted.detach(), rtol=2e-2, atol=2e-2)


def test_activation_checkpointing_repeats_the_exchange() -> None:
    layer = SparseAttention(small_config())
    x = torch.randn(1, 64, 32)

    def grads(parallel: Any, context: ContextParallel) -> list[Tensor]:
        found = []
        for again in (False, True):
            one = SparseAttention(small_config())
            one.load_state_dict(layer.state_dict())
            parallel(one)
            mine = context.shard(x).requires_grad_()
            if again:
                out = torch.utils.checkpoint.checkpoint(lambda y, one=one: one(y)[0], mine, use_reentrant=False)
            else:
                out = one(mine)[0]
            out.square().sum().backward()
            found.append(one.Wk.weight.grad)
        return found

    for plain, repeated in on_ranks(2, grads):
        assert torch.equal(plain, repeated)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_ranks_with_other_configurations_are_told_what_differs() -> None:
    case = Case.of(SSAConfig(num_neighbors=24, causal=True))

    def attend(rank: Any) -> None:
        context = ContextParallel(rank, "zigzag")
        config = case.config.replace(num_neighbors=24 + 8 * (rank.rank == 2))
        with pytest.raises(DistributedError, match=r"config\.num_neighbors is 24 on rank 0 and 32 on rank 2"):
            context_parallel_attention(*(context.shard(x, 2) for x in case.whole), context, config=config)

    run_ranks(4, attend)


def test_ranks_with_other_shapes_are_told_what_differs() -> None:
    case = Case.of(SSAConfig(num_neighbors=24, causal=True))

    def attend(rank: Any) -> None:
        context = ContextParallel(rank, "zigzag")
        parts = [context.shard(x, 2)[:, :, 2 * rank.rank :] for x in case.whole]
        with pytest.raises(
            DistributedError, match=r"local queries .* is \[2, 4, 96, 16\] on rank 0 and \[2, 4, 94, 16"
        ):
            context_parallel_attention(*parts, context, config=case.config)

    run_ranks(2, attend)


def test_an_error_of_one_rank_does_not_leave_the_others_waiting() -> None:
    def attend(rank: Any) -> None:
        if rank.rank == 1:
            raise ZeroDivisionError("mine")
        x = torch.randn(1, 2, 8, 4)
        with pytest.raises(DistributedError, match=r"rank 0 could not exchange digests .* another rank stopped"):
            context_parallel_attention(x, x, x, ContextParallel(rank, "zigzag"))

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_ranks(2, attend)


def test_lengths_without_equal_pieces_name_the_next_one() -> None:
    with pytest.raises(ShapeError, match=r"1001 tokens has no 8 equal pieces .* pad it to 1008"):
        SequenceLayout(1001, 4, "zigzag")
    with pytest.raises(ConfigError, match=r"'zigzag' or 'contiguous', got 'striped'"):
        SequenceLayout(8, 2, "striped")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is not initialised; start the program with torchrun"):
        ContextParallel.over(None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer, x: layer(x, key_value=x), ConfigError, "self-attention"),
        (lambda layer, x: layer(x, cache=object()), CacheError, "has no cache"),
        (lambda layer, x: layer(x, attention_mask=torch.zeros(2, 1, 8, 8)), MaskError, "padding of this rank's tokens"),
        (lambda layer, x: layer(x, segment_ids=torch.zeros(2, 9, dtype=torch.long)), ShapeError, "N / W"),
        (lambda layer, x: layer(x, graph=object()), GraphError, "a ShardGraph"),
    ],
    ids=["cross", "cache", "attn_mask", "segments", "graph"],
)
def test_what_a_spread_layer_does_not_serve(call: Any, error: type[SSAError], message: str) -> None:
    def attend(parallel: Any, context: ContextParallel) -> None:
        with pytest.raises(error, match=message):
            call(parallel(SparseAttention(small_config())), torch.randn(2, 8, 32))

    on_ranks(1, attend)


@given(bits=st.lists(st.booleans(), max_size=50))
def test_packed_bits(bits: list[bool]) -> None:
    x = torch.tensor(bits, dtype=torch.bool)
    assert pack_bits(x).numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(pack_bits(x), len(bits)), x)


@given(mask=st.lists(st.booleans(), max_size=50))
def test_true_places_are_those_of_nonzero(mask: list[bool]) -> None:
    x = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(true_places(x.cumsum(0, dtype=torch.int32), sum(mask)), x.nonzero()[:, 0])


@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_layouts_share_out_every_position(name: Any, ranks: int) -> None:
    layout = SequenceLayout(12 * ranks, ranks, name)
    whole = torch.arange(layout.length)
    parts = [layout.shard(whole, rank, 0) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, layout.positions(rank))
        assert bool((layout.rank_of(part) == rank).all())
    assert torch.equal(layout.in_order(torch.cat(parts), 0), whole)
    assert torch.equal(layout.by_rank(whole.expand(2, -1)), torch.stack(parts)[:, None].expand(-1, 2, -1))
    work = [int((layout.positions(rank) + 1).sum()) for rank in range(ranks)]
    assert name == "contiguous" or len(set(work)) == 1, "every rank has as many keys before its queries"
