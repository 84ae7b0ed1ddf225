"""An algorithm of the tests' own that asks for no log-probs of what was sampled: it imitates the better responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.api import Algorithm, AlgorithmEntry, Experience, Sample, token_mean

IMITATE = AlgorithmEntry(
    name="imitate", summary="imitates the better of a group", impl="imitating:Imitate", requires={"rollouts"}
)


class Imitate(Algorithm):
    def requests(self, prompts: Any) -> Any:
        return [Sample(prompt, count=2) for prompt in prompts]

    def experience(self, rollouts: Any, score: Any) -> Experience:
        return Experience(rollouts, weight=torch.softmax(rollouts.rewards.view(-1, 2), -1).flatten())

    def loss(self, batch: Any, score: Any) -> Tensor:
        return token_mean(-batch.per_token("weight") * score(batch, "policy").logp, batch)
