"""Covariance of a token's log-prob and advantage, and what is done to the tokens that are held back, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_plugins.functional.covariance import pulled_back, token_covariance, without_held


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_covariance_is_about_the_means_given() -> None:
    """Means -1 and .5: (-.5 + 1)(1 - .5) = .25, (-3 + 1)(1 - .5) = -1, (-1 + 1)(-2 - .5) = 0; a tool's token is never
    among the highest."""
    own = torch.tensor([True, True, True, False])
    found = token_covariance(f64(-0.5, -3, -1, 9), f64(1, 1, -2, 9), f64(-1)[0], f64(0.5)[0], own)
    assert found.tolist() == [0.25, -1.0, 0.0, -float("inf")] and found.dtype == torch.float64


def test_what_is_held_has_no_gradient_and_the_rest_all_of_it() -> None:
    losses = f64(1, 2, 3).requires_grad_()
    found = without_held(losses, torch.tensor([False, True, False]))
    assert found.tolist() == [1.0, 0.0, 3.0]
    (grad,) = torch.autograd.grad(found.sum(), losses)
    assert grad.tolist() == [1.0, 0.0, 1.0]


def test_what_is_held_is_pulled_back_from_either_side() -> None:
    logp = f64(-1.0, -1.0, -1.0, -1.0).requires_grad_()
    held = torch.tensor([True, True, False, True])
    found = pulled_back(f64(1, 1, 1, 1), held, logp, f64(-1.5, -0.8, -9, -1), coef=2.0)
    assert found.tolist() == pytest.approx([2.0, 1.4, 1.0, 1.0], abs=1e-12)  # float64 after a few operations
    (grad,) = torch.autograd.grad(found.sum(), logp)
    assert grad.tolist() == [2.0, -2.0, 0.0, 0.0]


def test_rounding_pulls_nothing() -> None:
    logp = f64(-1.0, -1.0).requires_grad_()
    found = pulled_back(f64(0, 0), torch.tensor([True, True]), logp, f64(-1.0 - 5e-6, -1.0 + 5e-6), coef=2.0)
    (grad,) = torch.autograd.grad(found.sum(), logp)
    assert grad.tolist() == [0.0, 0.0]


def test_a_negative_coefficient_is_refused() -> None:
    one = f64(1)
    with pytest.raises(ValueError, match="expected coef >= 0, given -1"):
        pulled_back(one, torch.tensor([True]), one, one, -1.0)
