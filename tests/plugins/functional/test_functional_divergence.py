"""Divergences of whole distributions: worked values, slopes against autograd, limits, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_plugins.functional.divergence import KINDS, divergence

EXACT = 1e-12  # float64 values of order 1 after a few operations

# The policy says 1/2, 1/4, 1/4; the teacher 1/8, 1/4, 5/8.
P = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).div(4).log()
Q = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).div(8).log()


def by_hand(kind: str, beta: float) -> float:
    p, q = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 4, 5 / 8]
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "js": beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]


@pytest.mark.parametrize(
    ("kind", "beta", "value"),
    [
        ("forward_kl", 0.5, 0.399395),  # (1/8) log(1/4) + (5/8) log(5/2) = -.173287 + .572682
        ("reverse_kl", 0.5, 0.464074),  # (1/2) log 4 + (1/4) log(2/5) = .693147 - .229073
        ("js", 0.5, 0.101742),  # m = 5/16, 1/4, 7/16: half of KL(q || m) = .108386 and half of KL(p || m) = .095098
        ("js", 0.1, 0.035815),  # m = .4625, .25, .2875: .1 x .321789 + .9 x .004040
    ],
)
def test_worked_values(kind: str, beta: float, value: float) -> None:
    found, _ = divergence(P, Q, kind, beta)
    assert float(found) == pytest.approx(by_hand(kind, beta), abs=EXACT)
    assert float(found) == pytest.approx(value, abs=5e-7)  # written down to six digits


def dense(z: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """The definition, by autograd over all of it."""
    log_p = torch.log_softmax(z, -1)
    p, q = log_p.exp(), log_q.exp()
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "js": beta * (q * (log_q - m.log())).sum(-1) + (1 - beta) * (p * (log_p - m.log())).sum(-1),
    }[kind]


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_autograds(kind: str, beta: float) -> None:
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(5, 11, generator=draw, dtype=torch.float64).mul(3).requires_grad_()
    log_q = torch.log_softmax(3 * torch.randn(5, 11, generator=draw, dtype=torch.float64), -1)
    expected = dense(z, log_q, kind, beta)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    found, own = divergence(torch.log_softmax(z.detach(), -1), log_q, kind, beta)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=EXACT)
    torch.testing.assert_close(own, slope, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_teachers_own_distribution_it_is_0_and_flat(kind: str) -> None:
    found, slope = divergence(P, P.clone(), kind)
    assert float(found) == pytest.approx(0, abs=EXACT) and slope.abs().max() < EXACT


@pytest.mark.parametrize(("beta", "kind"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_js_tends_to_either_kl(beta: float, kind: str) -> None:
    """Divided by the small one of beta and 1 - beta; what is left over is as small as that, 1e-7 times about 1."""
    small = min(beta, 1 - beta)
    found, slope = divergence(P, Q, "js", beta)
    expected, of_it = divergence(P, Q, kind)
    # float64 rounds the divergence itself, 1e-7, to 1e-16 of what it is a difference of: 1e-9 once divided
    assert float(found) / small == pytest.approx(float(expected), abs=1e-6)
    torch.testing.assert_close(slope / small, of_it, rtol=0, atol=1e-6)


def test_its_arguments_are_left_as_they_are() -> None:
    for kind in KINDS:
        p, q = P.clone(), Q.clone()
        divergence(p, q, kind)
        assert torch.equal(p, P) and torch.equal(q, Q)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        divergence(P, Q[:, :2], "js")
    with pytest.raises(ValueError, match="forward_kl"):
        divergence(P, Q, "kl")
    for beta in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            divergence(P, Q, "js", beta)
    divergence(P, Q, "reverse_kl", 0.0)  # which has no beta
