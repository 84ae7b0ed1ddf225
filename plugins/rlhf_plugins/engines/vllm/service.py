"""What a server of a vLLM does, behind whatever carries its messages: work in order, on one thread, for one run."""

from __future__ import annotations

import contextlib
import hmac
import importlib
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
from torch import Tensor

from rlhf_plugins.engines.vllm import buckets, wire
from rlhf_plugins.engines.vllm.sampler import Sampler, Settings

_LAST_MOMENT = 1.0
"""Seconds in which one that could not start says why."""
_PATIENCE = 600.0
"""Seconds that a client may let pass between two buckets."""
T = TypeVar("T")


class Conflict(Exception):  # noqa: N818 - an answer
    """What was asked doesn't fit the weights that are held, which is mended by sending them."""


class Taken(Exception):  # noqa: N818 - an answer
    """The weights that are held are another run's."""


@attrs.define
class _Load:
    """Weights on their way in."""

    run: str
    version: int
    adapter: Mapping[str, Any] | None
    name: str = attrs.Factory(lambda: secrets.token_hex(8))
    arrived: queue.Queue[dict[str, Tensor] | None] = attrs.Factory(lambda: queue.Queue(1))
    tensors: int = 0
    broken: str = ""
    done: Future[None] = attrs.Factory(Future)

    def put(self, bucket: dict[str, Tensor] | None) -> None:
        """Hand a bucket on, or None, the end; waits until there is room for it.

        Raises:
            Whatever ended the load early.
        """
        while True:
            if self.done.done():
                self.done.result()
                raise Conflict(self.broken or "the load was over before all weights were sent")
            with contextlib.suppress(queue.Full):
                self.arrived.put(bucket, timeout=0.2)
                return

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """What arrives, as the sampler wants it."""
        waited = 0.0
        while True:
            if self.broken:
                raise Conflict(self.broken)
            try:
                bucket = self.arrived.get(timeout=0.2)
            except queue.Empty:
                waited += 0.2
                if waited > _PATIENCE:
                    raise TimeoutError(f"no weights for {_PATIENCE:g} s, and not all were there") from None
                continue
            if bucket is None:
                return
            waited = 0.0
            yield from bucket.items()


