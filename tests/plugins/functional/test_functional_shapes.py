"""Ratios of responses, the losses of CISPO, SAPO, VESPO and DPPO: the worked numbers and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional.shapes import cispo_loss, dppo_loss, response_log_ratio, sapo_loss, vespo_loss

EXACT = 1e-12  # float64 values of order 1 after a few operations
WORKED = 5e-7  # numbers written down to six digits


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_responses_ratio_is_the_mean_of_its_log_ratios() -> None:
    """[.1, -.2, .4] -> exp(.1) = 1.105171; a second response of one token has its own."""
    old = f64(-1, -2, -3, -1)
    logp = (old + f64(0.1, -0.2, 0.4, 0.7)).requires_grad_()
    found = response_log_ratio(logp, old, torch.tensor([3, 1]))
    assert found.exp().tolist() == pytest.approx([1.105171] * 3 + [math.exp(0.7)], abs=WORKED)
    (grad,) = torch.autograd.grad((found * f64(1, 2, 3, 4)).sum(), logp)
    assert grad.tolist() == [1.0, 2.0, 3.0, 4.0]  # to each token's own log-prob alone
    summed = response_log_ratio(logp, old, torch.tensor([3, 1]), mean=False)
    assert summed.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.7], abs=EXACT)


def test_a_tools_tokens_are_not_in_a_responses_ratio() -> None:
    own = torch.tensor([True, False, True])
    logp = f64(-0.9, 500.0, -2.6).requires_grad_()
    found = response_log_ratio(logp, f64(-1, -1, -3), torch.tensor([3]), own)
    assert found.tolist() == pytest.approx([0.25, 0.0, 0.25], abs=EXACT)
    (grad,) = torch.autograd.grad(found.sum(), logp)
    assert grad.tolist() == [1.0, 0.0, 1.0]


# A, rho, logp, cap, loss, d loss / d logp = -min(rho, cap) A
@pytest.mark.parametrize(
    ("advantage", "rho", "logp", "cap", "loss", "slope"),
    [(1, 1.5, -1, 5.0, 1.5, -1.5), (1, 7, -1, 5.0, 5.0, -5.0), (-2, 0.5, -3, 5.0, -3.0, 1.0)],
)
def test_cispo_by_hand(advantage: float, rho: float, logp: float, cap: float, loss: float, slope: float) -> None:
    new = f64(logp).requires_grad_()
    found = cispo_loss(new, f64(logp - math.log(rho)), f64(advantage), cap)
    assert found.losses.item() == pytest.approx(loss, abs=EXACT)
    assert found.clipped.tolist() == [rho > cap] and found.ratio.item() == pytest.approx(rho, abs=EXACT)
    (grad,) = torch.autograd.grad(found.losses.sum(), new)
    assert grad.item() == pytest.approx(slope, abs=EXACT)  # kept beyond the cap, where PPO's is 0


def test_sapo_by_hand() -> None:
    """4 sigmoid(.5) = 2.489837; for A < 0 the other temperature."""
    logp = f64(math.log(1.5), math.log(0.5)).requires_grad_()
    found = sapo_loss(logp, f64(0, 0), f64(1, -1), 1.0, 2.0)
    low = 2 / (1 + math.exp(1.0))  # (4 / 2) sigmoid(2 (.5 - 1))
    assert found.losses.tolist() == pytest.approx([-2.489837, low], abs=WORKED)
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    s, t = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.0))
    assert grad.tolist() == pytest.approx([-4 * s * (1 - s) * 1.5, 4 * t * (1 - t) * 0.5], abs=EXACT)


def test_sapo_fades_to_nothing_however_far() -> None:
    logp = torch.tensor([5.0, 30.0, 89.0, 1000.0], requires_grad=True)  # of these e^89 is the first that is no float32
    found = sapo_loss(logp, torch.zeros(4), torch.ones(4), 1.0, 1.05)
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert found.losses.tolist() == [-4.0] * 4 and grad.abs().max() < 1e-3 and grad[1:].tolist() == [0.0] * 3


def test_sapo_is_the_policy_gradient_at_ratio_one() -> None:
    logp = f64(-1, -2).requires_grad_()
    found = sapo_loss(logp, f64(-1, -2), f64(3, -2), 1.0, 1.05)
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert grad.tolist() == pytest.approx([-3.0, 2.0], abs=EXACT)


def test_masked_tokens_have_exactly_no_loss_and_no_gradient() -> None:
    own = torch.tensor([True, False, False])
    for loss in (
        lambda logp: cispo_loss(logp, f64(-1, -2, -2), f64(1, 1, math.nan), 5.0, own),
        lambda logp: sapo_loss(logp, f64(-1, -2, -2), f64(1, 1, math.nan), 1.0, 1.05, own),
    ):
        logp = f64(-1, 500, math.nan).requires_grad_()
        found = loss(logp)
        assert found.losses[1:].tolist() == [0.0, 0.0] and found.ratio[1:].isfinite().all()
        (grad,) = torch.autograd.grad(found.losses.sum(), logp)
        assert grad[1:].tolist() == [0.0, 0.0] and grad[0] == pytest.approx(-1.0, abs=EXACT)


def test_what_cannot_be_meant_is_refused() -> None:
    one = f64(1)
    with pytest.raises(ValueError, match="cap > 0"):
        cispo_loss(one, one, one, 0.0)
    with pytest.raises(ValueError, match="temperatures > 0"):
        sapo_loss(one, one, one, 1.0, 0.0)
    for function in (lambda: cispo_loss(one, f64(1, 2), one, 5.0), lambda: sapo_loss(one, f64(1, 2), one, 1.0, 1.0)):
        with pytest.raises(ValueError, match="of one length"):
            function()


# VESPO

POWERS, RATES = (2.0, 4.0), (3.0, 1.0)


def test_vespo_by_hand() -> None:
    """Responses of 2, 1 and 1 tokens. Log W of the first: .5 - .2 = .3, A = 1: W = 1.349859, and phi is
    exp(2 x .3 + 3 x -.349859) = .637898. Of the second: .1, A = -2: W = 1.105171, phi = exp(4 x .1 - .105171) =
    1.342897. The third has A = 0."""
    old = f64(-1, -2, -3, -1)
    logp = (old + f64(0.5, -0.2, 0.1, 0.4)).requires_grad_()
    found = vespo_loss(logp, old, f64(1, 1, -2, 0), torch.tensor([2, 1, 1]), POWERS, RATES)
    good, bad = 0.637898, 1.342897
    expected = [good * 0.5, good * 2.2, -bad * 2 * 2.9, 0.0]  # -phi A logp
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-5)  # phi to six digits, times up to 5.8
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert grad.tolist() == pytest.approx([-good, -good, 2 * bad, 0.0], abs=2e-6)  # phi is no function of logp
    assert found.ratio.tolist() == pytest.approx([math.exp(x) for x in (0.5, -0.2, 0.1, 0.4)], abs=EXACT)
    assert not found.clipped.any()


def test_vespos_weight_is_1_at_the_old_policy_and_fades_to_both_sides() -> None:
    def weight(log_w: float, advantage: float) -> float:
        logp = f64(log_w).requires_grad_()
        found = vespo_loss(logp, f64(0), f64(advantage), torch.tensor([1]), POWERS, RATES)
        (grad,) = torch.autograd.grad(found.losses.sum(), logp)
        return -float(grad) / advantage

    assert weight(0, 1) == weight(0, -1) == 1.0
    for advantage, peak in ((1.0, math.log(2 / 3)), (-1.0, math.log(4.0))):  # at W = k / lambda
        assert weight(peak, advantage) > max(weight(peak - 0.1, advantage), weight(peak + 0.1, advantage))
        assert weight(500, advantage) == 0.0 and weight(-500, advantage) < 1e-15  # and no infinity


def test_a_tools_tokens_are_not_in_vespos_ratio() -> None:
    own = torch.tensor([True, False, True])
    logp = f64(-0.9, 500.0, -2.6).requires_grad_()
    found = vespo_loss(logp, f64(-1, -1, -3), f64(1, 1, 1), torch.tensor([3]), POWERS, RATES, own)
    phi = math.exp(2 * 0.5 + 3 * (1 - math.exp(0.5)))  # log W = .1 + .4
    assert found.losses.tolist() == pytest.approx([phi * 0.9, 0.0, phi * 2.6], abs=EXACT)
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert grad.tolist() == pytest.approx([-phi, 0.0, -phi], abs=EXACT)


# DPPO

# p, q, A, threshold kept and left out: total variation |p - q|, then KL of the two outcomes
BINARY = [
    (0.6, 0.5, 1.0, 0.1, "tv"),
    (0.5, 0.6, -1.0, 0.1, "tv"),
    (0.6, 0.5, 1.0, 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4), "kl"),
    (0.1, 0.9, -2.0, 0.9 * math.log(9) - 0.1 * math.log(9), "kl"),
]


@pytest.mark.parametrize(("p", "q", "advantage", "distance", "divergence"), BINARY)
def test_dppo_leaves_out_what_has_gone_further(
    p: float, q: float, advantage: float, distance: float, divergence: str
) -> None:
    for factor, left_out in ((0.999, True), (1.001, False)):
        low, high = (factor * distance, 9.0) if advantage < 0 else (9.0, factor * distance)
        logp = f64(math.log(p)).requires_grad_()
        found = dppo_loss(logp, f64(math.log(q)), f64(advantage), divergence, low, high, 20.0)  # type: ignore[arg-type]
        assert found.clipped.tolist() == [left_out]
        (grad,) = torch.autograd.grad(found.losses.sum(), logp)
        assert grad.item() == pytest.approx(0.0 if left_out else -p / q * advantage, abs=EXACT)
        assert found.losses.item() == pytest.approx(0.0 if left_out else -p / q * advantage * math.log(p), abs=EXACT)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize(("p", "q", "advantage"), [(0.1, 0.9, 1.0), (0.9, 0.1, -1.0)])
def test_dppo_never_holds_a_token_on_its_way_back(p: float, q: float, advantage: float, divergence: str) -> None:
    found = dppo_loss(f64(math.log(p)), f64(math.log(q)), f64(advantage), divergence, 0.0, 0.0, 20.0)  # type: ignore[arg-type]
    assert found.clipped.tolist() == [False] and found.losses.item() != 0.0


def test_dppo_bounds_the_weight_and_survives_a_token_that_is_sure() -> None:
    logp = f64(0.0, 0.0, -1.0).requires_grad_()
    found = dppo_loss(logp, f64(0.0, -5.0, -1.0), f64(1, -1, 1), "kl", 0.05, 0.05, 20.0)
    assert found.ratio.tolist() == pytest.approx([1.0, math.exp(5), 1.0], abs=1e-9)  # exp of 5, 1e-11 of it
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert grad.tolist() == [-1.0, 20.0, -1.0]  # the second is on its way back, whatever its ratio
    masked = torch.tensor([True, False, True])
    logp = f64(-1.0, 500.0, -1.0).requires_grad_()
    found = dppo_loss(logp, f64(-1.0, -500.0, -1.0), f64(1, 1, 1), "kl", 0.05, 0.05, 20.0, masked)
    (grad,) = torch.autograd.grad(found.losses.sum(), logp)
    assert found.losses.isfinite().all() and grad.tolist() == [-1.0, 0.0, -1.0]


def test_numbers_that_cannot_be_meant_are_refused() -> None:
    x, one = f64(-1), torch.tensor([1])
    with pytest.raises(ValueError, match="expected powers and rates > 0"):
        vespo_loss(x, x, x, one, (0.0, 1.0), RATES)
    with pytest.raises(ValueError, match="expected deltas >= 0 and cap > 0"):
        dppo_loss(x, x, x, "tv", -0.1, 0.1, 20.0)
    with pytest.raises(ValueError, match="expected deltas >= 0 and cap > 0"):
        dppo_loss(x, x, x, "tv", 0.1, 0.1, 0.0)
