"""Preference losses: the worked table, gradients by hand, the first step, and scores of +-1000."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_plugins.algorithms.preferences import DPO_LOSSES, DPO_SMOOTHED
from rlhf_plugins.functional.preference import (
    LOSSES,
    PreferenceLoss,
    bradley_terry,
    discopop,
    divergence_score,
    hinge,
    ipo,
    sigmoid,
)

F64 = torch.float64
SIX = 5e-7  # the values are given to six decimals
EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


SMOOTHING = {"exo_pair": 0.1}
"""Of losses that can't do without."""


def extra(loss: PreferenceLoss) -> dict[str, Any]:
    return {"label_smoothing": 0.1} if loss is LOSSES["exo_pair"] else {}


C, R, BETA = f64(1.0), f64(-0.5), 0.1  # D = 1.5
N_CHOSEN, N_REJECTED = torch.tensor([5]), torch.tensor([4])


# s(.1) = .524979, s(.05) = .512497, s(.15) = .537430; -log s: .644397, .668460, .620957; of -x: x more.
WORKED = [
    ("sigmoid", 0.0, 0.620957),
    ("hinge", 0.0, 0.85),  # 1 - .15
    ("ipo", 0.0, 21.855625),  # (.2 + .125 - 5)^2
    ("exo_pair", 1e-3, 2.505517),  # .537430 (-.620957 + .001001) + .462570 (-.770957 + 6.907755)
    ("nca_pair", 0.0, 1.350825),  # .644397 + (.744397 + .668460) / 2
    ("robust", 0.1, 0.602207),  # (.9 * .620957 - .1 * .770957) / .8
    ("bco_pair", 0.0, 1.312856),  # .644397 + .668460
    ("sppo_hard", 0.0, 36.25),  # (1 - 5)^2 + (-.5 + 5)^2
    ("apo_zero", 0.0, 0.962523),  # 1 - .524979 + (1 - .512497)
    ("apo_down", 0.0, 0.987549),  # .524979 + 1 - .537430
    ("discopop", 0.0, 0.849338),  # m = s(3) = .952574: .620957 * .047426 + .860708 * .952574
    ("sigmoid_norm", 0.0, 0.677029),  # -log s(.1 * .325)
]


@pytest.mark.parametrize(("name", "smoothing", "value"), WORKED)
def test_worked_values(name: str, smoothing: float, value: float) -> None:
    assert LOSSES[name](C, R, BETA, N_CHOSEN, N_REJECTED, smoothing).item() == pytest.approx(value, abs=SIX)


def test_each_loss_has_a_worked_value_and_is_offered() -> None:
    assert [name for name, _, _ in WORKED] == list(LOSSES)
    assert (*LOSSES, "aot", "aot_unpaired", "sft") == DPO_LOSSES


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
        # q q' beta (log q/p - log q'/p') with q = .537430, q' = .462570: .0248599 * (.15 - log .999/.001).
        ("exo_pair", 1e-3, -0.1679724, 0.1679724),
        # by c: -.1 (s(-.1) - .5 s(.1)) = -.1 (.475021 - .262490). by r: .05 s(-.05) = .05 * .487503.
        ("nca_pair", 0.0, -0.0212531, 0.0243751),
        # -.1 (.9 * .462570 + .1 * .537430) / .8: the swapped label's term pulls the same way.
        ("robust", 0.1, -0.0587570, 0.0587570),
        ("bco_pair", 0.0, -0.0475021, 0.0487503),  # -.1 s(-.1), .1 s(-.05)
        ("sppo_hard", 0.0, -8.0, 9.0),  # 2 (1 - 5), 2 (-.5 + 5)
        # s' = s (1 - s). -.1 s'(.1), .1 s'(.05): .249376, .249844.
        ("apo_zero", 0.0, -0.0249376, 0.0249844),
        ("apo_down", 0.0, 0.0000777, 0.0248599),  # .1 (.249376 - .248599), .1 s'(.15)
        # .1 [-(1 - m) s(-.15) - e^-.15 m + (m'/tau)(e^-.15 + log s(.15))], m' = .0451767: the last .216623.
        ("discopop", 0.0, -0.0625203, 0.0625203),
        # -.1 s(-.0325) = .1 * .491876, by the lengths 5 and 4.
        ("sigmoid_norm", 0.0, -0.0098375, 0.0122969),
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


def test_limits_of_the_family() -> None:
    """robust without noise is DPO; its mean over swapped labels is DPO's loss; exo is 0 where s(beta D) = 1 - eps;
    sigmoid_norm of one token is DPO; discopop of a large tau is the plain mean of both."""
    one = torch.ones(1)
    plain = sigmoid(C, R, BETA, one, one)
    assert LOSSES["robust"](C, R, BETA, one, one).item() == pytest.approx(plain.item(), abs=EXACT)
    right, swapped = LOSSES["robust"](C, R, BETA, one, one, 0.2), LOSSES["robust"](R, C, BETA, one, one, 0.2)
    assert (0.8 * right + 0.2 * swapped).item() == pytest.approx(plain.item(), abs=EXACT)
    even = f64(math.log(0.9 / 0.1) / BETA)
    assert LOSSES["exo_pair"](even, f64(0), BETA, one, one, 0.1).item() == pytest.approx(0.0, abs=EXACT)
    assert LOSSES["sigmoid_norm"](C, R, BETA, one, one).item() == pytest.approx(plain.item(), abs=EXACT)
    half = discopop(C, R, BETA, one, one, tau=1e9).item()
    assert half == pytest.approx((plain.item() + math.exp(-0.15)) / 2, abs=1e-9)  # m = .5 + 4e-11


