"""REINFORCE++ and its variant: rewards to go with the KL, whitened over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worked import EXACT, LENGTHS, NEW, OLD, REF, RHO, close, double

from rlhf.experience import Batch, Experience
from rlhf.interfaces import Context
from rlhf_plugins.algorithms.reinforce import Reinforce
from rlhf_plugins.algorithms.without_critic_options import ReinforceBaselineConfig, ReinforceConfig

Make = Callable[..., Any]


def white(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    var = sum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(var + 1e-8) for x in values]


def test_rewards_to_go_of_the_textbook(context: Context, rollouts: Make, hand: Make) -> None:
    """[-.01, -.02, .97] at gamma 1 are [.94, .95, .97] to go: log-ratios of 1, 2 and 3 at .01, and a score of 1."""
    score = hand(policy={"logp": double([-1.0, -1.0, -1.0])}, reference={"logp": double([-2.0, -3.0, -4.0])})
    found = Reinforce(ReinforceConfig(), context).experience(rollouts([3], [1.0]), score)
    close(found["advantages"], white([0.94, 0.95, 0.97]))


def test_later_rewards_are_discounted(context: Context, rollouts: Make, hand: Make) -> None:
    """At gamma .5 and no KL: 1/4, 1/2, 1 of the first response, -1 of the second; one mean for both."""
    algorithm = Reinforce(ReinforceConfig(kl_coef=0.0, gamma=0.5), context)
    found = algorithm.experience(rollouts([3, 1], [1.0, -1.0]), hand(policy={"logp": double(OLD)}))
    close(found["advantages"], white([0.25, 0.5, 1.0, -1.0]))


def test_a_tools_tokens_are_not_whitened(context: Context, rollouts: Make, hand: Make) -> None:
    masks = [torch.tensor([True, False, True]), None]
    score = hand(policy={"logp": double([-1, 500, -1, -1])}, reference={"logp": double([-2, 0, -2, -1])})
    found = Reinforce(ReinforceConfig(), context).experience(rollouts([3, 1], [1.0, 0.0], masks=masks), score)
    a, b, c = white([0.98, 0.99, 0.0])
    close(found["advantages"], [a, 0.0, b, c])


def test_the_variant_takes_the_groups_mean_off(context: Context, rollouts: Make, hand: Make) -> None:
    score = hand(policy={"logp": double([-1.0] * 4)}, reference={"logp": double([-2.0, -1.0, -40.0, -1.0])})
    made = rollouts([1] * 4, [1.0, 0.0, 30.0, 20.0], group=[0, 0, 1, 1])
    found = Reinforce(ReinforceBaselineConfig(), context).experience(made, score)
    close(found["advantages"], white([0.5, -0.5, 5.0, -5.0]))  # the KL is in the loss


def test_a_token_weighs_the_same(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    tokens = {"logp_old": double(OLD), "advantages": double([1.0, 2.0, -1.0, -2.0]), "logp_ref": double(REF)}
    losses = [-1.2, -2 * RHO[1], 0.8, 2 * RHO[3]]
    k2 = [(n - r) ** 2 / 2 for n, r in zip(NEW, REF, strict=True)]
    for config, kl in ((ReinforceConfig(), 0.0), (ReinforceBaselineConfig(), 0.01 * sum(k2) / 4)):
        given: Batch = batch(Experience(rollouts(LENGTHS, [1.0, 0.0]), tokens))
        loss = Reinforce(config, context).loss(given, hand(policy={"logp": double(NEW)}))
        assert float(loss) == pytest.approx(sum(losses) / 4 + kl, **EXACT)
