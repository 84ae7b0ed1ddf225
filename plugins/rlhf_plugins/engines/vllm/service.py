"""What a server of a vLLM does, behind whatever carries its messages: work in order, on one thread, for one run."""

from __future__ import annotations

import contextlib
import hmac
import importlib
import math
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another one before Python 3.11
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import attrs
from torch import Tensor

from rlhf_plugins.engines.vllm import buckets, group, ipc, wire
from rlhf_plugins.engines.vllm.sampler import Gone, Sampler, Settings

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
    fetched: bool
    meeting: str
    name: str = attrs.Factory(lambda: secrets.token_hex(8))
    arrived: queue.Queue[Any] = attrs.Factory(lambda: queue.Queue(1))
    tensors: int = 0
    broken: Exception | None = None
    done: Future[None] = attrs.Factory(Future)

    def put(self, bucket: Any) -> None:
        """Hand a bucket on, or None, the end; waits until there is room for it.

        Raises:
            Whatever ended the load early.
        """
        while True:
            self.check()
            with contextlib.suppress(queue.Full):
                self.arrived.put(bucket, timeout=0.2)
                return

    def check(self) -> None:
        """
        Raises:
            Whatever ended the load early.
        """
        if self.done.done():
            self.done.result()
            raise self.broken or Conflict("the load was over before all weights were sent")

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """What arrives, as the sampler wants it."""
        for bucket in self._buckets():
            yield from bucket.items()

    def places(self) -> Iterator[group.Coming | ipc.Laid]:
        """Where it arrives; each bucket has been taken when the next is asked for."""
        for bucket, taken in self._buckets():
            yield bucket
            taken.set()

    def _buckets(self) -> Iterator[Any]:
        waited = 0.0
        while True:
            if self.broken:
                raise self.broken
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
            yield bucket


@attrs.frozen
class _Meeting:
    """Of the workers and a trainer."""

    store: group.Store
    """As long as the group is: some libraries ask it later, too."""
    joined: Future[list[str]]
    name: str = attrs.Factory(lambda: secrets.token_hex(8))


