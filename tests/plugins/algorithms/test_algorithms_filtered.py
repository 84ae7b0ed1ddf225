"""GFPO, VESPO, DPPO and DAPO: what each keeps, and how its options reach its loss; losses are tested by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worked import EXACT, NEW, OLD, RHO, close, double, of_group

from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.sequences import Prompt
from rlhf_plugins.algorithms.dapo import DAPO
from rlhf_plugins.algorithms.dppo import DPPO
from rlhf_plugins.algorithms.gfpo import GFPO
from rlhf_plugins.algorithms.vespo import VESPO
from rlhf_plugins.algorithms.without_critic_options import DAPOConfig, DPPOConfig, GFPOConfig, VESPOConfig

Make = Callable[..., Any]
GROUPS, LENGTHS = [0, 0, 0, 1, 1, 1], [4, 2, 3, 1, 5, 5]
REWARDS = [4.0, 1.0, 1.0, 1.0, 5.0, 1.0]  # a token: 1, .5, .33 and 1, 1, .2


def kept(rollouts: Make, context: Context, rewards: list[float] = REWARDS, **options: Any) -> list[int]:
    made = rollouts(LENGTHS, rewards, group=GROUPS)
    chosen = GFPO(GFPOConfig(group_size=3, retain=2, **options), context).keep(made)
    assert chosen.dtype == torch.bool
    found: list[int] = chosen.nonzero().flatten().tolist()
    return found


def test_gfpo_retains_the_shortest_or_those_with_most_reward_a_token(context: Context, rollouts: Make) -> None:
    assert kept(rollouts, context) == [1, 2, 3, 4]
    # a token: .75, 1.45, 1.03 and .1, 1, .2
    assert kept(rollouts, context, [3.0, 2.9, 3.1, 0.1, 5.0, 1.0], prefer="efficient") == [1, 2, 4, 5]


def test_gfpos_groups_are_flat_by_what_is_retained(context: Context, rollouts: Make) -> None:
    assert kept(rollouts, context, drop_flat=True) == [3, 4]  # of the first group rewards 1 and 1
    assert kept(rollouts, context, [1.0] * 6, drop_flat=True) == []


def test_gfpos_advantages_are_of_those_retained(context: Context, rollouts: Make, hand: Make) -> None:
    """Of a group of three with rewards 4, 1, 0 and lengths 4, 2, 3 the last two: mean .5, deviation .707107."""
    made = rollouts([4, 2, 3], [4.0, 1.0, 0.0], group=[0, 0, 0])
    algorithm = GFPO(GFPOConfig(group_size=3, retain=2), context)
    rest = made.select(algorithm.keep(made).nonzero().flatten())
    found = algorithm.experience(rest, hand(policy={"logp": double([-1.0] * 5)}))
    size = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(found["advantages"], [size, -size])
    asked = algorithm.requests([Prompt(torch.tensor([1]), None, 0)])
    assert [sample.count for sample in asked] == [3]


def test_gfpo_learns_as_grpo_does(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    given = of_group(rollouts, batch, [1.0, -2.0])
    loss = GFPO(GFPOConfig(), context).loss(given, hand(policy={"logp": double(NEW)}))
    assert float(loss) == pytest.approx(((-1.2 - RHO[1] - RHO[2]) / 3 + 2 * RHO[3]) / 2, **EXACT)


def test_dapo_is_a_mean_over_tokens_with_a_higher_clip(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    given = of_group(rollouts, batch, [1.0, -2.0])
    loss = DAPO(DAPOConfig(), context).loss(given, hand(policy={"logp": double(NEW)}))
    assert float(loss) == pytest.approx((-1.28 - RHO[1] - RHO[2] + 2 * RHO[3]) / 4, **EXACT)  # 1.49 is at 1.28
    assert DAPO(DAPOConfig(), context).sampling_rounds == 3


def test_dapo_keeps_groups_that_teach_something(context: Context, rollouts: Make) -> None:
    made = rollouts([1] * 4, [1.0, 1.0, 0.0, 1.0], group=[0, 0, 1, 1])
    chosen = DAPO(DAPOConfig(), context).keep(made)
    assert chosen is not None and chosen.tolist() == [False, False, True, True]


def test_vespo_weighs_by_the_sign_of_the_advantage(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """Log W = .4 - .05 - .5 = -.15 and .5; k, lambda = 2, 3 for A = 1, and 3, 2 for A = -2."""
    logp = double(NEW, True)
    loss = VESPO(VESPOConfig(), context).loss(of_group(rollouts, batch, [1.0, -2.0]), hand(policy={"logp": logp}))
    good = math.exp(2 * -0.15 + 3 * (1 - math.exp(-0.15)))
    bad = math.exp(3 * 0.5 + 2 * (1 - math.exp(0.5)))
    assert float(loss.detach()) == pytest.approx((-good * sum(NEW[:3]) + 2 * bad * NEW[3]) / 4, **EXACT)
    loss.backward()
    assert logp.grad is not None
    close(logp.grad, [-good / 4] * 3 + [2 * bad / 4])


# |p - q| of the four tokens: .1809, .0296, .0532, .3221; the last has A = -2 and grew, so it is never left out.
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, [True, False, False, False]),
        ({"delta_high": 0.2}, [False] * 4),
        ({"delta_low": 0.01}, [True, False, False, False]),
        ({"divergence": "kl"}, [True, False, False, False]),  # .0708, .0018, .0121
        ({"divergence": "kl", "delta_high": 0.08}, [False] * 4),
    ],
    ids=str,
)
def test_dppo_leaves_out_what_moved_too_far(
    context: Context, rollouts: Make, batch: Make, hand: Make, options: dict[str, Any], left_out: list[bool]
) -> None:
    logp = double(NEW, True)
    given = of_group(rollouts, batch, [1.0, -2.0])
    loss = DPPO(DPPOConfig(**options), context).loss(given, hand(policy={"logp": logp}))
    loss.backward()
    assert logp.grad is not None
    slopes = [0.0 if out else -rho * a / 4 for out, rho, a in zip(left_out, RHO, [1, 1, 1, -2], strict=True)]
    close(logp.grad, slopes)
    assert float(given.logged["policy/clip_fraction"]) == sum(left_out) / 4


def test_dppos_low_threshold_is_for_bad_tokens(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """A = -1 and 1: the second and third fell, by .0296 and .05325."""
    logp = double(NEW, True)
    given = of_group(rollouts, batch, [-1.0, 1.0])
    config = DPPOConfig(delta_low=0.04, delta_high=9.0, cap=1.6)
    DPPO(config, context).loss(given, hand(policy={"logp": logp})).backward()
    assert logp.grad is not None
    close(logp.grad, [RHO[0] / 4, RHO[1] / 4, 0.0, -1.6 / 4])  # 1.65 is capped
    assert math.exp(OLD[2]) - math.exp(NEW[2]) == pytest.approx(0.05325, abs=5e-6)  # to five digits


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (GFPOConfig, {"group_size": 4, "retain": 5}),
        (GFPOConfig, {"retain": 1}),
        (GFPOConfig, {"prefer": "long"}),
        (VESPOConfig, {"rate_neg": 0.0}),
        (DPPOConfig, {"divergence": "js"}),
        (DPPOConfig, {"cap": 0.0}),
        (DAPOConfig, {"drop_flat": False, "sampling_rounds": 2}),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(config: type, wrong: dict[str, Any]) -> None:
    made, problems = structure(config, wrong, "--algo.")
    assert made is None and next(reversed(wrong)) in str(problems[0]).replace("-", "_")
