"""What samples responses and what judges them: engines and rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import attrs
from torch import Tensor, nn

from rlhf.component import Component
from rlhf.interfaces.algorithm import Score
from rlhf.interfaces.policy import LoadSpec, Policy
from rlhf.sequences import Generation, Rollouts, Sample, Sequences


@attrs.frozen
class LogProbs:
    """What an engine's log-probs are; what follows from it, see `docs/architecture.md`, "Log-probs that differ"."""

    available: bool = True
    exact: bool = False
    """They equal the trainer's forward to fp32 rounding: they stand as old log-probs, and no forward is spent."""
    after_temperature: bool = True
    """Of the logits divided by the temperature, which is what was sampled from. Those from before it are of use at
    temperature 1 alone."""
    truncated: bool = False
    """Sampling was cut by top-p, top-k or min-p, so the distribution sampled from isn't the policy's, and no ratio to
    it is known: refused for algorithms that require "logprobs"."""
    dtype: str = "float32"
    """Of the matrix products that gave them."""

    def usable(self, temperature: float) -> bool:
        """Whether they say how likely what was sampled at this temperature was to be."""
        return self.available and not self.truncated and (self.after_temperature or temperature == 1.0)


class Weights(Protocol):
    """A module's weights by its own names, to be run through on every rank at once, as often as an engine likes."""

    def __call__(self, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        """In buckets, each tensor whole, and never all of them at once.

        Args:
            only: which names are wanted, the same on every rank; what isn't, isn't gathered.
        """


class Engine(Component):
    """Samples responses. Doesn't know the algorithm, nor whether weights are sharded."""

    logprobs: LogProbs = LogProbs()
    borrows: ClassVar[bool] = False
    """It samples from the very module that it was attached to, which must be whole then."""
    trainer_logp: Callable[[Sequences, float], Tensor] | None = None
    """Set before `attach`: log-probs of response tokens by the policy's own forward, at a temperature; float32 [N],
    without gradient. For an engine that holds a copy of the weights, to see that it is one. A meeting of all ranks, in
    `generate` as in `sync`: each with sequences of its own, perhaps none."""

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """Meet the trainer's module of the role "policy", before the first rollout; an engine in this process samples
        from it, another one copies its weights."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """Sample `request.count` responses for each request, in order. Called on every rank with its own requests,
        perhaps none.

        Args:
            temperature: overrides the engine's own, for evaluation; 0 is greedy.
        """
        raise NotImplementedError  # abstract: each implementation has its own

    def sync(self, weights: Weights, version: int) -> None:
        """Take new weights. Called on every rank, before the first rollout and after every step that changed them.

        Args:
            version: of the weights; what is sampled from now on is of this version (`Generation.version`).
        """

    def close(self) -> None:
        """Free what it holds."""


@attrs.frozen
class Failed:
    """A reward that could not be had: the rollout is left out and counted, never a zero."""

    why: str


class Reward(Component):
    """Judges rollouts. Doesn't know how they were made."""

    columns: Sequence[str] = ()
    """Columns of the prompt rows that it cannot do without, where only the implementation knows them; what the options
    alone say is `RewardEntry.columns`. Rows without are refused before any model is loaded."""

    def check(self, row: Any) -> None:
        """Look at a prompt row that has the columns it needs, before any model is loaded.

        Raises:
            RowError: no response to it could be judged, such as for a reference that can't be read; the row is refused
                and counted, training and held-out ones alike.
        """

    def judge(self, rollouts: Rollouts, score: Score) -> Sequence[float | Failed] | Tensor:
        """One number a rollout, in order; higher is better. The core refuses another count, text, NaN or infinity."""
        raise NotImplementedError  # abstract: each implementation has its own

    def close(self) -> None:
        """Free what it holds outside this process; it may be asked again."""
