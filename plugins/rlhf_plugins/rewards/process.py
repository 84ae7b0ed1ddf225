"""A process reward model: each step of a response is scored, and the scores become one number.

A step's score is the probability that it, and all before it, is right. The response's text is cut at the separator and
encoded as in training (`--algo prm`), by the model's own tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.api import Context, Failed, Reward, Rollouts, RowError, Score
from rlhf_plugins import steps
from rlhf_plugins.functional.ragged import after_tokens
from rlhf_plugins.rewards import samples


class ProcessRewardModel(Reward):
    """See the module."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        component = next(reward for reward in context.plan.rewards if reward.key == context.label)
        self._role = context.plan.role(component.label or "prm")  # a labelled reward's role has its label's name
        assert context.policy is not None  # rewards are made after it
        self._codec = context.policy.codec(self._role.model.path)

    def judge(self, rollouts: Rollouts, score: Score) -> list[float | Failed]:
        """B scores from 0 to 1; Failed where there is no step, or more than the model can read."""
        found: list[float | Failed] = []
        readable: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, text in enumerate(rollouts.texts):
            try:
                parts = steps.split(text, self.config.separator)
                if not parts:
                    raise RowError("the response holds no step")
                prompt, longest = samples.prompt(rollouts, i), self._role.model.context
                readable.append(steps.encode(self._codec, prompt, parts, self.config.separator, longest))
                found.append(0.0)  # of those read, in order, below
            except RowError as error:
                found.append(Failed(f"the process reward model can't read it: {error}"))
        sequences = samples.sequences(rollouts, [(prompt, response) for prompt, response, _ in readable])
        scores = score(sequences, self._role.name)
        right = torch.sigmoid(after_tokens(scores.values, scores.score, sequences.lengths))  # [N]
        ends = [end for _, _, end in readable]
        of_each = right.split([len(end) for end in ends])
        each = (aggregate(own[end], self.config.aggregate) for own, end in zip(of_each, ends, strict=True))
        return [one if isinstance(one, Failed) else next(each) for one in found]


def aggregate(scores: Tensor, how: str) -> float:
    """One number of the scores of a response's steps, [K], K >= 1: their "min", "mean", "last" or "product".

    Raises: ValueError for another way.
    """
    wide = scores.double()
    ways = {"min": wide.min(), "mean": wide.mean(), "last": wide[-1], "product": wide.prod()}
    if how not in ways:
        raise ValueError(f"expected {', '.join(ways)}, given {how}")
    return float(ways[how])
