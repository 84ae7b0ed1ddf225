"""PPO: one step written out by hand in plain Python, and each of its options against numbers worked out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.experience import Batch, Experience
from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.sequences import Rollouts
from rlhf.world import World
from rlhf_plugins.algorithms import PPOConfig, ppo_roles
from rlhf_plugins.algorithms.ppo import PPO

Make = Callable[..., Any]


def double(values: list[float], gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def ppo(context: Context, **options: Any) -> PPO:
    return PPO(PPOConfig(**{"missing_eos": "none", "whiten_advantages": False, **options}), context)


# Two responses of 3 and 2 tokens. Everything below is in float64, so agreement is to its rounding.
LENGTHS, REWARDS = [3, 2], [2.0, -0.5]
LOGP_OLD = [-1.0, -0.5, -2.0, -0.7, -1.2]
LOGP_REF = [-1.1, -0.7, -1.5, -0.7, -1.0]
VALUES = [0.5, 0.6, 0.7, -0.1, 0.2]
EXACT: dict[str, Any] = {"rel": 1e-12, "abs": 1e-12}


def close(found: Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, **EXACT)


def scores(hand: Make) -> Any:
    policy, reference, value = {"logp": double(LOGP_OLD)}, {"logp": double(LOGP_REF)}, {"values": double(VALUES)}
    return hand(policy=policy, reference=reference, value=value)


def test_experience_by_hand(context: Context, rollouts: Make, hand: Make) -> None:
    algorithm = ppo(context, kl_coef=0.1, gamma=0.9, lam=0.8)
    found = algorithm.experience(rollouts(LENGTHS, REWARDS), scores(hand))

    kl = [-1.0 + 1.1, -0.5 + 0.7, -2.0 + 1.5, 0.0, -1.2 + 1.0]  # log pi_old - log pi_ref
    r = [-0.1 * kl[0], -0.1 * kl[1], -0.1 * kl[2] + 2.0, -0.1 * kl[3], -0.1 * kl[4] - 0.5]
    # First response, from its end: V and A are 0 after the last token.
    a2 = r[2] - 0.7
    a1 = r[1] + 0.9 * 0.7 - 0.6 + 0.9 * 0.8 * a2
    a0 = r[0] + 0.9 * 0.6 - 0.5 + 0.9 * 0.8 * a1
    # Second response: nothing of the first one reaches it.
    b1 = r[4] - 0.2
    b0 = r[3] + 0.9 * 0.2 + 0.1 + 0.9 * 0.8 * b1
    advantages = [a0, a1, a2, b0, b1]
    close(found["advantages"], advantages)
    close(found["returns"], [a + v for a, v in zip(advantages, VALUES, strict=True)])
    close(found["logp_old"], LOGP_OLD)
    close(found["values_old"], VALUES)

    metrics = context.metrics.drain(World())
    assert metrics["kl/k1"] == pytest.approx(sum(kl) / 5, **EXACT)
    assert metrics["kl/k3"] == pytest.approx(sum(math.exp(-d) - 1 + d for d in kl) / 5, **EXACT)
    assert metrics["kl/sequence"] == pytest.approx((sum(kl[:3]) + sum(kl[3:])) / 2, **EXACT)
    assert metrics["kl/coef"] == 0.1
    assert metrics["policy/entropy"] == pytest.approx(5.4 / 5, **EXACT)
    assert metrics["value/mean"] == pytest.approx(1.9 / 5, **EXACT)
    returns = [a + v for a, v in zip(advantages, VALUES, strict=True)]
    mean_r, mean_a = sum(returns) / 5, sum(advantages) / 5
    unexplained = sum((a - mean_a) ** 2 for a in advantages) / sum((x - mean_r) ** 2 for x in returns)
    assert metrics["value/explained_variance"] == pytest.approx(1 - unexplained, **EXACT)


def test_gae_of_the_textbook(context: Context, rollouts: Make, hand: Make) -> None:
    # gamma 1, lambda .95, r = [0, 0, 1], V = [.5, .6, .7]: A = [.46575, .385, .3], by hand.
    score = hand(policy={"logp": double([0.0] * 3)}, value={"values": double([0.5, 0.6, 0.7])})
    found = ppo(context, kl_coef=0.0).experience(rollouts([3], [1.0]), score)
    close(found["advantages"], [0.46575, 0.385, 0.3])
    close(found["returns"], [0.96575, 0.985, 1.0])
    told = context.metrics.drain(World())
    assert "value/mean" in told and not {"kl/k1", "kl/k3", "kl/sequence"} & set(told)  # without a reference: not known


def test_advantages_are_whitened_and_returns_are_from_before(context: Context, rollouts: Make, hand: Make) -> None:
    plain = ppo(context, kl_coef=0.1).experience(rollouts(LENGTHS, REWARDS), scores(hand))
    white = ppo(context, kl_coef=0.1, whiten_advantages=True).experience(rollouts(LENGTHS, REWARDS), scores(hand))
    a = plain["advantages"].tolist()
    mean = sum(a) / 5
    var = sum((x - mean) ** 2 for x in a) / 5  # biased
    close(white["advantages"], [(x - mean) / math.sqrt(var + 1e-8) for x in a])
    close(white["returns"], plain["returns"].tolist())


def test_whitened_rewards_keep_their_mean(context: Context, rollouts: Make, hand: Make) -> None:
    # lambda = gamma = 1 and V = 0 make A the reward to go, from which the rewards are read off.
    zero = {"policy": {"logp": double(LOGP_OLD)}, "reference": {"logp": double(LOGP_REF)},
            "value": {"values": double([0.0] * 5)}}  # fmt: skip
    found = ppo(context, kl_coef=0.1, lam=1.0, whiten_rewards=True).experience(rollouts(LENGTHS, REWARDS), hand(**zero))
    r = [-0.01, -0.02, 2.05, 0.0, -0.48]
    mean = sum(r) / 5
    var = sum((x - mean) ** 2 for x in r) / 5
    w = [(x - mean) / math.sqrt(var + 1e-8) + mean for x in r]
    close(found["advantages"], [w[0] + w[1] + w[2], w[1] + w[2], w[2], w[3] + w[4], w[4]])


def test_tokens_that_are_not_the_policys_own_take_no_part(context: Context, rollouts: Make, hand: Make) -> None:
    masks = [torch.tensor([True, False, True, False]), None]  # a tool's output inside, and one at the end
    wild = 1e6  # would be seen in any number it reached
    score = hand(
        policy={"logp": double([-1.0, wild, -2.0, wild, -1.2])},
        reference={"logp": double([-1.1, -wild, -1.5, 0.0, -1.0])},
        value={"values": double([0.5, wild, 0.7, wild, 0.2])},
    )
    algorithm = ppo(context, kl_coef=0.1, gamma=0.9, lam=0.8, whiten_advantages=True)
    found = algorithm.experience(rollouts([4, 1], [2.0, -0.5], masks=masks), score)
    r0, r2, s = -0.1 * 0.1, 0.1 * 0.5 + 2.0, 0.1 * 0.2 - 0.5  # the score stands on the last own token
    a2 = r2 - 0.7
    a0 = r0 + 0.9 * 0.7 - 0.5 + 0.9 * 0.8 * a2  # the next token is the next own one
    b = s - 0.2
    mean = (a0 + a2 + b) / 3
    var = ((a0 - mean) ** 2 + (a2 - mean) ** 2 + (b - mean) ** 2) / 3
    close(found["advantages"], [(x - mean) / math.sqrt(var + 1e-8) if x else 0.0 for x in (a0, 0, a2, 0, b)])
    assert context.metrics.drain(World())["kl/k1"] == pytest.approx((0.1 - 0.5 - 0.2) / 3, **EXACT)


NEW = [-0.6, -0.55, -2.5, -0.7, -1.0]
NEW_VALUES = [0.9, 0.65, 0.1, -0.1, 0.2]
ADVANTAGES = [1.0, -1.0, -2.0, 0.5, 1.0]
RETURNS = [1.0, 0.2, 0.6, 0.4, 0.2]


def minibatch(algorithm: PPO, rollouts: Make, batch: Make) -> Batch:
    tokens = {"logp_old": LOGP_OLD, "values_old": VALUES, "advantages": ADVANTAGES, "returns": RETURNS}
    made: Batch = batch(Experience(rollouts(LENGTHS, REWARDS), {name: double(x) for name, x in tokens.items()}))
    return made


def test_loss_and_its_gradient_by_hand(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = ppo(context, clip_range=0.2, value_clip_range=0.2, value_coef=0.1)
    logp, values = double(NEW, True), double(NEW_VALUES, True)
    given = minibatch(algorithm, rollouts, batch)
    loss = algorithm.loss(given, hand(policy={"logp": logp}, value={"values": values}))

    rho = [math.exp(0.4), math.exp(-0.05), math.exp(-0.5), 1.0, math.exp(0.2)]
    policy = [
        -1.2,  # A = 1, rho = 1.49: clipped at 1.2
        rho[1],  # A = -1, inside
        2 * 0.8,  # A = -2, rho = .61: clipped at .8, since that is the worse
        -0.5,  # rho = 1
        -1.2,  # A = 1, rho = 1.22: clipped
    ]
    # V_old = [.5, .6, .7, ...]: .9 is clipped to .7, .1 to .5; the larger error counts.
    value = [0.5 * (0.7 - 1.0) ** 2, 0.5 * (0.65 - 0.2) ** 2, 0.5 * (0.1 - 0.6) ** 2, 0.5 * 0.5**2, 0.0]
    assert float(loss.detach()) == pytest.approx(sum(policy) / 5 + 0.1 * sum(value) / 5, **EXACT)

    loss.backward()
    assert logp.grad is not None and values.grad is not None
    close(logp.grad, [0.0, rho[1] / 5, 0.0, -0.5 / 5, 0.0])  # -A rho / T where not clipped
    close(values.grad, [0.0, 0.1 * 0.45 / 5, 0.1 * -0.5 / 5, 0.1 * -0.5 / 5, 0.0])

    # logged parts are float32
    logged = {name: float(part) for name, part in given.logged.items()}
    k3 = [x - 1 - math.log(x) for x in rho]
    assert logged == pytest.approx({
        "policy/loss": sum(policy) / 5, "value/loss": sum(value) / 5, "policy/clip_fraction": 3 / 5,
        "value/clip_fraction": 1 / 5, "policy/ratio": sum(rho) / 5, "policy/approx_kl": sum(k3) / 5,
    }, rel=1e-6)  # fmt: skip


def test_each_range_clips_its_own(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """rho = (1.49, .951, .607, 1, 1.22) within .1 of 1, and V = (.9, .65, .1, ...) within .3 of (.5, .6, .7, ...)."""
    algorithm = ppo(context, clip_range=0.1, value_clip_range=0.3)
    given = minibatch(algorithm, rollouts, batch)
    algorithm.loss(given, hand(policy={"logp": double(NEW)}, value={"values": double(NEW_VALUES)}))
    policy = [-1.1, math.exp(-0.05), 2 * 0.9, -0.5, -1.1]
    value = [0.5 * 0.2**2, 0.5 * 0.45**2, 0.5 * 0.5**2, 0.5 * 0.5**2, 0.0]  # .9 counts as .8; .1 is worse than .4
    assert float(given.logged["policy/loss"]) == pytest.approx(sum(policy) / 5, rel=1e-6)  # logged in float32
    assert float(given.logged["value/loss"]) == pytest.approx(sum(value) / 5, rel=1e-6)


def test_values_are_free_where_no_range_is_set(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = ppo(context, value_clip_range=None, value_coef=1.0)
    given = minibatch(algorithm, rollouts, batch)
    algorithm.loss(given, hand(policy={"logp": double(LOGP_OLD)}, value={"values": double(NEW_VALUES)}))
    squares = [0.1**2, 0.45**2, 0.5**2, 0.5**2, 0.0]
    assert float(given.logged["value/loss"]) == pytest.approx(0.5 * sum(squares) / 5, rel=1e-6)  # logged in float32


def test_the_first_pass_has_a_ratio_of_exactly_one(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = ppo(context, kl_coef=0.1)
    experience = algorithm.experience(rollouts(LENGTHS, REWARDS), scores(hand))
    given = batch(experience)
    logp = double(LOGP_OLD, True)
    loss = algorithm.loss(given, hand(policy={"logp": logp}, value={"values": double(VALUES)}))
    for name, value in {"policy/ratio": 1.0, "policy/approx_kl": 0.0, "policy/clip_fraction": 0.0}.items():
        assert float(given.logged[name]) == value, name
    loss.backward()
    assert logp.grad is not None  # at rho = 1 it is the policy gradient: - A / T
    close(logp.grad, [-a / 5 for a in experience["advantages"].tolist()])


def test_entropy_is_a_bonus_asked_for_only_where_it_counts(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    entropy = double([1.0, 2.0, 3.0, 4.0, 5.0], True)
    policy = {"logp": double(LOGP_OLD), "entropy": entropy}
    plain, bonus = ppo(context), ppo(context, entropy_coef=0.01)
    score = hand(policy=policy, value={"values": double(VALUES)})
    without = plain.loss(minibatch(plain, rollouts, batch), score)
    assert score.asked == [("policy", False), ("value", False)]
    score.asked.clear()
    loss = bonus.loss(minibatch(bonus, rollouts, batch), score)
    assert score.asked == [("policy", True), ("value", True)]
    assert float((without - loss).detach()) == pytest.approx(0.01 * 3.0, **EXACT)  # a mean of 3 nats
    loss.backward()
    assert entropy.grad is not None
    close(entropy.grad, [-0.01 / 5] * 5)


def test_while_the_critic_warms_up_the_policy_is_left_alone(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    algorithm = ppo(context, critic_warmup=2, value_coef=0.1, value_clip_range=None)
    values = double(NEW_VALUES, True)
    score = hand(policy={"logp": double(NEW, True)}, value={"values": values})
    for step in (0, 1):
        algorithm.step = step
        score.asked.clear()
        loss = algorithm.loss(minibatch(algorithm, rollouts, batch), score)
        assert [role for role, _ in score.asked] == ["value"]  # the policy isn't even run
        assert float(loss.detach()) == pytest.approx(0.1 * 0.5 * (0.01 + 0.2025 + 0.25 + 0.25) / 5, **EXACT)
    algorithm.step = 2
    score.asked.clear()
    algorithm.loss(minibatch(algorithm, rollouts, batch), score)
    assert [role for role, _ in score.asked] == ["policy", "value"]


def shaped(context: Context, rollouts: Make, hand: Make, made: Rollouts, **options: Any) -> list[float]:
    """The score that each response was given: with lambda 1, no KL and V = 0 it is the advantage of each token."""
    n = int(made.lengths.sum())
    algorithm = ppo(context, kl_coef=0.0, lam=1.0, **options)
    score = hand(policy={"logp": double([0.0] * n)}, value={"values": double([0.0] * n)})
    advantages = algorithm.experience(made, score)["advantages"]
    starts = [int(made.lengths[:i].sum()) for i in range(len(made))]
    return [float(advantages[start]) for start in starts]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"missing_eos": "none"}, [3.0, -4.0, 0.5]),
        ({"missing_eos": "replace"}, [3.0, -1.0, 0.5]),
        ({"missing_eos": "replace", "missing_eos_value": -7.0}, [3.0, -7.0, 0.5]),
        ({"missing_eos": "replace", "missing_eos_value": 0.0}, [3.0, 0.0, 0.5]),
        ({"missing_eos": "subtract"}, [3.0, -5.0, 0.5]),
        ({"missing_eos": "subtract", "missing_eos_value": 0.25}, [3.0, -4.25, 0.5]),
        ({"length_threshold": 2, "length_penalty": 0.5}, [3.0, -4.0 - 0.5 * 2, 0.5 - 0.5 * 1]),
        ({"reward_clip": 2.0}, [2.0, -2.0, 0.5]),
        ({"reward_clip": 2.0, "missing_eos": "replace", "missing_eos_value": -3.0}, [2.0, -3.0, 0.5]),
    ],
    ids=str,
)
def test_scores_are_shaped(
    context: Context, rollouts: Make, hand: Make, options: dict[str, Any], expected: list[float]
) -> None:
    made = rollouts([2, 4, 3], [3.0, -4.0, 0.5], finish=["stop", "length", "stop"])
    assert shaped(context, rollouts, hand, made, **options) == pytest.approx(expected, **EXACT)
    assert made.rewards.tolist() == [3.0, -4.0, 0.5]  # metrics keep the raw ones


def test_normalised_scores_are_divided_by_the_running_deviation(context: Context, rollouts: Make, hand: Make) -> None:
    algorithm = ppo(context, kl_coef=0.0, lam=1.0, normalise_rewards=True)
    score = hand(policy={"logp": double([0.0, 0.0])}, value={"values": double([0.0, 0.0])})
    first = algorithm.experience(rollouts([1, 1], [1.0, 3.0]), score)["advantages"]
    close(first, [1.0 / 1.0, 3.0 / 1.0])  # of [1, 3]: mean 2, biased deviation 1
    state = algorithm.state()
    second = algorithm.experience(rollouts([1, 1], [5.0, 7.0]), score)["advantages"]
    deviation = math.sqrt(5.0)  # of [1, 3, 5, 7]: mean 4, squares (9 + 1 + 1 + 9) / 4
    close(second, [5.0 / deviation, 7.0 / deviation])

    again = ppo(context, kl_coef=0.0, lam=1.0, normalise_rewards=True)
    again.load_state(state)
    close(again.experience(rollouts([1, 1], [5.0, 7.0]), score)["advantages"], second.tolist())


def test_adaptive_kl(context: Context, rollouts: Make, hand: Make) -> None:
    options: dict[str, Any] = {"kl_coef": 0.2, "kl_control": "adaptive", "kl_target": 6.0, "kl_horizon": 10_000}
    algorithm = ppo(context, **options)
    zeros = double([0.0] * 128)
    score = hand(policy={"logp": zeros}, reference={"logp": zeros - 4.5}, value={"values": zeros})
    algorithm.experience(rollouts([2] * 64, [0.0] * 64), score)  # 64 responses, each with a KL of 2 x 4.5 nats
    metrics = context.metrics.drain(World())
    assert metrics["kl/sequence"] == 9.0
    algorithm.step_done(metrics)
    assert algorithm.kl_coef == pytest.approx(0.2 * (1 + 0.2 * 64 / 10_000), **EXACT)  # .200256: 9/6 - 1 is cut to .2

    resumed = ppo(context, **options)
    resumed.load_state(algorithm.state())
    assert resumed.kl_coef == algorithm.kl_coef
    found = resumed.experience(rollouts([2] * 64, [0.0] * 64), score)
    assert context.metrics.drain(World())["kl/coef"] == algorithm.kl_coef
    # and it is the one that is used: each token costs 4.5 of it; A_0 = r_0 + lambda r_1, where V is 0
    close(found["advantages"][:2], [-4.5 * algorithm.kl_coef * (1 + 0.95), -4.5 * algorithm.kl_coef])

    fixed = ppo(context, kl_coef=0.2)
    fixed.experience(rollouts([2] * 64, [0.0] * 64), score)
    fixed.step_done(context.metrics.drain(World()))
    assert fixed.kl_coef == 0.2


@pytest.mark.parametrize(("estimator", "kl"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5)])
def test_the_penalty_is_by_the_estimator_asked_for(
    context: Context, rollouts: Make, hand: Make, estimator: str, kl: float
) -> None:
    zero = double([0.0])
    score = hand(policy={"logp": zero - 1.5}, reference={"logp": zero - 1.0}, value={"values": zero})
    algorithm = ppo(context, kl_coef=2.0, kl_estimator=estimator)
    close(algorithm.experience(rollouts([1], [3.0]), score)["advantages"], [3.0 - 2.0 * kl])


def test_without_kl_there_is_no_reference(context: Context, rollouts: Make, hand: Make) -> None:
    assert [role.name for role in ppo_roles(PPOConfig(kl_coef=0.0))] == ["policy", "value"]
    assert [role.name for role in ppo_roles(PPOConfig())] == ["policy", "reference", "value"]
    score = hand(policy={"logp": double(LOGP_OLD)}, value={"values": double(VALUES)})  # asking for another would fail
    ppo(context, kl_coef=0.0).experience(rollouts(LENGTHS, REWARDS), score)
    assert "kl/k1" not in context.metrics.drain(World())


def test_a_batchs_rest_is_left_out_past_one_and_a_half_times_target_kl(context: Context) -> None:
    algorithm = ppo(context, target_kl=0.1)
    assert not algorithm.minibatch_done({"policy/approx_kl": 0.15})
    assert algorithm.minibatch_done({"policy/approx_kl": 0.1500001})
    assert not algorithm.minibatch_done({})  # while the critic warms up there is none
    assert not ppo(context).minibatch_done({"policy/approx_kl": 1e9})


def test_two_fake_ranks_see_what_one_sees(rollouts: Make, hand: Make, fake_ranks: Make) -> None:
    options: dict[str, Any] = {
        "kl_coef": 0.1, "whiten_advantages": True, "whiten_rewards": True, "normalise_rewards": True,
        "kl_control": "adaptive",
    }  # fmt: skip
    halves = ((slice(0, 3), [3], [2.0]), (slice(3, 5), [2], [-0.5]))

    def work(tokens: slice, lengths: list[int], rewards: list[float]) -> Callable[[World], Any]:
        def experience(world: World) -> Any:
            context = Context(plan=None, world=world)  # type: ignore[arg-type]
            algorithm = ppo(context, **options)
            score = hand(
                policy={"logp": double(LOGP_OLD[tokens])},
                reference={"logp": double(LOGP_REF[tokens])},
                value={"values": double(VALUES[tokens])},
            )
            found = algorithm.experience(rollouts(lengths, rewards), score)
            metrics = context.metrics.drain(world)
            algorithm.step_done(metrics)
            return found, metrics, algorithm.state()

        return experience

    first, second = fake_ranks(*(work(*half) for half in halves))
    alone = work(slice(0, 5), LENGTHS, REWARDS)(World())
    for name in ("advantages", "returns", "logp_old", "values_old"):
        close(torch.cat([first[0][name], second[0][name]]), alone[0][name].tolist())
    assert first[1] == second[1] and first[2] == second[2]
    exact = {name: value for name, value in alone[1].items() if name != "value/explained_variance"}
    assert {name: first[1][name] for name in exact} == pytest.approx(exact, **EXACT)
    assert first[2]["kl_coef"] == pytest.approx(alone[2]["kl_coef"], **EXACT)
    assert first[2]["score_stats"] == pytest.approx(alone[2]["score_stats"], **EXACT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl_control": "adaptive", "kl_coef": 0},
        {"missing_eos": "subtract", "missing_eos_value": -1},
        {"critic_warmup": 1, "value_model": "shared"},
        {"clip_range": 1.5},
        {"gamma": 1.5},
        {"lam": -0.1},
        {"epochs": 0},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    config, problems = structure(PPOConfig, wrong, "--algo.")
    assert config is None and problems
    said = str(problems[0]).replace("-", "_")
    assert all(name in said for name in wrong)
