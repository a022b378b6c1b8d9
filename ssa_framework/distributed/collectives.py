"""The few collectives that are used, with clear errors, and a count of the bytes that they move."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ssa_framework.errors import ConfigError, DistributedError

_counters: list[Traffic] = []
# newer versions of torch have another name for it, and warn of this one
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """Bytes that this rank received from other ranks, by purpose; see `count_traffic`."""

    received: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.received.values())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what context parallel attention receives from other ranks while the context is open::

        with count_traffic() as traffic:
            loss = model(tokens)[0].mean()
            loss.backward()
        print(traffic.received, traffic.total)

    Only what this package communicates is counted, not what DDP, FSDP or tensor parallelism do.
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


@dataclass(frozen=True)
class Ranks:
    """A process group, and this process in it."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: DeviceMesh | dist.ProcessGroup | None) -> Ranks:
        """The ranks of a mesh of one dimension, of a group, or of all processes.

        Raises:
            ConfigError: torch.distributed was not initialised, a mesh of several dimensions, or a group that this
            process is not in.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialised; start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ConfigError(
                    f"a mesh of one dimension is needed, got dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}; "
                    f"name one: mesh['cp']"
                )
            mesh = mesh.get_group()
        group = dist.group.WORLD if mesh is None else mesh
        rank = dist.get_rank(group)
        if rank < 0 or group is None:
            raise ConfigError("this process is not in the given group")
        return cls(group, rank, dist.get_world_size(group))

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copy of a model is in the same group

    # -- collectives -------------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """``x`` of every rank, ``[W, *x.shape]``; shapes must agree."""
        wire = _bytes(x)
        out = wire.new_empty(self.size * wire.numel())
        with self._clear_errors(purpose):
            _all_gather(out, wire, group=self.group)
        self._count(purpose, out.numel() - wire.numel())
        return out.view(x.dtype).view(self.size, *x.shape)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str) -> Tensor:
        """Rows of ``x [sum(send), ...]``, ``send[r]`` of them for rank r → ``[sum(receive), ...]``."""
        row = math.prod(x.shape[1:]) * x.element_size()
        wire = _bytes(x)
        out = wire.new_empty(sum(receive) * row)
        with self._clear_errors(purpose):
            dist.all_to_all_single(out, wire, [n * row for n in receive], [n * row for n in send], group=self.group)
        self._count(purpose, out.numel() - receive[self.rank] * row)
        return out.view(x.dtype).view(sum(receive), *x.shape[1:])

    def all_gather_rows(self, x: Tensor, counts: Sequence[int], purpose: str) -> Tensor:
        """``x [counts[r], ...]`` of every rank r, one after the other."""
        return self.all_to_all(torch.cat([x] * self.size), [len(x)] * self.size, counts, purpose)

    def texts(self, text: str, purpose: str) -> list[str]:
        """A text of every rank."""
        device = self.device
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        lengths = self.all_gather(torch.tensor([mine.numel()], device=device), purpose).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
        padded[: mine.numel()] = mine
        rows = self.all_gather(padded, purpose).cpu()
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where tensors of this group's collectives must lie."""
        types = {device.type for device in getattr(self.group, "_device_types", ())}
        if "cuda" in types and "cpu" not in types:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _count(self, purpose: str, received: int) -> None:
        for counter in _counters:
            counter.received[purpose] += received

    @contextmanager
    def _clear_errors(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's own distributed errors are RuntimeErrors too
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DistributedError(
                f"rank {self.rank} of {self.size} could not exchange {purpose}: another rank died, stopped with an "
                f"error of its own, or did not answer within the timeout of the process group; look at the first "
                f"error of the other ranks ({first})"
            ) from error


def _bytes(x: Tensor) -> Tensor:
    """The memory of ``x`` as ``uint8 [bytes]``; every backend moves bytes."""
    return x.detach().contiguous().view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def pack_bits(x: Tensor) -> Tensor:
    """bool ``[.., n]`` → uint8 ``[.., ceil(n / 8)]``."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded * _values_of_bits(x.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: bool ``[.., count]``."""
    return (bits[..., None] & _values_of_bits(bits.device)).bool().flatten(-2)[..., :count]


@functools.lru_cache(maxsize=16)
def _values_of_bits(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def on_host(counts: Sequence[Tensor]) -> list[list[int]]:
    """Integer tensors as flat lists. All are read at once, since the host waits for the device with each reading."""
    numbers = iter(torch.cat([x.flatten() for x in counts]).tolist())
    return [list(itertools.islice(numbers, x.numel())) for x in counts]


def as_json_value(value: Any) -> Any:
    """``value`` in a form that JSON can hold and that compares by content."""
    if isinstance(value, dict):
        return {str(name): as_json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json_value(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
