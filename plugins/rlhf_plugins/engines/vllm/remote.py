"""A vLLM in another process, as a `Sampler`: one that runs already; `beside` has one that this process starts.

Every wait has a deadline, and says what it waited for where that passes. What is lost with the process raises
`EngineLost`; what a new process wouldn't mend raises `RunError`.

Weights go a bucket at a time: through the memory of a GPU that both have, else by way of the host's. Left out: NCCL.
"""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import attrs
from torch import Tensor

from rlhf.api import Problem, RequestError, RunError
from rlhf_plugins.engines.exchange import Reply, address_of, exchange
from rlhf_plugins.engines.vllm import ipc, wire
from rlhf_plugins.engines.vllm.buckets import SharedFolder, buckets, to_bytes
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
        gpu: str = "",
    ) -> None:
        """Meet it, say what it must be like, and wait until it has started.

        Args:
            arguments: of `vllm.LLM`, as far as a run may choose them: `wire.OPENABLE`.
            name: what messages call it; left out, by its address.
            again: it was there before, so it may take a while to come back.
            gpu: of this process, "cuda:1", through whose memory weights go where the server shows that it sees it.

        Raises:
            RequestError: none is there, or it is no such server, or the token isn't its own, or it can't be like that.
            EngineLost: it didn't come back, or did not start in time.
        """
        self._to = address_of(url, "--engine.url")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._deadlines = deadlines
        self._name = name or f"the vLLM server at {self._to}"
        self._run = secrets.token_hex(8)
        self._folder: SharedFolder | None = None
        self._buffer: ipc.Buffer | None = None
        self.version = -1
        self._meet(arguments, again)
        atexit.register(self._remove)
        if not (gpu and self._share_gpu(gpu)):
            self._share()

    # What a Sampler does

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        if not asks:
            return []
        request = wire.SampleRequest(self._run, self.version, tuple(asks))
        seconds = self._deadlines.sampling(asks)
        found = self._ask("/sample", request, wire.Answers, f"{len(asks)} responses", seconds, broken=EngineLost)
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
        what, seconds = f"the log-probs of {len(sequences)} sequences", self._deadlines.scoring(sequences)
        found = self._ask("/score", request, wire.Scored, what, seconds)
        if [len(one) for one in found.scores] != [len(one) - 1 for one in sequences]:
            raise RunError(f"{self._name} answered wrongly: another number of log-probs than of tokens but the first")
        return [list(one) for one in found.scores]

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        request = wire.PrintsRequest(self._run, self.version, dict(shapes))
        found = self._ask("/fingerprints", request, wire.Prints, "a look at its weights", self._deadlines.load)
        return {name: list(one) for name, one in found.found.items()}

    def sleep(self) -> None:
        self._ask("/sleep", wire.Nothing(), wire.Nothing, "it to give memory back", self._deadlines.load)

    def wake(self) -> None:
        self._ask("/wake", wire.Nothing(), wire.Nothing, "it to wake", self._deadlines.load)

    def close(self) -> None:
        """Leave it, which others may use next."""
        self._remove()

    # How

    def health(self) -> wire.Health:
        """What it says of itself.

        Raises:
            RequestError: it is no such server, or the token isn't its own.
            EngineLost: it doesn't answer.
        """
        try:
            return self._health(_PULSE)
        except OSError as error:  # a deadline that passed, too
            self._lost("a sign of life", _PULSE, error)

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
        end = time.monotonic() + self._deadlines.start
        opened = False
        while True:
            late: OSError = TimeoutError("it is still at it")
            try:
                found = self._health(_PULSE)
                if found.state == "failed" and not again:
                    raise RequestError(Problem(f"{self._name} could not start: {found.doing}"))
                if found.state == "failed":
                    self._lost("it to start", self._deadlines.start, OSError(found.doing))
                if not opened:  # also where it has started: perhaps for another run
                    self._ask("/open", wire.Open(arguments), wire.Done, "it to be opened", _PULSE)
                    opened = True
                if found.state == "ready":
                    return
            except OSError as error:
                late = error
                if self._over():
                    self._lost("it to start", self._deadlines.start, error)
                if not (again or self._comes):
                    fix = "start it first, or correct --engine.url: python -m rlhf_plugins.engines.vllm.serve --help"
                    raise RequestError(Problem(f"{self._name} isn't there: {error.strerror or error}", fix)) from error
            if time.monotonic() > end:
                self._lost("it to start", self._deadlines.start, TimeoutError(str(late)))
            time.sleep(0.1)

    def _over(self) -> bool:
        """Whether it is known to be gone for good."""
        return False

    def _share(self) -> None:
        """Use this host's shared memory where the server shows that it sees it."""
        if not os.path.isdir(wire.SHARED_MEMORY):
            return
        folder = SharedFolder()
        content = secrets.token_hex(16)
        probe = folder.probe(content)
        try:
            seen = self._ask("/shared", wire.Shared(str(probe), content), wire.Seen, "a look at a file", 30.0)
        except BaseException:
            folder.close()
            raise
        if seen.shared:
            self._folder = folder
        else:
            folder.close()

    def _share_gpu(self, device: str) -> bool:
        """Use a GPU's memory where the server shows that it sees it."""
        buffer = ipc.Buffer(device)
        try:
            probe = buffer.probe(secrets.token_hex(16))
        except RuntimeError:  # not every system and driver lets memory be shared
            return False
        if self._ask("/shared/gpu", probe, wire.Seen, "a look at a GPU's memory", 60.0).shared:
            self._buffer = buffer
        return self._buffer is not None

    @property
    def carrier(self) -> str:
        """What weights go through: "cuda-ipc", "shared-memory" or "bodies"."""
        return "cuda-ipc" if self._buffer is not None else "shared-memory" if self._folder is not None else "bodies"

    def _send(self, weights: Iterator[tuple[str, Tensor]], version: int, adapter: Mapping[str, Any] | None) -> None:
        seconds = self._deadlines.load
        request = wire.Begin(self._run, version, adapter)
        self.version = -1
        load = self._ask("/load", request, wire.Begun, "a load of weights to begin", seconds).load
        carry = self._by_gpu if self._buffer is not None else self._by_host
        count = sum(carry(load, weights))
        done = self._ask("/load/end", wire.End(load, count), wire.Done, "weights to be in place", seconds)
        if done.version != version:
            raise RunError(f"{self._name} holds version {done.version} after version {version} was sent")
        self.version = version

    def _by_gpu(self, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        """Send them; how many tensors each bucket has."""
        assert self._buffer is not None
        for handle, places in self._buffer.buckets(weights):
            what = f"{len(places)} tensors to be copied"
            self._ask("/load/gpu", ipc.Bucket(load, handle, places), wire.Done, what, self._deadlines.load)
            yield len(places)

    def _by_host(self, load: str, weights: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
        """The same."""
        seconds = self._deadlines.load
        for bucket in buckets(weights):
            path = self._folder.write(bucket) if self._folder else None
            what = f"{len(bucket)} tensors to be taken"
            if path is not None:
                self._ask("/load/file", wire.Bucket(load, str(path)), wire.Done, what, seconds)
            else:
                self._read(self._exchange("/load/body", to_bytes(bucket), what, seconds, {"X-Load": load}), wire.Done)
            yield len(bucket)

    def _ask(
        self, path: str, message: Any, kind: type[T], what: str, seconds: float, broken: type[RunError] = RunError
    ) -> T:
        return self._read(self._exchange(path, wire.write(message), what, seconds), kind, broken)

    def _exchange(
        self, path: str, body: bytes, what: str, seconds: float, headers: Mapping[str, str] | None = None
    ) -> Reply:
        sent = {**self._headers, **(headers or {})}
        try:
            return exchange(self._to, "POST", path, body, sent, seconds=seconds, limit=wire.MOST_JSON)
        except OSError as error:
            self._lost(what, seconds, error)

    def _read(self, reply: Reply, kind: type[T], broken: type[RunError] = RunError) -> T:
        """The answer, or what is behind its status.

        Args:
            broken: what an error inside the engine means: EngineLost where another engine may do better.
        """
        try:
            if reply.status == 200:
                return wire.read(reply.body, kind)
            why = wire.read(reply.body, wire.Refusal).error
        except wire.WireError as error:
            raise RunError(f"{self._name} answered {reply.status} and {error}") from error
        if reply.status == 409:
            raise EngineLost(f"{self._name}: {why}")
        raise (broken if reply.status == 500 else RunError)(f"{self._name}: {why}")

    def _lost(self, what: str, seconds: float, error: OSError) -> NoReturn:
        if isinstance(error, TimeoutError):
            raise EngineLost(f"{self._name}: waited {seconds:g} s for {what} in vain") from error
        raise EngineLost(f"{self._name}: lost while waiting for {what}: {error.strerror or error}") from error

    def _remove(self) -> None:
        atexit.unregister(self._remove)
        self._buffer = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None