def test_the_family_is_finite_where_the_model_is_very_wrong() -> None:
    for name, loss in LOSSES.items():
        c = torch.tensor([-1000.0, 1000.0]).requires_grad_()
        losses = loss(c, torch.tensor([1000.0, -1000.0]), 1.0, torch.ones(2), torch.ones(2), SMOOTHING.get(name, 0.0))
        (grad,) = torch.autograd.grad(losses.sum(), c)
        assert losses.isfinite().all() and grad.isfinite().all(), name


# beta = .1 of the worked pair. forward: D = (1 - e^-1) - (1 - e^.5) = 1.280842. js: log s(1) - log s(-.5) = .660815.
# alpha .5: 2 (e^.25 - e^-.5) = 1.354989; .3: (e^.15 - e^-.3) / .3 = 1.403387.
@pytest.mark.parametrize(
    ("divergence", "alpha", "value"),
    [
        ("reverse_kl", 0.5, 0.620957),
        ("forward_kl", 0.5, 0.631154),
        ("js", 0.5, 0.660652),
        ("alpha", 0.5, 0.627691),
        ("alpha", 0.3, 0.625438),
        ("alpha", 1.0, 0.631154),
        ("alpha", 1e-6, 0.620957),
    ],
)
def test_divergences(divergence: str, alpha: float, value: float) -> None:
    c, r = divergence_score(C, divergence, alpha), divergence_score(R, divergence, alpha)
    assert sigmoid(c, r, BETA, N_CHOSEN, N_REJECTED).item() == pytest.approx(value, abs=SIX)


@pytest.mark.parametrize(
    ("divergence", "slope"), [("reverse_kl", 1.0), ("forward_kl", 1.0), ("js", 0.5), ("alpha", 1.0)]
)
def test_divergences_at_the_reference_and_far_from_it(divergence: str, slope: float) -> None:
    x = f64(0.0).requires_grad_()
    score = divergence_score(x, divergence)
    (by_x,) = torch.autograd.grad(score.sum(), x)
    assert score.item() == pytest.approx(0.0, abs=EXACT) and by_x.item() == pytest.approx(slope, abs=EXACT)
    far = divergence_score(torch.tensor([-1000.0, 1000.0]), divergence)
    assert far.isfinite().all() and far[0] < far[1]
    assert (far.square() * 4).isfinite().all()  # what ipo makes of a difference of two


def test_divergences_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="expected reverse_kl"):
        divergence_score(C, "tv")
    for alpha in (0.0, 1.01):
        with pytest.raises(ValueError, match="alpha"):
            divergence_score(C, "alpha", alpha)


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
        together = loss(c, r, 0.7, n_chosen, n_rejected, **extra(loss))
        for i in range(3):
            s = slice(i, i + 1)
            assert loss(c[s], r[s], 0.7, n_chosen[s], n_rejected[s], **extra(loss)).item() == together[i].item()


def test_no_pairs() -> None:
    none = torch.zeros(0)
    for loss in LOSSES.values():
        assert loss(none, none, 0.1, none, none, **extra(loss)).shape == (0,)
    assert bradley_terry(none, none, None, 0.1).shape == (0,)


def test_refusals() -> None:
    two, one = torch.ones(2), torch.ones(1)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"r \[1\]"):
            loss(two, one, 0.1, two, two)
        with pytest.raises(ValueError, match="beta"):
            loss(two, two, 0.0, two, two)
    for name, loss in LOSSES.items():
        if name not in DPO_SMOOTHED:
            with pytest.raises(ValueError, match="label smoothing"):
                loss(two, two, 0.1, two, two, 0.1)
    for wrong in (0.0, 0.5):
        with pytest.raises(ValueError, match="exo_pair needs"):
            LOSSES["exo_pair"](two, two, 0.1, two, two, wrong)
    for wrong in (-0.1, 0.5):
        with pytest.raises(ValueError, match="label_smoothing"):
            LOSSES["robust"](two, two, 0.1, two, two, wrong)
    with pytest.raises(ValueError, match="tau"):
        discopop(two, two, 0.1, two, two, tau=0.0)
    for smoothing in (-0.1, 0.501):
        with pytest.raises(ValueError, match="label_smoothing"):
            sigmoid(two, two, 0.1, two, two, smoothing)
    for n_chosen, n_rejected in ((two * 0, two), (two, two * 0)):
        with pytest.raises(ValueError, match="no tokens"):
            ipo(two, two, 0.1, n_chosen, n_rejected)
        with pytest.raises(ValueError, match="no tokens"):
            LOSSES["sigmoid_norm"](two, two, 0.1, n_chosen, n_rejected)
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
