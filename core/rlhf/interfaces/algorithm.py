"""What an algorithm is, and the forward that it is handed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from rlhf.component import Component
from rlhf.experience import Batch, Experience
from rlhf.interfaces.policy import Codec
from rlhf.scores import Divergence, Scores
from rlhf.sequences import Example, Prompt, Rollouts, Sample


class Score(Protocol):
    """The forward handed to an algorithm. In `experience` without gradient and of any size; in `loss` with gradient."""

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        """Scores of the rollouts, experience or batch under a role."""

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        """Scores under several roles, in one forward of their shared container: what a loss of two trainable roles
        must use, since a parallel backend takes one forward a backward."""

    def divergence(
        self, of: Any, role: str, other: str, *, kind: Divergence, beta: float = 0.5, temperature: float = 1.0
    ) -> Tensor:
        """float32 [N], nats: how far a role's distribution before each response token is from that of a frozen role
        with a module of its own, over the whole vocabulary. In `loss` with the gradient of the role.

        Args:
            kind: `rlhf.scores.Divergence`, of `role` from `other`.
            beta: of `js`, between 0 and 1.
            temperature: divides the logits of both; that of sampling plays no part.
        """

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        """float32 [N], nats: log-probs under the weights that sampled: the engine's own where exact. Else they are
        computed, and what is made of these rollouts has weights for the difference: `Experience.importance`."""


class Algorithm(Component):
    """Roles and data (in its entry), sampling requests, experience, loss. Knows no engine, backend or memory strategy.

    Online, a step is: `requests` -> rollouts -> rewards -> `keep` -> `experience` -> minibatches -> `loss`; where there
    are `sampling_rounds`, up to `keep` again for further prompts in place of what isn't kept.
    Offline: rows -> `examples` (once, at the start) -> `experience` (once a row, cached) -> `loss`.
    Before the losses of an optimiser step comes `prepare`, for an algorithm that looks at all of it at once.
    """

    unit: ClassVar[Literal["sequence", "group"]] = "sequence"
    """What a micro-batch must not cut: nothing, or a group (the loss compares its members)."""

    off_policy: ClassVar[bool] = False
    """Whether the loss holds for samples of any distribution, as a regression's does. Else one that learns from samples
    takes account of `batch.importance`, as `policy_mean` does, and the user is told where it doesn't."""

    step: int = 0
    """Steps done; set by the loop."""

    @property
    def epochs(self) -> int:
        """Passes over each batch of experience."""
        return int(getattr(self.config, "epochs", 1))

    @property
    def minibatches(self) -> int:
        """Optimiser steps a pass over each batch of experience."""
        return int(getattr(self.config, "minibatches", 1))

    def examples(self, row: Any, codec: Codec) -> Iterable[Example]:
        """Offline: the sequences of a row, one group. Raises RowError for a row that doesn't fit."""
        # abstract for the offline ones alone: what samples has no rows to make sequences of
        raise NotImplementedError(f"{type(self).__name__} is offline and must say what a row's sequences are")

    def bundles(self, lengths: Sequence[int]) -> Iterable[Sequence[int]]:
        """Offline: which rows make one item of a batch; packing joins several. lengths: tokens of each row."""
        return ([i] for i in range(len(lengths)))

    def requests(self, prompts: Sequence[Prompt]) -> Iterable[Sample]:
        """Online: what to sample for these prompts."""
        return [Sample(prompt) for prompt in prompts]

    @property
    def sampling_rounds(self) -> int:
        """Online: how often a step samples at most. From the second time on further prompts, those that come next in
        the data, take the place of groups that `keep` left out; what then still lacks, lacks, and is counted."""
        return int(getattr(self.config, "sampling_rounds", 1))

    @property
    def mixes(self) -> bool:
        """Online: whether rows of `--ptx-data` are learnt in this step's optimiser steps, which changes the policy."""
        return True

    def keep(self, rollouts: Rollouts) -> Tensor | None:
        """Online: which of a round's judged rollouts are learnt from, bool [B]; None: all, on every rank
        alike. A group is kept where any of its members is. Ranks as in `experience`. The core counts what is left
        out."""
        return None

    def experience(self, rollouts: Any, score: Score) -> Experience:
        """What the loss needs, computed without gradient. Online: of `Rollouts`, each step. Offline: of an
        `Experience`, once a row; its fields are cached over epochs.

        Of several ranks, each has its own part of the batch, whole groups, perhaps none; what must be known of the
        whole batch comes from `context.world`."""
        return Experience(rollouts)

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        """What the loss must know of the whole minibatch under the weights as they are now, computed without gradient:
        before each optimiser step, and before the held-out loss. Ranks as in `experience`."""
        return minibatch

    def loss(self, batch: Batch, score: Score) -> Tensor:
        """This micro-batch's part of the loss, a scalar: use `token_mean` and the like, so that parts add up."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")  # abstract: each algorithm has its own

    def minibatch_done(self, metrics: Mapping[str, float]) -> bool:
        """After each optimiser step, with its metrics, the same on every rank. True leaves the batch's rest out."""
        return False

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """After each step, with its metrics, the same on every rank: adapt a coefficient here."""
