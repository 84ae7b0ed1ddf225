"""GRPO and Dr. GRPO: advantages, each mean, the KL on either side, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from worked import EXACT, LENGTHS, NEW, OLD, REF, RHO, close, double

from rlhf.experience import Batch, Experience
from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.sequences import Prompt
from rlhf.world import World
from rlhf_plugins.algorithms.grpo import GRPO
from rlhf_plugins.algorithms.without_critic import roles_of
from rlhf_plugins.algorithms.without_critic_options import DrGRPOConfig, GRPOConfig

Make = Callable[..., Any]


ADVANTAGES = [1.0, -2.0]
# A = 1: 1.49 is clipped at 1.2, .951 and .607 are not; A = -2: 1.65 is not.
LOSSES = [-1.2, -RHO[1], -RHO[2], 2 * RHO[3]]


def minibatch(rollouts: Make, batch: Make, **tokens: list[float]) -> Batch:
    fields = {"logp_old": double(OLD), **{name: double(values) for name, values in tokens.items()}}
    made = rollouts(LENGTHS, [1.0, 0.0], group=[0, 0])
    found: Batch = batch(Experience(made, fields, advantages=double(ADVANTAGES)))
    return found


def loss_of(config: GRPOConfig, context: Context, given: Batch, hand: Make, logp: Tensor) -> float:
    loss = GRPO(config, context).loss(given, hand(policy={"logp": logp}))
    loss.backward()
    return float(loss.detach())


def test_a_group_of_responses_is_asked_for(context: Context) -> None:
    prompts = [Prompt(torch.tensor([1]), None, 0), Prompt(torch.tensor([2]), None, 1)]
    asked = GRPO(GRPOConfig(group_size=5), context).requests(prompts)
    assert [(sample.prompt, sample.count) for sample in asked] == [(prompts[0], 5), (prompts[1], 5)]


def test_advantages_of_one_group_of_eight(context: Context, rollouts: Make, hand: Make) -> None:
    rewards = [1.0, 0, 0, 1, 1, 0, 0, 0]
    score = hand(policy={"logp": double([-1.0] * 8)})
    for config, right, wrong in ((GRPOConfig(), 1.207381, -0.724429), (DrGRPOConfig(), 0.625, -0.375)):
        made = rollouts([1] * 8, rewards, group=[0] * 8)
        found = GRPO(config, context).experience(made, score)
        # written down to six digits
        assert found["advantages"].tolist() == pytest.approx([right if r else wrong for r in rewards], abs=5e-7)
        close(found["logp_old"], [-1.0] * 8)
        assert "logp_ref" not in found
    assert context.metrics.drain(World())["group/flat"] == 0.0


def test_a_response_weighs_the_same_however_long(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    logp = double(NEW, True)
    found = loss_of(GRPOConfig(), context, minibatch(rollouts, batch), hand, logp)
    assert found == pytest.approx((sum(LOSSES[:3]) / 3 + LOSSES[3]) / 2, **EXACT)
    assert logp.grad is not None  # - A rho over tokens and responses; none where clipped
    close(logp.grad, [0.0, -RHO[1] / 6, -RHO[2] / 6, 2 * RHO[3] / 2])


def test_a_tools_tokens_dont_count_in_a_responses_mean(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    masks = [torch.tensor([True, False, True]), None]
    made = rollouts(LENGTHS, [1.0, 0.0], group=[0, 0], masks=masks)
    given = batch(Experience(made, {"logp_old": double(OLD)}, advantages=double(ADVANTAGES)))
    found = loss_of(GRPOConfig(), context, given, hand, double(NEW, True))
    assert found == pytest.approx(((LOSSES[0] + LOSSES[2]) / 2 + LOSSES[3]) / 2, **EXACT)


def test_a_token_weighs_the_same(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    logp = double(NEW, True)
    found = loss_of(GRPOConfig(mean="token"), context, minibatch(rollouts, batch), hand, logp)
    assert found == pytest.approx(sum(LOSSES) / 4, **EXACT)


def test_each_side_has_its_clip(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    config = GRPOConfig(mean="token", clip_low=0.3, clip_high=0.4)
    given = minibatch(rollouts, batch)
    given.of_responses["advantages"] = double([-1.0, 1.0])
    # A = -1: 1.49 and .951 are not clipped, .607 is at .7; A = 1: 1.65 is at 1.4
    assert loss_of(config, context, given, hand, double(NEW, True)) == pytest.approx(
        (RHO[0] + RHO[1] + 0.7 - 1.4) / 4, **EXACT
    )
    assert float(given.logged["policy/clip_fraction"]) == 0.5


def test_dr_grpo_divides_by_a_constant(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """Ratio 1, A = 1 and -1, lengths 2 and 4, at most 8: (-2 + 4) / 16."""
    made = rollouts([2, 4], [1.0, 0.0], group=[0, 0])
    given = batch(Experience(made, {"logp_old": double([-1.0] * 6)}, advantages=double([1.0, -1.0])))
    logp = double([-1.0] * 6, True)
    assert loss_of(DrGRPOConfig(max_length=8), context, given, hand, logp) == 0.125
    assert logp.grad is not None
    assert logp.grad.tolist() == [-1 / 16] * 2 + [1 / 16] * 4


def test_the_constant_is_the_engines_limit(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    engine = attrs.make_class("Engine", ["config"])(attrs.make_class("Config", ["max_new_tokens"])(5))
    context.plan = attrs.make_class("Plan", ["engine"])(engine)
    found = loss_of(DrGRPOConfig(), context, minibatch(rollouts, batch), hand, double(NEW, True))
    assert found == pytest.approx(sum(LOSSES) / (2 * 5), **EXACT)


KL = {  # of d = log pi - log pi_ref: value, and its derivative by log pi
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
}


@pytest.mark.parametrize("estimator", KL)
def test_the_kl_in_the_loss(context: Context, rollouts: Make, batch: Make, hand: Make, estimator: str) -> None:
    logp = double(NEW, True)
    given = minibatch(rollouts, batch, logp_ref=REF)
    config = GRPOConfig(kl_coef=0.1, kl_estimator=estimator, mean="token")
    d = [n - r for n, r in zip(NEW, REF, strict=True)]
    value, slope = KL[estimator]
    found = loss_of(config, context, given, hand, logp)
    assert found == pytest.approx(sum(LOSSES) / 4 + 0.1 * sum(map(value, d)) / 4, **EXACT)
    assert logp.grad is not None
    policy = [0.0, -RHO[1], -RHO[2], 2 * RHO[3]]
    close(logp.grad, [(p + 0.1 * slope(x)) / 4 for p, x in zip(policy, d, strict=True)])


def test_the_kl_times_the_ratio(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """Of k1 the gradient is (d + 1) rho, whose expectation under the old policy is the KL's own gradient."""
    logp = double(NEW, True)
    given = minibatch(rollouts, batch, logp_ref=REF)
    given.of_responses["advantages"] = double([0.0, 0.0])
    config = GRPOConfig(kl_coef=0.1, kl_estimator="k1", kl_correction=True, mean="token")
    d = [n - r for n, r in zip(NEW, REF, strict=True)]
    found = loss_of(config, context, given, hand, logp)
    assert found == pytest.approx(0.1 * sum(x * rho for x, rho in zip(d, RHO, strict=True)) / 4, **EXACT)
    assert logp.grad is not None
    close(logp.grad, [0.1 * (x + 1) * rho / 4 for x, rho in zip(d, RHO, strict=True)])


