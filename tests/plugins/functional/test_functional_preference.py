"""Preference losses: the worked table, gradients by hand, the first step, and scores of +-1000."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional.preference import LOSSES, bradley_terry, hinge, ipo, sigmoid

F64 = torch.float64
SIX = 5e-7  # the values are given to six decimals
EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


C, R, BETA = f64(1.0), f64(-0.5), 0.1  # D = 1.5
N_CHOSEN, N_REJECTED = torch.tensor([5]), torch.tensor([4])


# sigmoid: -log s(.15). ipo: (.2 + .125 - 5)^2. hinge: 1 - .15.
@pytest.mark.parametrize(("name", "value"), [("sigmoid", 0.620957), ("ipo", 21.855625), ("hinge", 0.85)])
def test_worked_values(name: str, value: float) -> None:
    assert LOSSES[name](C, R, BETA, N_CHOSEN, N_REJECTED).item() == pytest.approx(value, abs=SIX)


def test_cdpo_worked_value() -> None:
    """.9 * .620957 + .1 * .770957 = .635957 (-log s(-x) = x - log s(x))."""
    assert sigmoid(C, R, BETA, N_CHOSEN, N_REJECTED, 0.1).item() == pytest.approx(0.635957, abs=SIX)


# By c and r. sigmoid: -+beta s(-.15) = -+.1 * .462570. cdpo: -+.1 * (.9 * .462570 - .1 * .537430).
# ipo: 2 * (-4.675) / 5 and -2 * (-4.675) / 4. hinge: -+.1.
@pytest.mark.parametrize(
    ("name", "smoothing", "by_c", "by_r"),
    [
        ("sigmoid", 0.0, -0.0462570, 0.0462570),
        ("sigmoid", 0.1, -0.0362570, 0.0362570),
        ("ipo", 0.0, -1.87, 2.3375),
        ("hinge", 0.0, -0.1, 0.1),
    ],
)
def test_gradients_by_hand_and_by_differences(name: str, smoothing: float, by_c: float, by_r: float) -> None:
    c, r = C.clone().requires_grad_(), R.clone().requires_grad_()
    c_grad, r_grad = torch.autograd.grad(LOSSES[name](c, r, BETA, N_CHOSEN, N_REJECTED, smoothing).sum(), (c, r))
    assert c_grad.item() == pytest.approx(by_c, abs=SIX)
    assert r_grad.item() == pytest.approx(by_r, abs=SIX)
    many_c, many_r = f64(3, -2, 0.5).requires_grad_(), f64(-1, 4, 0.25).requires_grad_()
    n = torch.tensor([3, 7, 1])
    assert torch.autograd.gradcheck(lambda c, r: LOSSES[name](c, r, 0.7, n, n.flip(0), smoothing), (many_c, many_r))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_first_step_of_dpo_is_log_two(smoothing: float) -> None:
    """With the policy still the reference, c = r = 0, whatever beta and the smoothing."""
    zero, n = torch.zeros(3, dtype=F64), torch.ones(3)
    losses = sigmoid(zero, zero, 0.3, n, n, smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=EXACT)


def test_first_step_of_hinge_and_ipo() -> None:
    zero, n = f64(0), torch.tensor([3])
    assert hinge(zero, zero, 0.1, n, n).item() == 1.0
    assert ipo(zero, zero, 0.5, n, n).item() == 1.0  # (0 - 1 / (2 * .5))^2


def test_limits_of_the_sigmoid_loss_are_finite_with_finite_gradients() -> None:
    """At beta D = +-1000: 0 with gradient 0, and 1000 with gradient -beta; log(sigmoid) would give infinity."""
    c = torch.tensor([1000.0, -1000.0]).requires_grad_()
    r = torch.zeros(2)
    losses = sigmoid(c, r, 1.0, torch.ones(2), torch.ones(2))
    assert losses.tolist() == [0.0, 1000.0]
    (c_grad,) = torch.autograd.grad(losses.sum(), c)
    assert c_grad.tolist() == [0.0, -1.0]
    smoothed = sigmoid(c.detach(), r, 1.0, torch.ones(2), torch.ones(2), 0.25)
    assert smoothed.tolist() == [250.0, 750.0]  # exact: quarters of 1000


def test_hinge_stops_past_the_margin() -> None:
    """At beta .1 the margin is D = 10."""
    c = f64(9.0, 11.0).requires_grad_()
    losses = hinge(c, f64(0, 0), 0.1, torch.ones(2), torch.ones(2))
    assert losses.tolist() == pytest.approx([0.1, 0.0], abs=EXACT)
    (c_grad,) = torch.autograd.grad(losses.sum(), c)
    assert c_grad.tolist() == pytest.approx([-0.1, 0.0], abs=EXACT)


def test_pairs_are_independent() -> None:
    c, r = f64(3, -2, 0.5), f64(-1, 4, 0.25)
    n_chosen, n_rejected = torch.tensor([3, 7, 1]), torch.tensor([2, 2, 9])
    for loss in LOSSES.values():
        together = loss(c, r, 0.7, n_chosen, n_rejected)
        for i in range(3):
            s = slice(i, i + 1)
            assert loss(c[s], r[s], 0.7, n_chosen[s], n_rejected[s]).item() == together[i].item()


def test_no_pairs() -> None:
    none = torch.zeros(0)
    for loss in LOSSES.values():
        assert loss(none, none, 0.1, none, none).shape == (0,)
    assert bradley_terry(none, none, None, 0.1).shape == (0,)


def test_refusals() -> None:
    two, one = torch.ones(2), torch.ones(1)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"r \[1\]"):
            loss(two, one, 0.1, two, two)
        with pytest.raises(ValueError, match="beta"):
            loss(two, two, 0.0, two, two)
    for unsmoothed in (ipo, hinge):
        with pytest.raises(ValueError, match="label smoothing"):
            unsmoothed(two, two, 0.1, two, two, 0.1)
    for smoothing in (-0.1, 0.501):
        with pytest.raises(ValueError, match="label_smoothing"):
            sigmoid(two, two, 0.1, two, two, smoothing)
    for n_chosen, n_rejected in ((two * 0, two), (two, two * 0)):
        with pytest.raises(ValueError, match="no tokens"):
            ipo(two, two, 0.1, n_chosen, n_rejected)
    with pytest.raises(ValueError, match=r"r_rejected \[1\]"):
        bradley_terry(two, one, None, 0.0)
    with pytest.raises(ValueError, match=r"margin \[1\]"):
        bradley_terry(two, two, one, 0.0)
    with pytest.raises(ValueError, match="centre_coef"):
        bradley_terry(two, two, None, -0.1)


def test_bradley_terry_by_hand() -> None:
    """r = 2, .5. No margin: log(1 + e^{-1.5}) = .201413. Margin 1: log(1 + e^{-.5}) = .474077. Centring .01 * 6.25."""
    chosen, rejected = f64(2.0), f64(0.5)
    assert bradley_terry(chosen, rejected, None, 0.0).item() == pytest.approx(0.201413, abs=SIX)
    assert bradley_terry(chosen, rejected, f64(1.0), 0.0).item() == pytest.approx(0.474077, abs=SIX)
    assert bradley_terry(chosen, rejected, f64(1.0), 0.01).item() == pytest.approx(0.536577, abs=SIX)


def test_bradley_terry_gradient() -> None:
    """At margin 1, coefficient .01: by r_chosen -s(-.5) + .02 * 2.5 = -.377541 + .05; by r_rejected .377541 + .05."""
    chosen, rejected = f64(2.0).requires_grad_(), f64(0.5).requires_grad_()
    loss = bradley_terry(chosen, rejected, f64(1.0), 0.01).sum()
    chosen_grad, rejected_grad = torch.autograd.grad(loss, (chosen, rejected))
    assert chosen_grad.item() == pytest.approx(-0.327541, abs=SIX)
    assert rejected_grad.item() == pytest.approx(0.427541, abs=SIX)
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, f64(1.0), 0.01), (chosen, rejected))


def test_bradley_terry_is_stable_and_shift_free_without_centring() -> None:
    losses = bradley_terry(torch.tensor([1000.0, 0.0, 1e6]), torch.tensor([0.0, 1000.0, 1e6]), None, 0.0)
    assert losses.tolist() == pytest.approx([0.0, 1000.0, math.log(2)], abs=1e-6)  # float32
