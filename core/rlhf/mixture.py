"""A second data set beside an online algorithm's own: the mean next-token loss of its rows is added to each optimiser
step, so that what the policy could do before is not unlearnt ("PPO-ptx" of InstructGPT, Ouyang et al. 2022,
arXiv:2203.02155).

    L + coef x - (1/T) sum_t log pi(y_t | x, y_<t)           T: the tokens to be learnt of the step's rows, on all ranks
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlhf.data import Feed, Rows, derive
from rlhf.errors import RunError
from rlhf.experience import Batch, Experience, token_mean
from rlhf.interfaces import Algorithm, Backend, Codec, Context, Score, State
from rlhf.micro import micro_batches, totals_of
from rlhf.offline import OfflineData
from rlhf.rows import CompletionRow
from rlhf.sequences import Example, Sequences
from rlhf.world import World

MicroBatch = tuple[Batch, float, bool]
"""As `micro_batches` makes them: the batch, its weight, whether it is the rank's last."""


def completion_example(row: CompletionRow, codec: Codec) -> Example:
    """The sequence of a completion, or of a chat in which the assistant's turns alone are to be learnt.

    Raises:
        RowError: it doesn't fit.
    """
    if not row.messages:
        return Example(codec.prompt(row.prompt), codec.response(row.completion, row.prompt))
    tokens, spoken = codec.chat(row.messages)
    start = max(1, int(spoken.int().argmax()))  # the first learnt token needs one before it
    return Example(tokens[:start], tokens[start:], spoken[start:])


class Mixture:
    """Its rows, in an order of their own, some in each optimiser step."""

    def __init__(self, rows: Rows[list[Example]], coef: float, batch_size: int, seed: int) -> None:
        """
        Args:
            batch_size: rows an optimiser step, over all ranks.
        """
        self.coef = coef
        self._data = OfflineData(rows, Algorithm(None, _NOBODY))
        self._feed = Feed(len(rows), batch_size, derive(seed, "ptx"), steps=0)
        self.sequences = Sequences.of([], [])
        """This rank's, of the last optimiser step."""
        self._updates = 0

    def minibatch(self, score: Score, world: World) -> Experience:
        """This rank's part of the next optimiser step's rows, perhaps none. The same rows on any number of ranks."""
        rows = self._feed.rows(self._updates)
        self._updates += 1
        return self._data.experience(rows, score, world)

    def batches(self, score: Score, backend: Backend, budget: int) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimiser step's rows.

        Args:
            budget: padded tokens of one.
        """
        rows = self.minibatch(score, backend.world)
        self.sequences = rows.sequences
        return list(micro_batches(rows, totals_of(rows.sequences, backend.world), budget, False, backend))

    def loss(self, batch: Batch, score: Score) -> Tensor:
        """This micro-batch's part of what is added to the loss."""
        part = token_mean(-score(batch, "policy").logp, batch)  # divides by the tokens to be learnt of all ranks' rows
        batch.log("ptx/loss", part)
        return self.coef * part

    def learn(self, batches: Iterable[MicroBatch], score: Score, backend: Backend, step: int) -> dict[str, Tensor]:
        """Add the gradients of micro-batches to those that are there; returns this rank's parts of what is reported,
        float64 scalars.

        Raises:
            RunError: a loss isn't finite.
        """
        logged: dict[str, Tensor] = {}
        for batch, weight, last in batches:
            loss = self.loss(batch, score)
            if not math.isfinite(float(loss.detach())):
                what = f"the loss on --ptx-data is {float(loss.detach())} in step {step + 1}"
                raise RunError(f"{what}; nothing of it was applied")
            backend.backward(loss if weight else loss * 0.0, last)
            if weight:
                for name, part in {"loss": loss.detach().cpu(), **batch.logged}.items():
                    logged[name] = logged.get(name, torch.zeros((), dtype=torch.float64)) + part.double()
        return logged

    def digest(self) -> str:
        """Of the rows as encoded."""
        return self._data.digest()

    def state(self) -> State:
        return {"updates": self._updates}

    def load_state(self, state: State) -> None:
        self._updates = state["updates"]


_NOBODY: Context = None  # type: ignore[assignment]
"""Rows as they are need no context."""
