"""Implicit language Q-learning's arithmetic, by hand, and what its losses pull towards."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional.ilql import advantage_weights, expectile_loss, q_targets

EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_targets_are_the_reward_and_what_comes_after() -> None:
    """Responses of 3 and 1 tokens; nothing comes after a last one, whatever the next response is worth."""
    values = f64(0.5, 0.25, -1.0, 4.0).requires_grad_()
    found = q_targets(f64(0.0, 0.0, 1.0, -2.0), values, torch.tensor([3, 1]), 0.9, torch.ones(4, dtype=torch.bool))
    assert found.tolist() == pytest.approx([0.225, -0.9, 1.0, -2.0], abs=EXACT) and not found.requires_grad


def test_expectile_loss_and_slope() -> None:
    """Ahead by 2 and behind by 1: .8 x 4 and .2 x 1, slopes -.8 x 4 and .2 x 2."""
    q, values = f64(3.0, 1.0).requires_grad_(), f64(1.0, 2.0).requires_grad_()
    loss = expectile_loss(q, values, 0.8)
    assert loss.tolist() == pytest.approx([3.2, 0.2], abs=EXACT)
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([-3.2, 0.4], abs=EXACT)
    assert q.grad is None  # a value is learnt of what Q says, not the other way round


@pytest.mark.parametrize(("tau", "found"), [(0.5, 0.25), (0.9, 0.75), (0.999, 0.997)])
def test_where_the_value_rests(tau: float, found: float) -> None:
    """Of outcomes 1, 0, 0, 0, where tau (1 - v) = 3 (1 - tau) v: tau / (3 - 2 tau): the mean, then nearly the best."""
    q, v = f64(1.0, 0.0, 0.0, 0.0), tau / (3 - 2 * tau)
    assert v == pytest.approx(found, abs=5e-4)
    values = f64(v, v, v, v).requires_grad_()
    expectile_loss(q, values, tau).sum().backward()
    assert values.grad is not None and float(values.grad.sum()) == pytest.approx(0, abs=EXACT)


def test_weights_grow_with_the_advantage_to_a_bound() -> None:
    q, v = f64(1.0, 1.0, 9.0).requires_grad_(), f64(0.5, 1.5, 0.0).requires_grad_()
    found = advantage_weights(q, v, 2.0)
    assert found.tolist() == pytest.approx([math.e, 1 / math.e, 100.0], rel=1e-12) and not found.requires_grad
    assert advantage_weights(q, v, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_what_is_refused() -> None:
    for tau in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            expectile_loss(f64(1.0), f64(1.0), tau)
    with pytest.raises(ValueError, match="one length"):
        expectile_loss(f64(1.0), f64(1.0, 2.0), 0.5)
    with pytest.raises(ValueError, match="one length"):
        q_targets(f64(1.0), f64(1.0, 2.0), torch.tensor([2]), 0.5, torch.ones(2, dtype=torch.bool))


def test_the_next_state_is_before_the_next_own_token() -> None:
    """A tool's output lies between: its values are passed over, and it has no target."""
    mask = torch.tensor([True, False, False, True, True])
    found = q_targets(f64(0.0, 9.0, 9.0, 0.0, 1.0), f64(1.0, 50.0, 60.0, 2.0, 3.0), torch.tensor([5]), 0.5, mask)
    assert found.tolist() == [0.5 * 2.0, 0.0, 0.0, 0.5 * 3.0, 1.0]