def test_the_kl_in_the_reward(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """Sums of log pi_old - log pi_ref: .1 + .2 - .5 = -.2, and 0; so rewards 1.02 and 0."""
    config = DrGRPOConfig(kl_coef=0.1, kl_in="reward", kl_estimator="k1", max_length=4)
    algorithm = GRPO(config, context)
    score = hand(policy={"logp": double(OLD)}, reference={"logp": double(REF)})
    found = algorithm.experience(rollouts(LENGTHS, [1.0, 0.0], group=[0, 0]), score)
    close(found["advantages"], [0.51, -0.51])
    metrics = context.metrics.drain(World())
    assert metrics["kl/k1"] == pytest.approx(-0.2 / 4, **EXACT)
    assert metrics["kl/sequence"] == pytest.approx(-0.1, **EXACT)
    d = [0.1, 0.2, -0.5, 0.0]
    assert metrics["kl/k3"] == pytest.approx(sum(math.exp(-x) - 1 + x for x in d) / 4, **EXACT)
    assert metrics["policy/entropy"] == pytest.approx(4.2 / 4, **EXACT)
    given = minibatch(rollouts, batch, logp_ref=REF)  # and none of it in the loss
    assert loss_of(config, context, given, hand, double(NEW, True)) == pytest.approx(sum(LOSSES) / 8, **EXACT)


def test_there_is_a_reference_where_the_kl_has_weight() -> None:
    assert [role.name for role in roles_of(GRPOConfig())] == ["policy"]
    assert [role.name for role in roles_of(GRPOConfig(kl_coef=0.01))] == ["policy", "reference"]


def test_the_entropy_is_a_bonus_and_a_mean_over_tokens(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    entropy = double([1.0, 2.0, 3.0, 6.0], True)
    score = hand(policy={"logp": double(NEW), "entropy": entropy})
    without = GRPO(GRPOConfig(), context).loss(minibatch(rollouts, batch), score)
    assert score.asked == [("policy", False)]
    loss = GRPO(GRPOConfig(entropy_coef=0.01), context).loss(minibatch(rollouts, batch), score)
    assert float((without - loss).detach()) == pytest.approx(0.01 * 3.0, **EXACT)
    loss.backward()
    assert entropy.grad is not None
    close(entropy.grad, [-0.01 / 4] * 4)


def test_several_rewards_each_in_its_group(context: Context, rollouts: Make, hand: Make) -> None:
    """Two groups of two. Right or wrong: +-.5; brevity: +-50 in the first group, none in the second. Each counts as
    +-.70701 (a deviation of .7071, plus 1e-4), so with a weight of .5 the sums are +-1.5 and +-1 of that; then whitened
    over the batch, whose mean is 0."""
    made = attrs.evolve(
        rollouts([1] * 4, [0.0] * 4, group=[0, 0, 1, 1]),
        reward_parts={"right": double([1, 0, 1, 0]), "brief": double([200, 100, 7, 7])},
        reward_weights={"right": 1.0, "brief": 0.5},
    )
    score = hand(policy={"logp": double([-1.0] * 4)})
    found = GRPO(GRPOConfig(several="each"), context).experience(made, score)["advantages"]
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000.0) + 1e-4)
    sums = [a + b / 2, -a - b / 2, a, -a]
    std = math.sqrt(sum(x * x for x in sums) / 4 + 1e-8)
    close(found, [x / std for x in sums])


