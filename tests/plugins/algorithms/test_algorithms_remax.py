"""ReMax: the greedy response is asked for, is the baseline, and is not learnt from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from worked import EXACT, NEW, OLD, RHO, close, double, of_group

from rlhf.interfaces import Context
from rlhf.sequences import Prompt
from rlhf.world import World
from rlhf_plugins.algorithms.remax import Remax
from rlhf_plugins.algorithms.without_critic_options import RemaxConfig

Make = Callable[..., Any]


def test_a_greedy_response_is_one_more_request(context: Context) -> None:
    prompt = Prompt(torch.tensor([1]), None, 0)
    asked = Remax(RemaxConfig(), context).requests([prompt, prompt])
    assert [(s.greedy, s.tag, s.count) for s in asked] == [(False, "", 1), (True, "baseline", 1)] * 2


def test_its_reward_is_the_baseline(context: Context, rollouts: Make, hand: Make) -> None:
    made = attrs.evolve(
        rollouts([1, 2, 3, 1], [1.0, 0.25, 0.0, 2.0], group=[0, 0, 1, 1]), tags=("", "baseline", "", "baseline")
    )
    score = hand(policy={"logp": double(OLD)}, reference={"logp": double([-1.1, -0.7, -1.5, -0.9])})
    found = Remax(RemaxConfig(kl_coef=0.1), context).experience(made, score)
    assert found.lengths.tolist() == [1, 3] and found.places is not None and found.places.tolist() == [0, 2]
    # KLs of .1 and .2 - .5 + .2 = -.1, at .1
    close(found["advantages"], [1.0 - 0.01 - 0.25, 0.0 + 0.01 - 2.0])
    assert context.metrics.drain(World())["reward/greedy"] == 1.125


def test_a_responses_tokens_are_added_up(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    loss = Remax(RemaxConfig(), context).loss(
        of_group(rollouts, batch, [1.0, -2.0]), hand(policy={"logp": double(NEW)})
    )
    assert float(loss) == pytest.approx((-1.2 - RHO[1] - RHO[2] + 2 * RHO[3]) / 2, **EXACT)
