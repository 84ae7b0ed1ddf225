"""A vLLM in another process, as a `Sampler`: one that runs already; `beside` has one that this process starts.

Every wait has a deadline, and says what it waited for where that passes. What is lost with the process raises
`EngineLost`; what a new process wouldn't mend raises `RunError`.

By what way weights go is in `carriers`.
"""

from __future__ import annotations

import atexit
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import attrs
from torch import Tensor

from rlhf.api import Problem, RequestError, RunError
from rlhf_plugins.engines.exchange import Reply, address_of, exchange
from rlhf_plugins.engines.vllm import wire
from rlhf_plugins.engines.vllm.carriers import Carrier, Host, Refused, opened
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, EngineLost, Stream

_PULSE = 10.0
"""Seconds in which it says that it is there; one that starts may be deaf for a while."""

T = TypeVar("T")


@attrs.frozen
class Deadlines:
    """Seconds that each wait may take."""

    start: float = 600.0
    """Until a new engine answers; a large model is read from the disk."""
    load: float = 300.0
    """For one bucket of weights, and for all to be in place once they are sent."""
    sample: float = 120.0
    """For any number of responses, and on top of that what their tokens take at `pace`."""
    pace: float = 20.0
    """Tokens a second of all responses together that an engine makes at least."""

    def sampling(self, asks: Sequence[Ask]) -> float:
        return self.sample + sum(ask.max_tokens for ask in asks) / self.pace

    def scoring(self, sequences: Sequence[tuple[int, ...]]) -> float:
        return self.sample + sum(map(len, sequences)) / self.pace


