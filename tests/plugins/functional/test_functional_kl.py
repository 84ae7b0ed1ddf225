"""KL estimators, the penalised reward and the adaptive coefficient, against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional import kl

F64 = torch.float64
LOGP = torch.tensor([-1.0], dtype=F64)
LOGP_REF = torch.tensor([-1.5], dtype=F64)


# d = -1 + 1.5 = .5; .5^2 / 2 = .125; e^{-.5} = .606531, - 1 + .5 = .106531.
@pytest.mark.parametrize(("name", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_worked_values(name: str, value: float) -> None:
    estimate = kl.ESTIMATORS[name](LOGP, LOGP_REF).item()
    assert estimate == pytest.approx(value, abs=5e-7)  # the value is given to six decimals


# Derivatives by logp at d = .5: 1; d; 1 - e^{-d} = .393469.
@pytest.mark.parametrize(("name", "slope"), [("k1", 1.0), ("k2", 0.5), ("k3", 0.393469)])
def test_gradients_by_hand_and_by_differences(name: str, slope: float) -> None:
    logp = LOGP.clone().requires_grad_()
    (logp_grad,) = torch.autograd.grad(kl.ESTIMATORS[name](logp, LOGP_REF).sum(), logp)
    assert logp_grad.item() == pytest.approx(slope, abs=5e-7)  # six decimals
    both = (torch.tensor([-1.0, -3.0], dtype=F64).requires_grad_(), torch.tensor([-2.0, -0.5], dtype=F64))
    assert torch.autograd.gradcheck(kl.ESTIMATORS[name], (both[0], both[1].requires_grad_()))


def test_estimators_in_expectation_over_a_known_distribution() -> None:
    """Over all outcomes of p = (.5, .5), q = (.25, .75) the exact KL is .5 ln 2 + .5 ln(2/3) = .143841."""
    p, q = torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([0.25, 0.75], dtype=F64)
    exact = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for estimator in (kl.k1, kl.k3):  # the unbiased ones; 1e-12: a few float64 roundings
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-12)
    biased = 0.25 * (math.log(2) ** 2 + math.log(2 / 3) ** 2)  # k2: .161225, not the KL
    assert (p * kl.k2(p.log(), q.log())).sum().item() == pytest.approx(biased, abs=1e-12)


def test_k3_keeps_its_digits_where_the_policies_agree() -> None:
    """At d = 1e-3 float32, k3 = d^2/2 - d^3/6 = 4.99833e-7; exp(-d) - 1 + d without expm1 has no digit of it."""
    d = torch.tensor([1e-3])
    # expm1(-d) and d are near 1e-3, where float32 steps by 1.2e-10: three such steps are 1e-3 of 5e-7
    assert kl.k3(d, torch.zeros(1)).item() == pytest.approx(4.99833e-7, rel=1e-3)


def test_estimators_refuse_broadcasting() -> None:
    for estimator in kl.ESTIMATORS.values():
        with pytest.raises(ValueError, match="one length"):
            estimator(torch.zeros(3), torch.zeros(1))


def test_penalised_rewards_by_hand() -> None:
    """KL (.1, .2, .3) at .1 costs (.01, .02, .03), and the score 1 comes at the end: [-.01, -.02, .97].

    The second response is one token with KL -.5 and score -2: .05 - 2 = -1.95.
    """
    result = kl.penalised_rewards(
        score=torch.tensor([1.0, -2.0], dtype=F64),
        logp_old=torch.tensor([-0.9, -0.8, -0.7, -1.5], dtype=F64),
        logp_ref=torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=F64),
        lengths=torch.tensor([3, 1]),
        kl_coef=0.1,
    )
    assert result.kl_per_token.tolist() == pytest.approx([0.1, 0.2, 0.3, -0.5], abs=1e-12)  # float64 roundings
    assert result.rewards.tolist() == pytest.approx([-0.01, -0.02, 0.97, -1.95], abs=1e-12)


def test_penalised_rewards_use_the_estimator_given() -> None:
    result = kl.penalised_rewards(torch.zeros(1, dtype=F64), LOGP, LOGP_REF, torch.tensor([1]), 2.0, kl.k2)
    assert result.rewards.item() == pytest.approx(-0.25, abs=1e-12)  # -2 * .125


def test_penalised_rewards_with_a_tool_at_the_end() -> None:
    """Own, tool, own, tool: tool tokens pay nothing, whatever they hold, and the score is on the third token."""
    nan = float("nan")
    result = kl.penalised_rewards(
        score=torch.tensor([1.0], dtype=F64),
        logp_old=torch.tensor([-0.9, nan, -0.7, nan], dtype=F64),
        logp_ref=torch.tensor([-1.0, nan, -1.0, nan], dtype=F64),
        lengths=torch.tensor([4]),
        kl_coef=0.1,
        mask=torch.tensor([True, False, True, False]),
    )
    assert result.kl_per_token.tolist() == pytest.approx([0.1, 0.0, 0.3, 0.0], abs=1e-12)
    assert result.rewards.tolist() == pytest.approx([-0.01, 0.0, 0.97, 0.0], abs=1e-12)


def test_penalised_rewards_are_data() -> None:
    logp = torch.tensor([-1.0, -2.0]).requires_grad_()
    result = kl.penalised_rewards(torch.ones(1), logp, torch.zeros(2), torch.tensor([2]), 0.1)
    assert not result.rewards.requires_grad
    assert not result.kl_per_token.requires_grad


def test_penalised_rewards_raise_half_precision() -> None:
    """logp -1 and -1.5 are exact in bfloat16, but the reward 1 - .1 * .5 = .95 is not: its step there is .004."""
    half = torch.bfloat16
    result = kl.penalised_rewards(torch.ones(1), LOGP.to(half), LOGP_REF.to(half), torch.tensor([1]), 0.1)
    assert result.rewards.item() == pytest.approx(0.95, abs=1e-6)  # float32


def test_penalised_rewards_refuse() -> None:
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"\[1\]"):  # an empty response has nowhere for its score
        kl.penalised_rewards(torch.zeros(2), two, two, torch.tensor([2, 0]), 0.1)
    with pytest.raises(ValueError, match="kl_coef"):
        kl.penalised_rewards(torch.zeros(1), two, two, torch.tensor([2]), -0.1)
    with pytest.raises(ValueError, match="one length"):
        kl.penalised_rewards(torch.zeros(1), two, two, torch.tensor([1, 1]), 0.1)
    for logp_old, logp_ref, name in ((two, torch.zeros(3), "logp_ref"), (torch.zeros(3), two, "logp_old")):
        with pytest.raises(ValueError, match=rf"expected {name} \[2\] \(the sum of lengths\), given \[3\]"):
            kl.penalised_rewards(torch.zeros(1), logp_old, logp_ref, torch.tensor([2]), 0.1)


def test_without_a_coefficient_the_reward_is_the_score_and_the_kl_is_told() -> None:
    result = kl.penalised_rewards(torch.ones(1), torch.tensor([-1.0, -2.0]), torch.zeros(2), torch.tensor([2]), 0.0)
    assert result.rewards.tolist() == [0.0, 1.0] and result.kl_per_token.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (9.0, 0.200256),  # 9/6 - 1 = .5, clipped to .2: .2 * (1 + .2 * 64 / 10000)
        (6.6, 0.200128),  # .1, not clipped: .2 * (1 + .1 * .0064)
        (6.0, 0.2),  # on target
        (5.4, 0.199872),  # -.1
        (0.0, 0.199744),  # -1, clipped to -.2
        (-3.0, 0.199744),  # k1 summed may be negative
    ],
)
def test_adaptive_kl_by_hand(measured: float, expected: float) -> None:
    assert kl.adaptive_kl_coef(0.2, measured, 6.0, 64, 10000) == pytest.approx(expected, abs=1e-12)  # float64


def test_adaptive_kl_refuses() -> None:
    with pytest.raises(ValueError, match="finite"):
        kl.adaptive_kl_coef(0.2, float("nan"), 6.0, 64, 10000)
    for coef, target, n, horizon in (
        (0.2, 0.0, 64, 1e4),
        (0.2, 6.0, 0, 0.0),
        (-0.2, 6.0, 64, 1e4),
        (0.2, 6.0, -1, 1e4),
    ):
        with pytest.raises(ValueError, match="target > 0"):
            kl.adaptive_kl_coef(coef, 9.0, target, n, horizon)
    with pytest.raises(ValueError, match="5 \\* horizon"):
        kl.adaptive_kl_coef(0.2, 0.0, 6.0, 600, 100)


def test_adaptive_kl_at_its_limits() -> None:
    """Twice the target: + .2 a horizon. At n = 5 horizons, coef (1 + .2 x 5) = 2 coef; on none, nothing changes."""
    assert kl.adaptive_kl_coef(0.1, 1.0, 0.5, 5, 1.0) == pytest.approx(0.2, abs=1e-12)
    assert kl.adaptive_kl_coef(0.1, 1.0, 0.5, 1, 0.5) == pytest.approx(0.1 * 1.4, abs=1e-12)
    assert kl.adaptive_kl_coef(0.1, 1.0, 0.5, 0, 1.0) == 0.1
    assert kl.adaptive_kl_coef(0.0, 1.0, 0.5, 1, 1.0) == 0.0
