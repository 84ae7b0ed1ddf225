"""KTO's loss: worked values, gradients by hand, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_plugins.functional.kto import kto

SIX = 5e-7  # the values are given to six decimals


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X, GOOD, Z = f64(1.0, -0.5), torch.tensor([True, False]), f64(0.2, 0.2)


def test_worked_values_and_gradients() -> None:
    """1 - s(.1 x .8) = .480011 of the good, 1 - s(.1 x .7) = .482507 of the bad. Slopes .1 s (1 - s): .024960, .024969,
    down and up; twice and thrice as much with weights 2 and 3."""
    x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
    losses = kto(x, GOOD, z, 0.1, 1.0, 1.0)
    assert losses.tolist() == pytest.approx([0.480011, 0.482507], abs=SIX)
    (by_x,) = torch.autograd.grad(losses.sum(), x)
    assert by_x.tolist() == pytest.approx([-0.0249600, 0.0249694], abs=SIX)
    assert kto(x, GOOD, z, 0.1, 2.0, 3.0).tolist() == pytest.approx([0.960021, 1.447522], abs=2e-6)
    assert torch.autograd.gradcheck(lambda x: kto(x, GOOD, Z, 0.1, 2.0, 3.0), (x,))


def test_the_baseline_has_no_gradient() -> None:
    z = Z.clone().requires_grad_()
    kto(X.clone().requires_grad_(), GOOD, z, 0.1, 1.0, 1.0).sum().backward()
    assert z.grad is None


def test_at_the_baseline_half_the_weight_and_far_from_it_flat() -> None:
    assert kto(Z, GOOD, Z, 0.3, 2.0, 4.0).tolist() == [1.0, 2.0]
    x = torch.tensor([1000.0, 1000.0, -1000.0, -1000.0]).requires_grad_()
    losses = kto(x, torch.tensor([True, False, True, False]), torch.zeros(4), 1.0, 1.0, 1.0)
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    (by_x,) = torch.autograd.grad(losses.sum(), x)
    assert by_x.tolist() == [0.0] * 4


def test_refusals_and_no_rows() -> None:
    with pytest.raises(ValueError, match="one length"):
        kto(X, GOOD, Z[:1], 0.1, 1.0, 1.0)
    for numbers, name in (((0.0, 1.0, 1.0), "beta"), ((0.1, 0.0, 1.0), "weight_desirable"),
                          ((0.1, 1.0, float("inf")), "weight_undesirable")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            kto(X, GOOD, Z, *numbers)
    assert kto(f64(), torch.zeros(0, dtype=torch.bool), f64(), 0.1, 1.0, 1.0).shape == (0,)
