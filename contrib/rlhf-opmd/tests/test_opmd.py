"""OPMD by hand: two prompts with two responses each, every log-prob written down."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf.api import Batch, Context, Experience, Plan, Prompt, Rollouts, Scores, Sequences, Totals
from rlhf_opmd import OPMDConfig
from rlhf_opmd.algorithm import OPMD, group_baseline


class HandScore:
    """A `Score` whose log-probs were written down."""

    def __init__(self, logp: Tensor, old: Tensor) -> None:
        self.logp, self.old = logp, old

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        return Scores(role, logp_=self.logp)

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        return tuple(self(of, role) for role in roles)

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        return self.old


def opmd(**options: Any) -> OPMD:
    return OPMD(OPMDConfig(group_size=2, **options), Context(plan=cast(Plan, None)))


def rollouts(rewards: list[float], lengths: list[int], masks: Any = None) -> Rollouts:
    """Responses two by two to prompts of one token."""
    b = len(lengths)
    sequences = Sequences.of(
        [torch.tensor([9])] * (b // 2),
        [torch.arange(n) for n in lengths],
        prompt_of=[i // 2 for i in range(b)],
        masks=masks,
    )
    return Rollouts(sequences, None, ("stop",) * b, ("row",) * b, ("p",) * b, ("t",) * b, ("",) * b, double(rewards))


def double(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def batch_of(experience: Experience) -> Batch:
    s = experience.sequences
    return Batch(experience, Totals(s.token_count, len(s), s.group_count))


def test_the_baseline_is_the_log_partition_of_the_group() -> None:
    """tau 1, rewards (1, 0): log((e + 1) / 2) = .620115. tau .5: .5 log((e^2 + 1) / 2) = .716890."""
    rewards = double([[1.0, 0.0], [3.0, 3.0]])
    assert group_baseline(rewards, 1.0, "partition").flatten().tolist() == pytest.approx([0.620115, 3.0], abs=1e-6)
    assert group_baseline(rewards, 0.5, "partition").flatten().tolist() == pytest.approx([0.716890, 3.0], abs=1e-6)
    assert group_baseline(rewards, 1.0, "mean").flatten().tolist() == [0.5, 3.0]


def test_its_limits_are_the_mean_and_the_highest_reward() -> None:
    rewards = double([[1.0, 0.0, 0.2]])
    # tau log mean exp(r / tau) = mean + var / (2 tau) + ...: var .187, so at 1e4 it is 9e-6 above
    assert float(group_baseline(rewards, 1e4, "partition")) == pytest.approx(0.4, abs=1e-5)
    # max - tau log G: .0011 below at tau 1e-3
    assert float(group_baseline(rewards, 1e-3, "partition")) == pytest.approx(1.0 - 1e-3 * math.log(3), abs=1e-9)
    assert float(group_baseline(double([[1e6, 0.0]]), 0.1, "partition")) == pytest.approx(1e6, abs=0.1)  # no overflow


def test_a_loss_by_hand() -> None:
    """tau .5, mean baseline, rewards (1, 0), log-ratios of the responses +.2 (.1 + .1) and -.4:
    residuals .5 - .5 x .2 = .4 and -.5 + .5 x .4 = -.3; L = mean(.16, .09) / (2 x .5) = .125."""
    old = double([-1.0, -2.0, -1.5])
    algorithm = opmd(tau=0.5, baseline="mean")
    experience = algorithm.experience(rollouts([1.0, 0.0], [2, 1]), HandScore(old, old))
    assert experience["target"].tolist() == [0.5, -0.5]
    logp = double([-0.9, -1.9, -1.9]).requires_grad_()
    batch = batch_of(experience)
    loss = algorithm.loss(batch, HandScore(logp, old))
    assert loss.item() == pytest.approx(0.125, rel=1e-12)
    assert float(batch.logged["policy/log_ratio"]) == pytest.approx(-0.1, rel=1e-6)  # mean of .2 and -.4; float32
    loss.backward()
    # dL/dlogp_t = -residual / B, the same for each token of a response
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.2, -0.2, 0.15], rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0, 30.0])
def test_where_nothing_has_moved_the_gradient_is_the_policy_gradient_at_any_tau(tau: float) -> None:
    """-(r - b) / B a token: what is above its baseline becomes likelier, what is below it less so."""
    old = double([-1.0, -2.0, -1.5])
    algorithm = opmd(tau=tau, baseline="mean")
    experience = algorithm.experience(rollouts([1.0, 0.0], [2, 1]), HandScore(old, old))
    logp = old.clone().requires_grad_()
    algorithm.loss(batch_of(experience), HandScore(logp, old)).backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.25, -0.25, 0.25], rel=1e-12)


def test_at_the_optimum_of_the_regularised_problem_the_loss_is_zero() -> None:
    """pi* = pi_old exp(r / tau) / Z: log-ratios of (r - b) / tau. Beyond it the gradient turns round."""
    old = double([-1.0, -1.0])
    algorithm = opmd(tau=0.5)
    experience = algorithm.experience(rollouts([1.0, 0.0], [1, 1]), HandScore(old, old))
    optimum = old + experience["target"] / 0.5
    for factor, sign in ((0.5, -1), (1.0, 0), (2.0, 1)):
        logp = (old + factor * (optimum - old)).requires_grad_()
        loss = algorithm.loss(batch_of(experience), HandScore(logp, old))
        loss.backward()
        assert logp.grad is not None
        # the first response is the better one: a gradient below 0 makes it likelier still; 1e-15 is rounding of float64
        assert (0 if abs(float(logp.grad[0])) < 1e-15 else math.copysign(1, float(logp.grad[0]))) == sign
        assert (loss.item() < 1e-30) == (sign == 0)


def test_a_token_that_is_not_the_policys_has_no_part_whatever_it_holds() -> None:
    old = double([-1.0, -math.inf, -1.5])
    algorithm = opmd(tau=0.5, baseline="mean")
    masks = [torch.tensor([True, False]), None]
    experience = algorithm.experience(rollouts([1.0, 0.0], [2, 1], masks), HandScore(old, old))
    logp = double([-0.8, -math.inf, -1.9]).requires_grad_()
    loss = algorithm.loss(batch_of(experience), HandScore(logp, old))
    assert loss.item() == pytest.approx(0.125, rel=1e-12)  # log-ratios .2 and -.4 again
    loss.backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.2, 0.0, 0.15], rel=1e-12)


def test_importance_weighs_a_tokens_gradient_and_leaves_the_loss() -> None:
    old = double([-1.0, -2.0, -1.5])
    algorithm = opmd(tau=0.5, baseline="mean")
    experience = algorithm.experience(rollouts([1.0, 0.0], [2, 1]), HandScore(old, old))
    experience.of_tokens["importance"] = double([1.0, 0.5, 2.0])
    logp = double([-0.9, -1.9, -1.9]).requires_grad_()
    batch = batch_of(experience)
    loss = algorithm.loss(batch, HandScore(logp, old))
    assert batch.corrected
    assert loss.item() == pytest.approx(0.125, rel=1e-12)
    loss.backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.2, -0.1, 0.3], rel=1e-12)


def test_micro_batches_add_up_to_the_whole() -> None:
    old, moved = double([-1.0, -2.0, -1.5, -0.5, -0.7]), double([-0.9, -1.9, -1.9, -0.6, -0.2])
    algorithm = opmd()
    experience = algorithm.experience(rollouts([1.0, 0.0, 0.5, 0.0], [2, 1, 1, 1]), HandScore(old, old))
    whole = algorithm.loss(batch_of(experience), HandScore(moved, old))
    totals = Totals(5, 4, 2)
    parts = [
        algorithm.loss(Batch(experience.select(torch.tensor(rows)), totals), HandScore(moved[tokens], old))
        for rows, tokens in (([0], slice(0, 2)), ([1, 2, 3], slice(2, 5)))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)


def test_a_group_a_prompt_is_asked_for() -> None:
    prompts = [Prompt(torch.tensor([1]), "row", i) for i in range(3)]
    found = opmd().requests(prompts)
    assert [(sample.prompt.index, sample.count, sample.greedy) for sample in found] == [(i, 2, False) for i in range(3)]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        OPMDConfig(tau=0.0)
    with pytest.raises(ValueError, match="must be >= 2"):
        OPMDConfig(group_size=1)  # one alone is its own baseline: its advantage is always 0
    with pytest.raises(ValueError, match="did you mean 'partition'"):
        OPMDConfig(baseline="partitoin")
