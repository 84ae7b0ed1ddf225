"""A vLLM that is started again when it is lost, with the weights that it had, and asked again for what it owed.

The whole call is asked again, not what is missing of it: with the same seeds in the same batch the tokens are the same.
Weights are not kept for this: their stream is run through once more. On several ranks that is a meeting, so after each
call the ranks tell each other whether an engine was lost, and all of them run through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
from torch import Tensor

from rlhf.api import RunError, World
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, EngineLost, Sampler, Stream

T = TypeVar("T")


class Failover:
    """A `Sampler` that outlives its processes. Every rank must call the same methods in the same order."""

    def __init__(
        self, start: Callable[[bool], Sampler], world: World, restarts: int, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            start: starts this rank's engine, or finds it; told whether there was one before.
            restarts: times in a row that engines are started again; then what was asked of them has failed.
        """
        self._start = start
        self._world = world
        self._restarts = restarts
        self._say = say
        self._weights: tuple[Stream, int] | None = None
        self._adapter: tuple[Mapping[str, Tensor], Mapping[str, Any], int] | None = None
        self.restarted = 0
        """Engines of all ranks that were lost and started again."""
        self._sampler = start(False)

    @property
    def version(self) -> int:
        return self._sampler.version

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        """Where engines were lost too often, this rank's answers are failed ones if its own was."""
        found, why = self._call(lambda sampler: sampler.sample(asks), f"{len(asks)} responses")
        return found if found is not None else [Answer((), (), "length", failed=f"engine: {why}") for _ in asks]

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        found, why = self._call(lambda sampler: sampler.score(sequences), "log-probs")
        if found is None:
            raise RunError(why)
        return found

    def load(self, weights: Stream, version: int) -> None:
        self._weights, self._adapter = (weights, version), None
        self._give(lost=False, base=True, mine=True)

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self._adapter = (tensors, config, version)
        self._give(lost=False, base=False, mine=True)

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        found, why = self._call(lambda sampler: sampler.fingerprints(shapes), "a look at its weights")
        if found is None:
            raise RunError(why)
        return found

    def sleep(self) -> None:
        with contextlib.suppress(EngineLost):  # it is missed when it is asked for something
            self._sampler.sleep()

    def wake(self) -> None:
        with contextlib.suppress(EngineLost):
            self._sampler.wake()

    def close(self) -> None:
        self._sampler.close()

    def _call(self, call: Callable[[Sampler], T], what: str) -> tuple[T | None, str]:
        """(what this rank's engine answers, "") or (None, why it was lost for the last time)."""
        found: T | None = None
        done = False
        for attempt in range(self._restarts + 1):
            why = ""
            if not done:
                try:
                    found, done = call(self._sampler), True
                except EngineLost as error:
                    why = str(error)
            losses = self._losses(why)
            if not losses:
                return found, ""
            if attempt < self._restarts:
                again = f"started again ({attempt + 1} of {self._restarts}), and asked again for {what}"
                self._tell(losses, again)
                self._give(lost=bool(why), base=True, mine=bool(why))
        self._say(f"engine lost: {losses[0]}\n    lost {self._restarts + 1} times in a row: given up")
        return (found, "") if done else (None, f"lost {self._restarts + 1} times in a row; the last time: {why}")

    def _give(self, *, lost: bool, base: bool, mine: bool) -> None:
        """Give engines what they should hold.

        Args:
            lost: this rank's must be started first.
            base: the ranks run through the weights; an adapter is on each rank as it is.
            mine: this rank's engine takes what there is.

        Raises:
            RunError: on every rank, an engine can't be had.
        """
        for attempt in range(self._restarts + 1):
            stream = _Once(self._weights[0]) if base and self._weights is not None else None
            why = ""
            try:
                if lost:
                    self._sampler.close()
                    self._sampler = self._start(True)
                if mine and stream is not None and self._weights is not None:
                    self._sampler.load(stream, self._weights[1])
                if mine and self._adapter is not None:
                    self._sampler.load_adapter(*self._adapter)
            except EngineLost as error:
                why = str(error)
            if stream is not None:
                stream.finish()
            losses = self._losses(why)
            if not losses:
                return
            if attempt == self._restarts:
                raise RunError(f"{losses[0]}\nlost {attempt + 1} times in a row: given up")
            self._tell(losses, f"started again ({attempt + 1} of {self._restarts})")
            lost, base, mine = bool(why), True, bool(why)

    def _losses(self, why: str) -> list[str]:
        """Why engines were lost, of all ranks."""
        return [one for one in self._world.gather(why) if one]

    def _tell(self, losses: Sequence[str], what: str) -> None:
        self.restarted += len(losses)
        others = f" (and {len(losses) - 1} more)" if len(losses) > 1 else ""
        self._say(f"engine lost: {losses[0]}{others}\n    {what}")


class _Once:
    """A stream that is run through once, whoever begins it: where one rank's engine is lost halfway, its rank still
    meets the others for the rest."""

    def __init__(self, stream: Stream) -> None:
        self._items = stream()

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        return self._items

    def finish(self) -> None:
        for _ in self._items:
            pass


class Absent:
    """What ranks have for which another rank asks: it answers nothing, and runs through weights."""

    version = -1

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        return []

    def load(self, weights: Stream, version: int) -> None:
        for _ in weights():
            pass
        self.version = version

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self.version = version

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return []

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        return {}

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Shared:
    """One engine for all ranks: rank 0 asks for everybody, in one call, so that their responses are sampled together
    and the weights are sent once."""

    def __init__(self, sampler: Failover, world: World) -> None:
        """
        Args:
            sampler: of the engine on rank 0, of an `Absent` one on the others.
        """
        self._sampler = sampler
        self._world = world

    @property
    def version(self) -> int:
        return self._sampler.version

    @property
    def restarted(self) -> int:
        return self._sampler.restarted

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        rows = self._world.gather([attrs.asdict(ask) for ask in asks])
        everybody = [[_ask(row) for row in own] for own in rows]
        mine = [ask for own in everybody for ask in own] if self._world.rank == 0 else []
        found = [attrs.asdict(answer) for answer in self._sampler.sample(mine)]
        return [_answer(row) for row in self._own(found, [len(own) for own in everybody])]

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        everybody = self._world.gather([list(sequence) for sequence in sequences])
        mine = [tuple(sequence) for own in everybody for sequence in own] if self._world.rank == 0 else []
        return self._own(self._sampler.score(mine), [len(own) for own in everybody])

    def load(self, weights: Stream, version: int) -> None:
        self._sampler.load(weights, version)

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self._sampler.load_adapter(tensors, config, version)

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        """On rank 0; the others have none."""
        return self._sampler.fingerprints(shapes)

    def sleep(self) -> None:
        self._sampler.sleep()

    def wake(self) -> None:
        self._sampler.wake()

    def close(self) -> None:
        self._sampler.close()

    def _own(self, found: list[Any], counts: Sequence[int]) -> list[Any]:
        """This rank's part of what rank 0 got."""
        found = self._world.broadcast(found)
        start = sum(counts[: self._world.rank])
        return found[start : start + counts[self._world.rank]]


def _ask(row: Mapping[str, Any]) -> Ask:
    return Ask(
        **{**row, "prompt": tuple(row["prompt"]), "stop": tuple(row["stop"]), "stop_tokens": tuple(row["stop_tokens"])}
    )


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(**{**row, "tokens": tuple(row["tokens"]), "logps": tuple(row["logps"])})