class Service:
    """The sampler, and what it holds. Its work is done by the thread that calls `work`, in the order asked for: a vLLM
    stays on the thread that made it."""

    def __init__(self, settings: Settings) -> None:
        """
        Args:
            settings: what the vLLM must be like, whatever a run wishes.
        """
        self.instance = secrets.token_hex(8)
        self.folder: Path | None = None
        """Of shared memory, that a client has shown to share."""
        self._settings = settings
        self._opened: Mapping[str, Any] | None = None
        self._opening = threading.Event()
        self._state: Literal["waiting", "starting", "ready", "failed"] = "waiting"
        self._sampler: Sampler | None = None
        self._jobs: queue.Queue[tuple[str, Callable[[Sampler], Any], Future[Any]] | None] = queue.Queue()
        self._doing = ""
        self._run = ""
        self._load: _Load | None = None
        self._lock = threading.Lock()

    # The thread of the sampler

    def work(self, make: Callable[[Settings], Sampler]) -> None:
        """Until it is told to stop. A vLLM is made when a run has said what it must be like.

        Raises:
            Whatever `make` raises, a moment after it is told to who asks.
        """
        self._opening.wait()
        if self._opened is None:
            return
        arguments = {**self._opened, **self._settings.arguments}
        try:
            sampler = make(attrs.evolve(self._settings, arguments=arguments))
        except Exception as error:
            self._state, self._doing = "failed", f"{type(error).__name__}: {error}"[:2000]
            time.sleep(_LAST_MOMENT)
            raise
        try:
            self._sampler, self._state = sampler, "ready"
            while (job := self._jobs.get()) is not None:
                self._doing, call, future = job
                try:
                    future.set_result(call(sampler))
                except Exception as error:
                    traceback.print_exc()
                    future.set_exception(error)
                self._doing = ""
        finally:
            sampler.close()

    def stop(self) -> None:
        self._jobs.put(None)
        self._opening.set()

    # The threads of requests

    def health(self) -> wire.Health:
        sampler = self._sampler
        return wire.Health(
            protocol=wire.PROTOCOL,
            instance=self.instance,
            state=self._state,
            doing=self._doing,
            run=self._run,
            version=-1 if sampler is None else sampler.version,
            model=self._settings.model,
        )

    def open(self, asked: wire.Open) -> wire.Done:
        wire.check_open(asked.arguments)
        with self._lock:
            if self._opened is None:
                self._opened, self._state = dict(asked.arguments), "starting"
                self._opening.set()
        names = sorted(
            name
            for name in self._opened.keys() | asked.arguments.keys()
            if name not in self._settings.arguments and self._opened.get(name) != asked.arguments.get(name)
        )
        if names:
            raise Taken(f"it was opened with another {', '.join(names)}: start it again, or another one")
        return wire.Done(self.health().version)

    def shared(self, asked: wire.Shared) -> wire.Seen:
        try:
            path = buckets.checked(asked.path)
            seen = hmac.compare_digest(path.read_bytes(), asked.content.encode())
        except (wire.WireError, OSError):
            return wire.Seen(False)
        if seen:
            self.folder = path.parent
        return wire.Seen(seen)

    def begin(self, asked: wire.Begin) -> wire.Begun:
        if asked.version < 0 or not asked.run:
            raise wire.WireError("a load has a version from 0 and a run")
        load = _Load(asked.run, asked.version, asked.adapter)
        with self._lock:
            if self._load is not None:  # its client is gone, or has begun anew
                self._load.broken = "another load began"
            self._load = load

        def take(sampler: Sampler) -> None:
            if load.broken:
                raise Conflict(load.broken)
            if load.adapter is None:
                self._run = ""  # until all of it is there, it holds nobody's weights
                sampler.load(load.stream, load.version)
            else:
                if self._run != load.run:
                    raise Conflict("the weights that the adapter is for aren't there: send them first")
                self._run = ""
                sampler.load_adapter(dict(load.stream()), load.adapter, load.version)
            self._run = load.run

        self._queue("loading weights", take, load.done)
        return wire.Begun(load.name)

    def bucket(self, name: str, found: dict[str, Tensor]) -> wire.Done:
        load = self._loading(name)
        load.put(found)
        load.tensors += len(found)
        return wire.Done(load.version)

    def end(self, asked: wire.End) -> wire.Done:
        load = self._loading(asked.load)
        if asked.tensors != load.tensors:
            load.broken = f"{load.tensors} tensors arrived of {asked.tensors}"
            raise Conflict(load.broken)
        load.put(None)
        load.done.result()
        return wire.Done(load.version)

    def sample(self, asked: wire.SampleRequest) -> wire.Answers:
        wire.check(asked.asks)

        def sample(sampler: Sampler) -> list[Any]:
            self._must_hold(asked.run, asked.version, sampler)
            return sampler.sample(asked.asks)

        return wire.Answers(asked.version, tuple(self._asked(f"sampling {len(asked.asks)} responses", sample)))

    def score(self, asked: wire.ScoreRequest) -> wire.Scored:
        if not all(len(sequence) > 1 for sequence in asked.sequences):
            raise wire.WireError("a sequence to score has two tokens at least")

        def score(sampler: Sampler) -> list[list[float]]:
            self._must_hold(asked.run, asked.version, sampler)
            return sampler.score(asked.sequences)

        found = self._asked(f"scoring {len(asked.sequences)} sequences", score)
        return wire.Scored(asked.version, tuple(tuple(one) for one in found))

    def prints(self, asked: wire.PrintsRequest) -> wire.Prints:
        def look(sampler: Sampler) -> Mapping[str, list[float]]:
            self._must_hold(asked.run, asked.version, sampler)
            return sampler.fingerprints(asked.shapes)

        found = self._asked(f"looking at {len(asked.shapes)} weights", look)
        return wire.Prints(asked.version, {name: tuple(one) for name, one in found.items()})

    def sleep(self, asked: wire.Nothing) -> wire.Nothing:
        self._asked("going to sleep", lambda sampler: sampler.sleep())
        return asked

    def wake(self, asked: wire.Nothing) -> wire.Nothing:
        self._asked("waking", lambda sampler: sampler.wake())
        return asked

    def _must_hold(self, run: str, version: int, sampler: Sampler) -> None:
        if self._run and run != self._run:
            raise Taken("another run has sent its weights here since; a server is for one run at a time")
        if not self._run or version != sampler.version:
            holds = f"version {sampler.version}" if self._run else "no weights of this run"
            raise Conflict(f"asked of version {version}, and the server holds {holds}")

    def _loading(self, name: str) -> _Load:
        load = self._load
        if load is None or load.name != name:
            raise Conflict("no such load, or another one began since")
        return load

    def _asked(self, what: str, call: Callable[[Sampler], T]) -> T:
        future: Future[T] = Future()
        self._queue(what, call, future)
        return future.result()

    def _queue(self, what: str, call: Callable[[Sampler], Any], future: Future[Any]) -> None:
        if self._sampler is None:
            raise Conflict("it has not started")
        self._jobs.put((what, call, future))


def sampler_class(dotted: str) -> Callable[[Settings], Sampler]:
    """`module:Class`, imported."""
    module, _, name = dotted.partition(":")
    found: Callable[[Settings], Sampler] = getattr(importlib.import_module(module), name)
    return found
