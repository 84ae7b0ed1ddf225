"""By what way weights go to a vLLM in another process, from this side: each a bucket at a time, so that no second whole
model is held for it."""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlhf.api import RunError
from rlhf_plugins.engines.vllm import group, ipc, wire
from rlhf_plugins.engines.vllm.buckets import SharedFolder, buckets, to_bytes
from rlhf_plugins.engines.vllm.packing import Buffer, written
from rlhf_plugins.engines.vllm.sampler import EngineLost

if TYPE_CHECKING:
    from rlhf_plugins.engines.vllm.remote import Server


_LEAVING = 6.0
"""Seconds in which all workers have seen that a group is over, and its load says why."""


class Refused(Exception):  # noqa: N818 - an answer
    """A way isn't open between these two processes; says why."""


class Carrier(Protocol):
    """A way that is open."""

    name: str
    fetched: bool
    """What is sent is where the workers find weights; else it is the weights."""
    meeting: str
    """Of the workers with this process; empty where there is none."""

    def send(self, server: Server, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        """Send them; how many tensors each bucket has.

        Raises:
            EngineLost: the other side is gone, or late.
        """

    def close(self) -> None:
        """Leave nothing behind."""


class Host:
    """By way of this host's memory: files of shared memory where the other sees them, else bodies of requests."""

    fetched = False
    meeting = ""

    def __init__(self, server: Server) -> None:
        self._folder = _shared_folder(server)
        self.name = "shared-memory" if self._folder is not None else "bodies"

    def send(self, server: Server, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        for bucket in buckets(weights):
            path = self._folder.write(bucket) if self._folder else None
            what = f"{len(bucket)} tensors to be taken"
            if path is not None:
                server.ask("/load/file", wire.Bucket(load, str(path)), wire.Done, what)
            else:
                server.ask("/load/body", to_bytes(bucket), wire.Done, what, headers={"X-Load": load})
            yield len(bucket)

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder = None


def _shared_folder(server: Server) -> SharedFolder | None:
    """One that the other has shown to see."""
    if not os.path.isdir(wire.SHARED_MEMORY):
        return None
    folder = SharedFolder()
    content = _text()
    probe = folder.probe(content)
    try:
        seen = server.ask("/shared", wire.Shared(str(probe), content), wire.Seen, "a look at a file", seconds=30.0)
    except BaseException:
        folder.close()
        raise
    if seen.shared:
        return folder
    folder.close()
    return None


class SameGPU:
    """Through the memory of a GPU that both have: see `ipc`."""

    name = "cuda-ipc"
    fetched = True
    meeting = ""

    def __init__(self, server: Server, device: str) -> None:
        """
        Raises:
            Refused: the other can't open that memory.
        """
        self._device = device
        content = _text()
        try:
            buffer = written(torch.empty(len(content), dtype=torch.uint8, device=device), content)
            probe = ipc.Probe(ipc.exported(buffer), content)
        except RuntimeError as error:  # not every system and driver lets memory be shared
            raise Refused(f"this GPU's memory can't be shared: {' '.join(str(error).split())[:200]}") from error
        if not server.ask("/shared/gpu", probe, wire.Seen, "a look at a GPU's memory", seconds=60.0).shared:
            raise Refused("it can't open this GPU's memory")

    def send(self, server: Server, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        buffer = Buffer(self._device)
        shown: tuple[Tensor, ipc.Handle] | None = None
        for laid, places in buffer.buckets(weights):
            if shown is None or shown[0] is not buffer.whole:
                shown = buffer.whole, ipc.exported(buffer.whole)
            ipc.settled(laid)
            server.ask("/load/gpu", ipc.Laid(load, shown[1], places), wire.Done, f"{len(places)} tensors to be copied")
            yield len(places)

    def close(self) -> None:
        pass


class Broadcast:
    """To all workers at once, from this process's device to theirs: see `group`."""

    name = "broadcast"
    fetched = True

    def __init__(self, server: Server, device: str) -> None:
        """
        Raises:
            Refused: they didn't meet.
            EngineLost: its workers are still at it.
        """
        self._device = device
        backend: group.Backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        seconds, content = server.deadlines.load, _text()
        try:
            met = server.ask("/group", group.Join(backend, seconds), group.Meeting, "its workers to be free")
        except EngineLost:
            raise
        except RunError as error:
            raise Refused(str(error)) from error
        self.meeting = met.name
        at = group.Address(server.host, met.port, met.key, met.workers + 1, backend, seconds)
        self._group: group.Group | None = None
        why = ""
        try:
            self._group = group.Group(at, 0, torch.device(device), content)
            text = group.Text(met.name, content)
            what = f"{met.workers} workers to meet"
            if not server.ask("/group/text", text, wire.Seen, what, seconds=2 * group.JOIN).shared:
                why = "what was broadcast didn't arrive"
        except EngineLost:
            self.close()
            raise
        except (OSError, RunError) as error:
            why = f"its workers and this process didn't meet: {error}"
        if why:
            self.close()
            leave, what = group.Leave(met.name), "workers to leave a meeting"
            theirs = server.ask("/group/leave", leave, wire.Refusal, what, seconds=3 * group.JOIN).error
            raise Refused(f"its workers and this process didn't meet: {theirs}" if theirs else why)

    def send(self, server: Server, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        for laid, places in Buffer(self._device).buckets(weights):
            what = f"{len(places)} tensors to be broadcast"
            server.ask("/load/broadcast", group.Coming(load, places), wire.Done, what)
            assert self._group is not None
            try:
                self._group.broadcast(laid, look=functools.partial(server.check, load, what))
            except OSError as error:
                if not isinstance(error, TimeoutError):
                    self._ask_why(server, load, what)
                server.lost(what, server.deadlines.load, error)
            yield len(places)

    def _ask_why(self, server: Server, load: str, what: str) -> None:
        """Who left says why; others who waited with it must have left, too.

        Raises:
            RunError, EngineLost: that is why.
        """
        end = time.monotonic() + _LEAVING
        while time.monotonic() < end:
            server.check(load, what)
            time.sleep(0.1)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()


def _text() -> str:
    return secrets.token_hex(wire.TEXT // 2)


def opened(server: Server, name: str, device: str) -> Carrier:
    """The way of that name.

    Args:
        name: "host", "cuda-ipc" or "broadcast".
        device: of this process, where the weights come from.

    Raises:
        Refused: it isn't open between these two.
    """
    if name == "cuda-ipc":
        return SameGPU(server, device)
    return Broadcast(server, device) if name == "broadcast" else Host(server)