class ServedSampler(Sampler, Protocol):
    """What a server has: its workers also fetch weights from where the trainer says."""

    @property
    def workers(self) -> int:
        """Processes that hold a part of the model."""

    def sees(self, probe: ipc.Probe) -> bool:
        """Whether they can open memory of the trainer's GPU."""

    def join(self, at: group.Address) -> list[str]:
        """Meet the trainer; the text that it broadcasts first, as it arrived at each worker."""

    def leave(self) -> None:
        """Leave the group that was joined, where one was."""

    def fetch(self, found: Iterator[group.Coming | ipc.Laid], version: int) -> None:
        """As `load`, of weights of which it is told where they are."""


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
        self._sampler: ServedSampler | None = None
        self._jobs: queue.Queue[tuple[str, Callable[[ServedSampler], Any], Future[Any]] | None] = queue.Queue()
        self._doing = ""
        self._run = ""
        self._load: _Load | None = None
        self._meeting: _Meeting | None = None
        self._lock = threading.Lock()

    # The thread of the sampler

    def work(self, make: Callable[[Settings], ServedSampler]) -> None:
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
                except Gone as error:
                    future.set_exception(Conflict(str(error)))
                    raise
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

    def sees(self, asked: ipc.Probe) -> wire.Seen:
        return wire.Seen(self._asked("looking at a GPU's memory", lambda sampler: sampler.sees(asked)))

    def meet(self, asked: group.Join, host: str) -> group.Meeting:
        """Workers join as soon as the trainer does; whether they have is for `met` to tell.

        Args:
            host: the address at which the trainer reaches this host.
        """
        if not math.isfinite(asked.seconds) or asked.seconds <= 0:
            raise wire.WireError(f"message.seconds is out of range: {asked.seconds}")
        with self._lock:
            if self._load is not None:  # nothing would go on before it is over, and its client may be gone
                self._end_load(Taken("another run has met its workers since; a server is for one run at a time"), "")
            if self._meeting is not None:
                self._meeting.store.end()
        # who joins waits for the others for a minute only, so what is under way comes first
        workers = self._asked("finishing what it is at", lambda sampler: sampler.workers)
        store, joined = group.Store(host), Future[list[str]]()
        meeting = _Meeting(store, joined)
        at = group.Address(store.host, store.port, store.key, workers + 1, asked.backend, asked.seconds)

        def join(sampler: ServedSampler) -> list[str]:
            if self._meeting is not meeting or store.over:
                raise Conflict("the meeting is over")
            return sampler.join(at)

        with self._lock:
            self._meeting = meeting
            self._queue("meeting the trainer", join, joined)
        return group.Meeting(meeting.name, store.port, store.key, workers)

    def met(self, asked: group.Text) -> wire.Seen:
        texts = self._met(asked.meeting).joined.result()
        return wire.Seen(all(hmac.compare_digest(text.encode(), asked.content.encode()) for text in texts))

    def leave(self, asked: group.Leave) -> wire.Refusal:
        """End a meeting, and wait until the workers have left it; why they didn't meet, where that is why."""
        meeting = self._met(asked.meeting)
        meeting.store.end()
        left: Future[None] = Future()
        self._queue("leaving a meeting", lambda sampler: sampler.leave(), left)
        try:
            left.result(2 * group.JOIN)
        except FutureTimeoutError:
            raise Conflict("its workers don't leave a meeting") from None
        error = meeting.joined.exception()
        return wire.Refusal("" if error is None else " ".join(str(error).split())[:300])

    def _end_load(self, why: Exception, meeting: str) -> None:
        """Of another one who begins; `meeting`: by whose group."""
        load = self._load
        assert load is not None
        load.broken = why
        if not load.done.done() and load.meeting not in ("", meeting) and self._meeting is not None:
            self._meeting.store.end()  # its workers may wait for a broadcast that nobody begins

    def _met(self, name: str) -> _Meeting:
        if self._meeting is None or self._meeting.name != name:
            raise Taken("its workers have met another run since; a server is for one run at a time")
        return self._meeting

    def begin(self, asked: wire.Begin) -> wire.Begun:
        if asked.version < 0 or not asked.run:
            raise wire.WireError("a load has a version from 0 and a run")
        if asked.fetched and asked.adapter is not None:
            raise wire.WireError("adapters aren't fetched")
        load = _Load(asked.run, asked.version, asked.adapter, asked.fetched, asked.meeting)
        with self._lock:
            if asked.meeting:
                self._met(asked.meeting)
            if self._load is not None:  # its client is gone, or has begun anew
                self._end_load(Conflict("another load began"), asked.meeting)
            self._load = load

        def take(sampler: ServedSampler) -> None:
            if load.broken:
                raise load.broken
            if load.adapter is None and load.fetched:
                self._run = ""
                try:
                    sampler.fetch(load.places(), load.version)
                except OSError as error:
                    raise Conflict(f"the trainer was lost: {error}") from error
            elif load.adapter is None:
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
        load = self._loading(name, fetched=False)
        load.put(found)
        load.tensors += len(found)
        return wire.Done(load.version)

    def announce(self, asked: group.Coming | ipc.Laid) -> wire.Done:
        """Where the workers find a bucket. What lies somewhere is taken on return; a broadcast, the trainer begins."""
        load, taken = self._loading(asked.load, fetched=True), threading.Event()
        load.put((asked, taken))
        while isinstance(asked, ipc.Laid) and not taken.wait(0.2):
            load.check()
        load.tensors += len(asked.places)
        return wire.Done(load.version)

    def check(self, asked: wire.Begun) -> wire.Done:
        load = self._loading(asked.load)
        load.check()
        return wire.Done(load.version)

    def end(self, asked: wire.End) -> wire.Done:
        load = self._loading(asked.load)
        if asked.tensors != load.tensors:
            load.broken = Conflict(f"{load.tensors} tensors arrived of {asked.tensors}")
            raise load.broken
        load.put(None)
        load.done.result()
        return wire.Done(load.version)

    def sample(self, asked: wire.SampleRequest) -> wire.Answers:
        wire.check(asked.asks)

        def sample(sampler: ServedSampler) -> list[Any]:
            self._must_hold(asked.run, asked.version, sampler)
            return sampler.sample(asked.asks)

        return wire.Answers(asked.version, tuple(self._asked(f"sampling {len(asked.asks)} responses", sample)))

    def score(self, asked: wire.ScoreRequest) -> wire.Scored:
        if not all(len(sequence) > 1 for sequence in asked.sequences):
            raise wire.WireError("a sequence to score has two tokens at least")

        def score(sampler: ServedSampler) -> list[list[float]]:
            self._must_hold(asked.run, asked.version, sampler)
            return sampler.score(asked.sequences)

        found = self._asked(f"scoring {len(asked.sequences)} sequences", score)
        return wire.Scored(asked.version, tuple(tuple(one) for one in found))

    def prints(self, asked: wire.PrintsRequest) -> wire.Prints:
        def look(sampler: ServedSampler) -> Mapping[str, list[float]]:
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

    def _loading(self, name: str, fetched: bool | None = None) -> _Load:
        load = self._load
        if load is None or load.name != name:
            raise Conflict("no such load, or another one began since")
        if fetched not in (None, load.fetched):
            raise wire.WireError("a load brings its weights itself, or they are fetched; not both")
        return load

    def _asked(self, what: str, call: Callable[[ServedSampler], T]) -> T:
        future: Future[T] = Future()
        self._queue(what, call, future)
        return future.result()

    def _queue(self, what: str, call: Callable[[ServedSampler], Any], future: Future[Any]) -> None:
        if self._sampler is None:
            raise Conflict("it has not started")
        self._jobs.put((what, call, future))


def sampler_class(dotted: str) -> Callable[[Settings], ServedSampler]:
    """`module:Class`, imported."""
    module, _, name = dotted.partition(":")
    found: Callable[[Settings], ServedSampler] = getattr(importlib.import_module(module), name)
    return found