def test_flat_groups_are_left_out_where_asked(context: Context, rollouts: Make, hand: Make) -> None:
    made = rollouts([1, 1, 2, 1], [1.0, 1.0, 1.0, 0.0], group=[0, 0, 1, 1])
    chosen = GRPO(GRPOConfig(drop_flat=True), context).keep(made)
    assert chosen is not None and chosen.tolist() == [False, False, True, True]
    assert GRPO(GRPOConfig(), context).keep(made) is None
    kept = GRPO(GRPOConfig(scale="none"), context).experience(made, hand(policy={"logp": double([-1.0] * 5)}))
    close(kept["advantages"], [0, 0, 0.5, -0.5])
    assert context.metrics.drain(World())["group/flat"] == 0.5


def test_where_each_reward_is_compared_a_group_is_flat_if_each_is(context: Context, rollouts: Make, hand: Make) -> None:
    """In the first group the sums are equal and the rewards are not; in the second what differs has no weight."""
    made = attrs.evolve(
        rollouts([1] * 6, [2.0, 2.0, 2.0, 1.0, 1.0, 1.0], group=[0, 0, 0, 1, 1, 1]),
        reward_parts={"a": double([1, 0, 0, 1, 1, 1]), "b": double([0, 2, 2, 0, 0, 0]), "c": double(range(6))},
        reward_weights={"a": 2.0, "b": 1.0, "c": 0.0},
    )
    each, whole = (GRPO(GRPOConfig(drop_flat=True, several=how), context) for how in ("each", "sum"))
    kept, none = each.keep(made), whole.keep(made)
    assert kept is not None and kept.tolist() == [True] * 3 + [False] * 3
    assert none is not None and not none.any()
    found = each.experience(made, hand(policy={"logp": double([-1.0] * 6)}))["advantages"]
    assert found[:3].abs().min() > 0.5
    close(found[3:], [0.0] * 3)
    assert context.metrics.drain(World())["group/flat"] == 0.5


def test_a_long_response_is_punished_softly(context: Context, rollouts: Make, hand: Make) -> None:
    """Limit 10, buffer 4: rewards of lengths 6, 8, 10 are 1, 1 - .5 x 2, and 1 - 1 x 2; their mean is 0."""
    config = GRPOConfig(scale="none", max_length=10, overlong_buffer=4, overlong_penalty=2.0)
    made = rollouts([6, 8, 10], [1.0] * 3, group=[0] * 3)
    found = GRPO(config, context).experience(made, hand(policy={"logp": double([-1.0] * 24)}))
    close(found["advantages"], [1.0, 0.0, -1.0])
    assert context.metrics.drain(World())["reward/overlong"] == -1.0
    made = rollouts([8, 9, 10], [1.0] * 3, group=[0] * 3)  # a fifth of 10 is 2
    config = GRPOConfig(scale="none", max_length=10, overlong_buffer=None)
    found = GRPO(config, context).experience(made, hand(policy={"logp": double([-1.0] * 27)}))
    close(found["advantages"], [0.5, 0.0, -0.5])


def test_whether_a_group_is_flat_is_judged_without_the_punishment(context: Context, rollouts: Make) -> None:
    made = rollouts([1, 9], [1.0, 1.0], group=[0, 0])
    chosen = GRPO(GRPOConfig(drop_flat=True, max_length=10, overlong_buffer=5), context).keep(made)
    assert chosen is not None and not chosen.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 1},
        {"clip_low": 1.5},
        {"clip_high": 0},
        {"kl_coef": 0.1, "kl_estimator": "k1"},
        {"kl_correction": True, "kl_in": "reward"},
        {"kl_coef": 0.1, "kl_estimator": "k2", "kl_correction": True},
        {"mean": "sum"},
        {"sampling_rounds": 2},
        {"several": "each", "overlong_buffer": 3},
        {"several": "each", "scale": "none"},
        {"several": "each", "scale": "batch"},
        {"kl_coef": 0.1, "several": "each", "kl_in": "reward"},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    config, problems = structure(GRPOConfig, wrong, "--algo.")
    assert config is None and problems
    assert next(reversed(wrong)) in str(problems[0]).replace("-", "_")
