"""Weights on their way to all workers of an engine at once: broadcast by a process group of the trainer's rank 0 and of
these workers alone (NCCL between GPUs, gloo between CPUs). **Not run with NCCL yet.**

It is none of the groups that torch or vLLM keep for themselves, so either side may have others. They find each other at
a store that the engine's side holds, at the address where it listens anyway. What goes over the network then is no
secret, and nobody proves who he is: this is for hosts that trust theirs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import attrs
import torch
import torch.distributed
from torch import Tensor

from rlhf_plugins.engines.vllm import wire
from rlhf_plugins.engines.vllm.packing import Place, text_of, written

dist: Any = torch.distributed  # which doesn't name its stores and groups to a type checker
JOIN = 60.0
"""Seconds for all to meet, and for a first text to arrive."""
_ABORT = 10.0
"""Seconds for NCCL to let go of a group."""
_LOOK = 2.0
"""Seconds between two looks at whether the others are still at it."""
_POLL = 2e-4
"""Seconds between two looks at whether a broadcast is done: of a bucket it takes 10 ms or more."""

Backend = Literal["gloo", "nccl"]
T = TypeVar("T")


@attrs.frozen
class Join:
    """Workers are to meet the trainer."""

    backend: Backend
    seconds: float
    """That a broadcast may take."""


@attrs.frozen
class Meeting:
    """Where, and under what name."""

    name: str
    port: int
    key: str
    workers: int


@attrs.frozen
class Text:
    """Did it arrive at every worker of this meeting?"""

    meeting: str
    content: str


@attrs.frozen
class Leave:
    """The meeting is over."""

    meeting: str


@attrs.frozen
class Coming:
    """Some of the weights, which are broadcast next."""

    load: str
    places: tuple[Place, ...]


@attrs.frozen
class Address:
    """What one must know to join."""

    host: str
    port: int
    key: str
    size: int
    """Workers, and the trainer."""
    backend: Backend
    seconds: float
    """That a broadcast may take."""


class Store:
    """Where those who join find each other. Listens at one address."""

    def __init__(self, host: str) -> None:
        """
        Args:
            host: the address at which the trainer reaches this host.

        Raises:
            OSError: nothing can listen there.
        """
        with socket.create_server((host, 0)) as found:
            self.port: int = found.getsockname()[1]
            listener = found.detach()
        self.host = host
        self.over = False
        self.key = secrets.token_hex(16)
        self._store = dist.TCPStore(
            self.host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener, use_libuv=False
        )

    def end(self) -> None:
        """Tell those who wait that nobody comes, and nothing."""
        self.over = True
        dist.PrefixStore(self.key, self._store).set("over", "")


class Group:
    """One that has joined."""

    def __init__(self, at: Address, rank: int, device: torch.device, text: str = "") -> None:
        """Meet the others, who all join at once, and see that a text arrives.

        Args:
            rank: 0 is the trainer's.
            device: that what is broadcast lies on.
            text: the trainer's, of `wire.TEXT` characters.

        Raises:
            ConnectionError: they didn't come, or can't be reached, or one can't be in a group with the others.
            TimeoutError: they were too late.
        """
        self._at = at
        self._group: Any = None
        self._busy = False
        self._late = False
        with _as_connection():
            wait = timedelta(seconds=JOIN)
            store = dist.TCPStore(at.host, at.port, is_master=False, wait_for_workers=False, timeout=wait)
            self._store = dist.PrefixStore(at.key, store)
            self._store.set(f"here/{rank}", _word(at.backend, device))
            names = [f"here/{other}" for other in range(at.size)]
            begun = time.monotonic()
            while not self._store.check(names):
                self._look()
                if time.monotonic() - begun > JOIN:
                    raise TimeoutError(f"the others didn't come within {JOIN:g} s")
                time.sleep(0.02)
            _check([self._store.get(name).decode() for name in names])
            try:  # a backend's own waits for the others end when it likes
                self.text = _within(JOIN, lambda: self._met(rank, device, text))
            except TimeoutError:
                self._late = True
                raise

    def _met(self, rank: int, device: torch.device, text: str) -> str:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        make = _nccl if self._at.backend == "nccl" else _gloo
        self._group = make(self._at, self._store, rank)
        if self._late:
            self.close()
            raise TimeoutError("the group was given up meanwhile")
        buffer = torch.zeros(wire.TEXT, dtype=torch.uint8, device=device)
        if rank == 0:
            written(buffer, text)
        self.broadcast(buffer)
        return text_of(buffer)

    def broadcast(self, buffer: Tensor, look: Callable[[], None] = lambda: None) -> None:
        """What the trainer has in its buffer is in everyone's then. One that breaks off is the group's last.

        Args:
            buffer: uint8 [n].
            look: called now and then while it lasts, to end it by raising; the store is looked at, too.

        Raises:
            ConnectionError: another is gone, or the meeting is over.
            TimeoutError: it took longer than it may.
        """
        if self._group is None:
            raise ConnectionError("the group was left")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self._at.seconds)
        begun = looked = time.monotonic()
        self._busy = True
        try:
            with _as_connection():
                work = self._group.broadcast([buffer], options)
                while not work.is_completed():
                    now = time.monotonic()
                    if now - begun > self._at.seconds:
                        raise TimeoutError(f"a broadcast didn't end within {self._at.seconds:g} s")
                    if now - looked > _LOOK:
                        self._look()
                        look()
                        looked = now
                    time.sleep(_POLL)
                work.wait()
        except BaseException:
            self.end()
            raise
        self._busy = False

    def _look(self) -> None:
        if self._store.check(["over"]):
            raise ConnectionError("the meeting is over")

    def end(self) -> None:
        """Leave it, and tell the others that it is over."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set("over", "")
        self.close()

    def close(self) -> None:
        """Leave it."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._at.backend == "nccl":
            try:
                _within(_ABORT, group.abort)
            except RuntimeError:
                return
            except TimeoutError:
                _keep(group)
        elif self._busy:
            _keep(group)


def _keep(group: Any) -> None:
    """For ever: its destructor would wait for what is under way, and let nothing else run meanwhile."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _nccl(at: Address, store: Any, rank: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)  # `broadcast` has the deadline
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"  # else a thread of torch's ends this process when another of the group is gone
    try:
        return dist.ProcessGroupNCCL(store, rank, at.size, options)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _gloo(at: Address, store: Any, rank: int) -> Any:
    """Listens where this process reaches the store from; torch's own choice is what the host's name stands for."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=JOIN)
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
        device = dist.ProcessGroupGloo.create_device(interface=interface)
    else:
        with socket.create_connection((at.host, at.port), timeout=JOIN) as found:
            device = dist.ProcessGroupGloo.create_device(hostname=found.getsockname()[0])
    options._devices = [device]
    return dist.ProcessGroupGloo(store, rank, at.size, options)


def _word(backend: Backend, device: torch.device) -> str:
    """What one says of itself: "BACKEND VERSION, DEVICE". Those of a group must say the same, but for the device."""
    if backend == "gloo":
        return f"gloo, {secrets.token_hex(8)}"
    if device.type != "cuda" or not dist.is_nccl_available():
        return f"no NCCL, {secrets.token_hex(8)}"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return f"NCCL {version}, {torch.cuda.get_device_properties(device).uuid}"


def _check(words: Sequence[str]) -> None:
    """
    Raises:
        ConnectionError: they can't be in a group.
    """
    libraries, devices = zip(*(word.split(", ") for word in words), strict=True)
    if len(set(libraries)) > 1 or "no NCCL" in libraries:
        raise ConnectionError(f"the trainer has {libraries[0]}, and the workers have {', '.join(libraries[1:])}")
    if len(set(devices)) < len(devices):
        raise ConnectionError("two of them have the same GPU, and NCCL wants one for each")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What it returns or raises, in a thread that is left alone when it takes too long.

    Raises:
        TimeoutError: it does.
    """
    found: list[T] = []
    wrong: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run, name="meeting", daemon=True)
    thread.start()
    thread.join(seconds)
    if wrong:
        raise wrong[0]
    if not found:
        raise TimeoutError(f"the others were not met within {seconds:g} s")
    return found[0]


@contextlib.contextmanager
def _as_connection() -> Iterator[None]:
    """torch's errors of what lies between processes, as the system's own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(" ".join(str(error).split())[:300]) from error
