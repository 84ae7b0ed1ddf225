"""Losses without a reference: worked values, gradients by hand, limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_plugins.functional.likelihood import cpo, log_odds, orpo, sft, simpo

SIX = 5e-7  # the values are given to six decimals
EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Chosen: -10 nats over 5 tokens, -2 a token; rejected: -12 over 4, -3 a token.
W, V, N_W, N_V = f64(-10.0), f64(-12.0), torch.tensor([5]), torch.tensor([4])
# Log odds: -2 - log(1 - e^-2) = -1.854586; -3 - log(1 - e^-3) = -2.948931; apart by 1.094344.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float, float]] = {
    "sft": (lambda w, v: sft(w, N_W) + 0 * v, 2.0, -0.2, 0.0),
    # -log s(2 * 1 - 1); slope -s(-1) = -.268941, by 2/5 and 2/4.
    "simpo": (lambda w, v: simpo(w, v, N_W, N_V, 2.0, 1.0), 0.313262, -0.1075766, 0.1344707),
    "cpo": (lambda w, v: cpo(w, v, 0.1), 0.598139, -0.0450166, 0.0450166),  # -log s(.2); .1 s(-.2)
    # .9 * .598139 + .1 * .798139; -.1 (.9 * .450166 - .1 * .549834)
    "cpo, smoothed": (lambda w, v: cpo(w, v, 0.1, 0.1), 0.618139, -0.0350166, 0.0350166),
    # -log s(1.094344); s(-1.094344) = .250801, the odds' slope 1 / (1 - p) / n: 1.156518 / 5 and 1.052396 / 4.
    "orpo": (lambda w, v: orpo(w, v, N_W, N_V), 0.28875, -0.0580112, 0.0659855),
}


@pytest.mark.parametrize("name", LOSSES)
def test_worked_values_and_gradients(name: str) -> None:
    loss, value, by_w, by_l = LOSSES[name]
    w, v = W.clone().requires_grad_(), V.clone().requires_grad_()
    found = loss(w, v)
    assert found.shape == (1,) and found.item() == pytest.approx(value, abs=5e-6 if name == "orpo" else SIX)
    w_grad, v_grad = torch.autograd.grad(found.sum(), (w, v))
    assert w_grad.item() == pytest.approx(by_w, abs=SIX)
    assert v_grad.item() == pytest.approx(by_l, abs=SIX)
    assert torch.autograd.gradcheck(loss, (w, v))


def test_the_papers_sums() -> None:
    """ORPO with lambda .1: 2.0 + .028875; CPO: .598139 + 2.0."""
    assert (0.1 * orpo(W, V, N_W, N_V)).item() == pytest.approx(0.028875, abs=SIX)
    assert (cpo(W, V, 0.1) + sft(W, N_W)).item() == pytest.approx(2.598139, abs=SIX)


def test_limits() -> None:
    """Equal completions: log 2, SimPO's margin aside. Odds of 1/2 are even; certainty is finite, and no worse than
    near it."""
    assert cpo(W, W, 0.3).item() == pytest.approx(math.log(2), abs=EXACT)
    assert orpo(W, W, N_W, N_W).item() == pytest.approx(math.log(2), abs=EXACT)
    assert simpo(W, W, N_W, N_W, 2.0, 0.0).item() == pytest.approx(math.log(2), abs=EXACT)
    assert simpo(W, W, N_W, N_W, 2.0, 1.5).item() == pytest.approx(math.log1p(math.exp(1.5)), abs=EXACT)
    assert log_odds(f64(math.log(0.5))).item() == pytest.approx(0.0, abs=EXACT)
    certain = log_odds(torch.tensor([0.0, -1e-9, -1e-6, -200.0], requires_grad=True))
    assert certain.isfinite().all() and certain[0] == certain[1] and certain[3] == -200.0
    assert certain[2].item() == pytest.approx(-math.log(1e-6), rel=1e-3)  # float32 holds 1 - 1e-6 to 6 % of 1e-6


def test_refusals() -> None:
    none = torch.tensor([0])
    for call in (
        lambda: sft(W, none),
        lambda: simpo(W, V, N_W, none, 2.0, 1.0),
        lambda: simpo(W, V, none, N_V, 2.0, 1.0),
        lambda: orpo(W, V, none, N_V),
        lambda: orpo(W, V, N_W, none),
    ):
        with pytest.raises(ValueError, match="has none"):
            call()
    two = f64(1, 2)
    for call in (lambda: sft(two, N_W), lambda: simpo(two, V, N_W, N_V, 2.0, 1.0), lambda: cpo(two, V, 0.1),
                 lambda: orpo(two, V, N_W, N_V)):  # fmt: skip
        with pytest.raises(ValueError, match="one length"):
            call()
    for beta in (0.0, math.inf):
        with pytest.raises(ValueError, match="beta"):
            cpo(W, V, beta)
        with pytest.raises(ValueError, match="beta"):
            simpo(W, V, N_W, N_V, beta, 1.0)
    with pytest.raises(ValueError, match="gamma"):
        simpo(W, V, N_W, N_V, 2.0, -0.1)
    for smoothing in (-0.1, 0.5):
        with pytest.raises(ValueError, match="label_smoothing"):
            cpo(W, V, 0.1, smoothing)


def test_no_pairs() -> None:
    none, n = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert sft(none, n).shape == simpo(none, none, n, n, 2.0, 1.0).shape == cpo(none, none, 0.1).shape == (0,)
    assert orpo(none, none, n, n).shape == (0,)