class Server:
    """A vLLM that runs already, at an address."""

    _comes: ClassVar[bool] = False
    """It is on its way, so that nobody listens there yet means nothing."""

    def __init__(
        self,
        url: str,
        token: str,
        arguments: Mapping[str, Any],
        deadlines: Deadlines,
        *,
        name: str = "",
        again: bool = False,
        carrier: str = "host",
        device: str = "cpu",
        only: bool = False,
    ) -> None:
        """Meet it, say what it must be like, and wait until it has started.

        Args:
            arguments: of `vllm.LLM`, as far as a run may choose them: `wire.OPENABLE`.
            name: what messages call it; left out, by its address.
            again: it was there before, so it may take a while to come back.
            carrier: by which weights go: see `carriers.opened`.
            device: of this process, that weights come from: "cuda:1".
            only: by that way, or not at all; else by way of the host where it isn't open.

        Raises:
            RequestError: none is there, or it is no such server, or the token isn't its own, or it can't be like that;
                or the only way that weights may go isn't open.
            EngineLost: it didn't come back, or not as it was, or did not start in time.
        """
        self._to = address_of(url, "--engine.url")
        self._headers = {"Authorization": f"Bearer {token}"}
        self.deadlines = deadlines
        self._name = name or f"the vLLM server at {self._to}"
        self._run = secrets.token_hex(8)
        self._carrier: Carrier | None = None
        self._by_host: Carrier | None = None
        self.why_host = ""
        """Why weights go by way of the host though another way was wanted; empty where that one is open."""
        self.version = -1
        self._meet(arguments, again)
        atexit.register(self._remove)
        try:
            self._carrier = self._opened(carrier, device, only, again)
        except BaseException:
            self._remove()
            raise

    # What a Sampler does

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        if not asks:
            return []
        request = wire.SampleRequest(self._run, self.version, tuple(asks))
        seconds = self.deadlines.sampling(asks)
        found = self.ask("/sample", request, wire.Answers, f"{len(asks)} responses", seconds, broken=EngineLost)
        try:
            wire.check_answers(asks, found.answers)
        except wire.WireError as error:
            raise RunError(f"{self._name} answered wrongly: {error}") from error
        return list(found.answers)

    def load(self, weights: Stream, version: int) -> None:
        self._send(weights(), version, None)

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self._send(iter(tensors.items()), version, config)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        if not sequences:
            return []
        request = wire.ScoreRequest(self._run, self.version, tuple(map(tuple, sequences)))
        what, seconds = f"the log-probs of {len(sequences)} sequences", self.deadlines.scoring(sequences)
        found = self.ask("/score", request, wire.Scored, what, seconds)
        if [len(one) for one in found.scores] != [len(one) - 1 for one in sequences]:
            raise RunError(f"{self._name} answered wrongly: another number of log-probs than of tokens but the first")
        return [list(one) for one in found.scores]

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        request = wire.PrintsRequest(self._run, self.version, dict(shapes))
        found = self.ask("/fingerprints", request, wire.Prints, "a look at its weights", self.deadlines.load)
        return {name: list(one) for name, one in found.found.items()}

    def sleep(self) -> None:
        self.ask("/sleep", wire.Nothing(), wire.Nothing, "it to give memory back", self.deadlines.load)

    def wake(self) -> None:
        self.ask("/wake", wire.Nothing(), wire.Nothing, "it to wake", self.deadlines.load)

    def close(self) -> None:
        """Leave it, which others may use next."""
        self._remove()

    # How

    @property
    def host(self) -> str:
        """Where it listens."""
        return self._to.host

    def health(self) -> wire.Health:
        """What it says of itself.

        Raises:
            RequestError: it is no such server, or the token isn't its own.
            EngineLost: it doesn't answer.
        """
        try:
            return self._health(_PULSE)
        except OSError as error:  # a deadline that passed, too
            self.lost("a sign of life", _PULSE, error)

    def _health(self, seconds: float) -> wire.Health:
        reply = exchange(self._to, "GET", "/health", headers=self._headers, seconds=seconds, limit=wire.MOST_JSON)
        fix = "start one there: python -m rlhf_plugins.engines.vllm.serve --help"
        if reply.status == 401:
            raise RequestError(
                Problem(f"{self._name} refuses the token", "give the token file that it was started with")
            )
        if reply.status != 200:
            raise RequestError(Problem(f"{self._name} is none of rlhf's: it answers {reply.status}", fix))
        try:
            found = wire.read(reply.body, wire.Health)
        except wire.WireError as error:
            raise RequestError(Problem(f"{self._name} is none of rlhf's, or another version: {error}", fix)) from error
        if found.protocol != wire.PROTOCOL:
            what = f"{self._name} speaks protocol {found.protocol}, and this is {wire.PROTOCOL}"
            raise RequestError(Problem(what, "install the same rlhf-kit at both ends"))
        return found

    def _meet(self, arguments: Mapping[str, Any], again: bool) -> None:
        end = time.monotonic() + self.deadlines.start
        opened = False
        while True:
            late: OSError = TimeoutError("it is still at it")
            try:
                found = self._health(_PULSE)
                if found.state == "failed" and not again:
                    raise RequestError(Problem(f"{self._name} could not start: {found.doing}"))
                if found.state == "failed":
                    self.lost("it to start", self.deadlines.start, OSError(found.doing))
                if not opened:  # also where it has started: perhaps for another run
                    self.ask("/open", wire.Open(arguments), wire.Done, "it to be opened", _PULSE)
                    opened = True
                if found.state == "ready":
                    return
            except OSError as error:
                late = error
                if self._over():
                    self.lost("it to start", self.deadlines.start, error)
                if not (again or self._comes):
                    fix = "start it first, or correct --engine.url: python -m rlhf_plugins.engines.vllm.serve --help"
                    raise RequestError(Problem(f"{self._name} isn't there: {error.strerror or error}", fix)) from error
            if time.monotonic() > end:
                self.lost("it to start", self.deadlines.start, TimeoutError(str(late)))
            time.sleep(0.1)

    def _over(self) -> bool:
        """Whether it is known to be gone for good."""
        return False

    @property
    def carrier(self) -> str:
        """What weights go through: "cuda-ipc", "broadcast", "shared-memory" or "bodies"."""
        return self._carrier.name if self._carrier is not None else ""

    def _opened(self, carrier: str, device: str, only: bool, again: bool) -> Carrier:
        try:
            return opened(self, carrier, device)
        except Refused as refused:
            if only and again:  # it was open before
                raise EngineLost(f"{self._name}: {refused}") from refused
            if only:
                what = f"--engine.carrier {carrier}: {self._name}: {refused}"
                raise RequestError(Problem(what, "leave it out, and weights go by way of the host")) from refused
            self.why_host = str(refused)
        return opened(self, "host", device)

    def _adapters_carrier(self) -> Carrier:
        """They are small, and vLLM reads them from a file."""
        if isinstance(self._carrier, Host):
            return self._carrier
        if self._by_host is None:
            self._by_host = Host(self)
        return self._by_host

    def _send(self, weights: Iterator[tuple[str, Tensor]], version: int, adapter: Mapping[str, Any] | None) -> None:
        carrier = self._carrier if adapter is None else self._adapters_carrier()
        assert carrier is not None
        self.version = -1
        begin = wire.Begin(self._run, version, adapter, carrier.fetched, carrier.meeting)
        load = self.ask("/load", begin, wire.Begun, "a load of weights to begin").load
        count = sum(carrier.send(self, load, weights))
        done = self.ask("/load/end", wire.End(load, count), wire.Done, "weights to be in place")
        if done.version != version:
            raise RunError(f"{self._name} holds version {done.version} after version {version} was sent")
        self.version = version

    def check(self, load: str, what: str) -> None:
        """
        Args:
            what: is waited for meanwhile.

        Raises:
            EngineLost, RunError: a load doesn't go on.
        """
        body = wire.write(wire.Begun(load))
        try:
            reply = exchange(self._to, "POST", "/load/check", body, self._headers, seconds=_PULSE, limit=wire.MOST_JSON)
        except TimeoutError:  # it is busy; what it is busy with has a deadline of its own
            return
        except OSError as error:
            self.lost(what, _PULSE, error)
        self._read(reply, wire.Done, RunError)

    def ask(
        self,
        path: str,
        message: Any,
        kind: type[T],
        what: str,
        seconds: float | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        broken: type[RunError] = RunError,
    ) -> T:
        """Its answer.

        Args:
            message: bytes are a body as they are.
            what: is waited for, as a message says.
            seconds: left out, what a bucket of weights may take.
            broken: what an error inside the engine means: EngineLost where another engine may do better.

        Raises:
            EngineLost: it is gone or late, or holds other weights than is meant.
            RunError: it refuses.
        """
        body = message if isinstance(message, bytes) else wire.write(message)
        return self._read(self._exchange(path, body, what, seconds or self.deadlines.load, headers), kind, broken)

    def _exchange(
        self, path: str, body: bytes, what: str, seconds: float, headers: Mapping[str, str] | None = None
    ) -> Reply:
        sent = {**self._headers, **(headers or {})}
        try:
            return exchange(self._to, "POST", path, body, sent, seconds=seconds, limit=wire.MOST_JSON)
        except OSError as error:
            self.lost(what, seconds, error)

    def _read(self, reply: Reply, kind: type[T], broken: type[RunError]) -> T:
        """The answer, or what is behind its status."""
        try:
            if reply.status == 200:
                return wire.read(reply.body, kind)
            why = wire.read(reply.body, wire.Refusal).error
        except wire.WireError as error:
            raise RunError(f"{self._name} answered {reply.status} and {error}") from error
        if reply.status == 409:
            raise EngineLost(f"{self._name}: {why}")
        raise (broken if reply.status == 500 else RunError)(f"{self._name}: {why}")

    def lost(self, what: str, seconds: float, error: OSError) -> NoReturn:
        """
        Args:
            what: was waited for, so many seconds.

        Raises:
            EngineLost: always.
        """
        if isinstance(error, TimeoutError):
            raise EngineLost(f"{self._name}: waited {seconds:g} s for {what} in vain") from error
        raise EngineLost(f"{self._name}: lost while waiting for {what}: {error.strerror or error}") from error

    def _remove(self) -> None:
        atexit.unregister(self._remove)
        for carrier in (self._carrier, self._by_host):
            if carrier is not None:
                carrier.close()
        self._carrier = self._by_host = None
