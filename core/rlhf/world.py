"""The ranks of a run, to each other: sums, maxima, what each of them has. Nothing is pickled: values travel as JSON and
tensors.

Sums are of float64, so that they are the same to rounding however many ranks there are. Every meeting has a deadline,
and whoever waits in vain says who is missing, and where that rank was last.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous as _rendezvous

from rlhf.checkpoint import from_json, to_json
from rlhf.errors import RankLost
from rlhf.place import Place


class World:
    """The ranks of the run, for components that need global statistics. This one is a single process.

    Every rank must call the same methods in the same order: each call waits for all.
    """

    rank: int = 0
    size: int = 1
    now: str = ""
    """What this rank is doing, for messages: "step 3, update"."""
    seconds: float = 0.0
    """Spent waiting for other ranks and moving data since it was last set to 0."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, of x's shape and dtype; every rank gets the same. Computed in float64 (integers: int64)."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest over ranks, of each element."""
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank: nested dicts and lists of JSON values and tensors. A tuple becomes a list."""
        return [value]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """One rank's value, of the same sort."""
        return value

    def barrier(self) -> None:
        """Wait for every rank."""

    @contextlib.contextmanager
    def meeting(self, name: str, timed: bool = True) -> Iterator[None]:
        """Around a backend's own collectives: counts their time, and tells who is missing where they fail.

        Args:
            timed: False where most of what happens inside is work, of which the waiting can't be told apart.

        Raises:
            RankLost: a rank is late or gone; names it.
        """
        yield

    def close(self) -> None:
        """Leave the others."""


ALONE = World()
"""A process without others."""


class Ranks(World):
    """Processes that meet by `torch.distributed`, over gloo, wherever their gradients go."""

    def __init__(self, place: Place, group: Any, store: Any, deadline: float) -> None:
        self.rank, self.size = place.rank, place.size
        self._group, self._store, self._deadline = group, store, deadline
        self._meetings = 0

    def sum(self, x: Tensor) -> Tensor:
        wide = x.detach().cpu().to(torch.float64 if x.dtype.is_floating_point else torch.int64, copy=True)
        return self._reduced("sum", wide, torch.distributed.ReduceOp.SUM).to(x.device, x.dtype)

    def max(self, x: Tensor) -> Tensor:
        own = x.detach().cpu().to(torch.uint8 if x.dtype == torch.bool else x.dtype, copy=True)
        return self._reduced("max", own, torch.distributed.ReduceOp.MAX).to(x.device, x.dtype)

    def gather(self, value: Any) -> list[Any]:
        with self.meeting("gather"):
            sent = _to_bytes(value)
            sizes = self._all(torch.tensor([len(sent)]))
            most = int(torch.cat(sizes).max())
            padded = torch.nn.functional.pad(sent, (0, most - len(sent)))
            return [_from_bytes(part[: int(size)]) for part, size in zip(self._all(padded), sizes, strict=True)]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        with self.meeting("broadcast"):
            sent = _to_bytes(value) if self.rank == source else torch.zeros(0, dtype=torch.uint8)
            size = torch.tensor([len(sent)])
            torch.distributed.broadcast(size, group=self._group, group_src=source)
            buffer = sent if self.rank == source else torch.zeros(int(size), dtype=torch.uint8)
            torch.distributed.broadcast(buffer, group=self._group, group_src=source)
            return _from_bytes(buffer)

    def barrier(self) -> None:
        self._reduced("barrier", torch.zeros(1), torch.distributed.ReduceOp.SUM)

    def close(self) -> None:
        global _store
        _store = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def meeting(self, name: str, timed: bool = True) -> Iterator[None]:
        self._meetings += 1
        start = time.perf_counter()
        try:
            self._store.set(f"at/{self.rank}", f"{self._meetings} {name}|{self.now}")
            yield
        except RuntimeError as error:  # what torch raises, whatever the transport
            if isinstance(error, RankLost) or not (timed or _of_transport(error)):
                raise
            raise self._lost(name, error) from error
        finally:
            self.seconds += (time.perf_counter() - start) * timed

    def _reduced(self, name: str, x: Tensor, how: Any) -> Tensor:
        with self.meeting(name):
            torch.distributed.all_reduce(x, op=how, group=self._group)
        return x

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x, group=self._group)
        return parts

    def _lost(self, name: str, error: RuntimeError) -> RankLost:
        late, gone = [], False
        try:
            for rank in range(self.size):
                if rank == self.rank:
                    continue
                key = f"at/{rank}"
                text = self._store.get(key).decode() if self._store.check([key]) else "0 |the start"
                count, _, last = text.partition(" ")
                if int(count) < self._meetings:
                    late.append(f"rank {rank} (last at {' of '.join(filter(None, last.split('|')))})")
        except RuntimeError:  # rank 0, which keeps the store, is gone
            late, gone = ["rank 0"], True
        where = f"{name} of {self.now}" if self.now else name
        waited = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        if waited and late and not gone:
            return RankLost(f"{', '.join(late)} did not arrive at {where} within {self._deadline:g} s")
        who = ", ".join(late) or "another rank"
        return RankLost(f"lost contact with {who} at {where}: {' '.join(str(error).split())[:300]}")


def _of_transport(error: RuntimeError) -> bool:
    """Whether ranks lost each other, in what is work too and may fail otherwise."""
    names = ("gloo", "nccl", "connection", "timed out")
    return isinstance(error, torch.distributed.DistError) or any(name in str(error).lower() for name in names)


_store: Any = None


def rendezvous(place: Place, deadline: float) -> Any:
    """The store that the ranks meet in; the first call waits for all of them.

    Raises:
        RankLost: they didn't come.
    """
    global _store
    if _store is None:
        try:
            address = f"tcp://{place.address}:{place.port}"
            if place.source == "Slurm":
                found = _rendezvous(
                    f"{address}?rank={place.rank}&world_size={place.size}", timeout=timedelta(seconds=deadline)
                )
            else:  # by the environment: torchrun's agent may keep the store
                found = _rendezvous("env://", timeout=timedelta(seconds=deadline))
            _store = next(iter(found))[0]
        except (RuntimeError, ValueError) as error:
            what = f"the {place.size} ranks did not meet at {place.address}:{place.port} within {deadline:g} s"
            raise RankLost(f"{what}: {error}") from error
    return _store


def join(place: Place, backend: str, deadline: float) -> World:
    """Meet the other ranks.

    Args:
        backend: of the default process group, which a parallel backend moves gradients by: "gloo", "nccl".
        deadline: seconds that a rank may be late for anything.

    Raises:
        RankLost: they didn't come.
    """
    if place.size == 1:
        return World()
    store = rendezvous(place, deadline)
    wait = timedelta(seconds=deadline)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=wait,
        )
    group = torch.distributed.new_group(backend="gloo", timeout=wait)  # of its own, so that it can't mix with gradients
    return Ranks(place, group, PrefixStore("world", store), deadline)


def _to_bytes(value: Any) -> Tensor:
    """uint8 [n]: the length of the JSON, the JSON, then the tensors."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(to_json(value, "", tensors)).encode()
    return torch.frombuffer(
        bytearray(len(text).to_bytes(8, "big") + text + save_tensors(_own(tensors))), dtype=torch.uint8
    )


def _from_bytes(sent: Tensor) -> Any:
    content = sent.numpy().tobytes()
    end = 8 + int.from_bytes(content[:8], "big")
    return from_json(json.loads(content[8:end]), load_tensors(content[end:]))


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}  # the format refuses shared memory
