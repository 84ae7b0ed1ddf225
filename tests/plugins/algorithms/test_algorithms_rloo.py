"""RLOO: the mean of the others, the KL in the reward, sums over a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from worked import EXACT, LENGTHS, NEW, OLD, REF, RHO, close, double, of_group

from rlhf.interfaces import Context
from rlhf_plugins.algorithms.rloo import RLOO
from rlhf_plugins.algorithms.without_critic_options import RLOOConfig

Make = Callable[..., Any]


def test_advantages_of_one_group_of_eight(context: Context, rollouts: Make, hand: Make) -> None:
    rewards = [1.0, 0, 0, 1, 1, 0, 0, 0]
    made = rollouts([1] * 8, rewards, group=[0] * 8)
    found = RLOO(RLOOConfig(kl_coef=0.0), context).experience(made, hand(policy={"logp": double([-1.0] * 8)}))
    close(found["advantages"], [5 / 7 if r else -3 / 7 for r in rewards])  # .714286 and -.428571


def test_the_kl_is_taken_off_the_reward(context: Context, rollouts: Make, hand: Make) -> None:
    """Sums of log pi_old - log pi_ref: -.2 and 0; at .05 rewards are 1.01 and 0, each less the other."""
    score = hand(policy={"logp": double(OLD)}, reference={"logp": double(REF)})
    found = RLOO(RLOOConfig(), context).experience(rollouts(LENGTHS, [1.0, 0.0], group=[0, 0]), score)
    close(found["advantages"], [1.01, -1.01])


def test_a_responses_tokens_are_added_up(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    logp = double(NEW, True)
    loss = RLOO(RLOOConfig(), context).loss(of_group(rollouts, batch, [1.0, -2.0]), hand(policy={"logp": logp}))
    assert float(loss.detach()) == pytest.approx((-1.2 - RHO[1] - RHO[2] + 2 * RHO[3]) / 2, **EXACT)
    loss.backward()
    assert logp.grad is not None
    close(logp.grad, [0.0, -RHO[1] / 2, -RHO[2] / 2, 2 * RHO[3] / 2])


def test_each_side_has_its_clip(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = RLOO(RLOOConfig(clip_low=0.3, clip_high=0.4), context)
    loss = algorithm.loss(of_group(rollouts, batch, [-1.0, 1.0]), hand(policy={"logp": double(NEW)}))
    assert float(loss) == pytest.approx((RHO[0] + RHO[1] + 0.7 - 1.4) / 2, **EXACT)
