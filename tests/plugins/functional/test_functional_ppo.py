"""PPO's clipped losses per token: every side of both clips by hand, gradients, and masked tokens."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlhf_plugins.functional.ppo import clipped_policy_loss, clipped_value_loss

F64 = torch.float64
EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# A, rho, loss, clipped, d loss / d logp (= -A rho where not clipped), at clips .2 / .2
POLICY_CASES = [
    (1.0, 1.5, -1.2, True, 0.0),
    (-1.0, 1.5, 1.5, False, 1.5),
    (-1.0, 0.5, 0.8, True, 0.0),
    (1.0, 0.5, -0.5, False, -0.5),
    (1.0, 1.1, -1.1, False, -1.1),
    (-2.0, 0.9, 1.8, False, 1.8),
    (0.0, 1.5, 0.0, False, 0.0),
]


@pytest.mark.parametrize(("advantage", "rho", "loss", "clipped", "slope"), POLICY_CASES)
def test_policy_loss_by_hand(advantage: float, rho: float, loss: float, clipped: bool, slope: float) -> None:
    logp_old = f64(-2.0)
    logp = (logp_old + math.log(rho)).requires_grad_()
    result = clipped_policy_loss(logp, logp_old, f64(advantage), 0.2, 0.2)
    assert result.losses.item() == pytest.approx(loss, abs=EXACT)
    assert result.clipped.tolist() == [clipped]
    assert result.ratio.item() == pytest.approx(rho, abs=EXACT)
    (logp_grad,) = torch.autograd.grad(result.losses.sum(), logp)
    assert logp_grad.item() == pytest.approx(slope, abs=EXACT)


def test_clip_sides_are_not_swapped() -> None:
    """clip_low .1, clip_high .28: (A, rho) = (1, 1.5) stops at 1.28, (-1, .5) at .9."""
    logp = f64(math.log(1.5), math.log(0.5))
    result = clipped_policy_loss(logp, f64(0, 0), f64(1, -1), clip_low=0.1, clip_high=0.28)
    assert result.losses.tolist() == pytest.approx([-1.28, 0.9], abs=EXACT)


def test_first_step_is_the_policy_gradient() -> None:
    """At rho = 1 nothing is clipped, the loss is -A and its gradient -A."""
    logp = f64(-1, -2, -3).requires_grad_()
    result = clipped_policy_loss(logp, logp.detach(), f64(2, 0, -3), 0.2, 0.2)
    assert result.losses.tolist() == [-2.0, 0.0, 3.0]  # exact: e^0 is 1
    assert not result.clipped.any()
    (logp_grad,) = torch.autograd.grad(result.losses.sum(), logp)
    assert logp_grad.tolist() == [-2.0, 0.0, 3.0]


def test_policy_loss_gradient_by_differences() -> None:
    logp = f64(-0.5, -1.0, -2.0, -0.1, -3.0).requires_grad_()
    logp_old = f64(-0.9, -0.9, -2.1, -0.15, -2.0)  # log-ratios .4, -.1, .1, .05, -1: none on a kink (ln 1.2 = .182)
    advantages = f64(1, 2, -1, 0.5, -2)
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, logp_old, advantages, 0.2, 0.2).losses, (logp,))


def test_masked_tokens_have_exactly_no_loss_and_no_gradient() -> None:
    own = torch.tensor([True, False, False, True])
    logp = f64(-1.0, 500.0, float("nan"), -1.0).requires_grad_()  # the ratio e^502 would overflow
    result = clipped_policy_loss(logp, f64(-1, -2, -2, -1), f64(1, float("nan"), 1, -2), 0.2, 0.2, own)
    assert result.losses.tolist() == [-1.0, 0.0, 0.0, 2.0]
    assert result.ratio.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert not result.clipped.any()
    (logp_grad,) = torch.autograd.grad(result.losses.sum(), logp)
    assert logp_grad.tolist() == [-1.0, 0.0, 0.0, 2.0]


def test_policy_tokens_are_independent() -> None:
    logp, logp_old, advantages = f64(-1, -0.2, -3), f64(-1.5, -0.1, -2), f64(1, -1, -2)
    together = clipped_policy_loss(logp, logp_old, advantages, 0.2, 0.2).losses
    for i in range(3):
        alone = clipped_policy_loss(logp[i : i + 1], logp_old[i : i + 1], advantages[i : i + 1], 0.2, 0.2).losses
        assert alone.item() == together[i].item()


# V, V_old, R, clip, loss, clipped, d loss / d V
VALUE_CASES = [
    (1.0, 0.0, 2.0, None, 0.5, False, -1.0),  # .5 * 1
    (1.0, 0.0, 2.0, 0.2, 1.62, True, 0.0),  # clip(1) = .2: .5 * 1.8^2
    (1.0, 0.0, 0.0, 0.2, 0.5, False, 1.0),  # moved away from R: .5 * max(1, .04)
    (-1.0, 0.0, -2.0, 0.2, 1.62, True, 0.0),  # the lower side
    (-1.0, 0.0, 0.5, 0.2, 1.125, False, -1.5),  # .5 * max(2.25, .49)
    (0.1, 0.0, 2.0, 0.2, 1.805, False, -1.9),  # within: .5 * 1.9^2
]


@pytest.mark.parametrize(("value", "value_old", "target", "clip", "loss", "clipped", "slope"), VALUE_CASES)
def test_value_loss_by_hand(
    value: float, value_old: float, target: float, clip: float | None, loss: float, clipped: bool, slope: float
) -> None:
    values = f64(value).requires_grad_()
    result = clipped_value_loss(values, f64(value_old), f64(target), clip)
    assert result.losses.item() == pytest.approx(loss, abs=EXACT)
    assert result.clipped.tolist() == [clipped]
    (values_grad,) = torch.autograd.grad(result.losses.sum(), values)
    assert values_grad.item() == pytest.approx(slope, abs=EXACT)


def test_value_loss_gradient_by_differences() -> None:
    values = f64(1.0, -1.0, 0.1, 3.0).requires_grad_()
    values_old, returns = f64(0, 0, 0, 2.5), f64(2, -2, 2, 0)
    for clip in (None, 0.2):
        losses = partial(clipped_value_loss, values_old=values_old, returns=returns, clip=clip)
        assert torch.autograd.gradcheck(lambda v, f=losses: f(v).losses, (values,))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_masked_values_have_exactly_no_loss_and_no_gradient(clip: float | None) -> None:
    nan = float("nan")
    own = torch.tensor([True, False, False])
    values = f64(0.1, 5.0, nan).requires_grad_()
    result = clipped_value_loss(values, f64(0, 0, nan), f64(1.1, 9.0, nan), clip, own)
    assert result.losses.tolist() == pytest.approx([0.5, 0.0, 0.0], abs=EXACT)
    assert result.losses[1:].eq(0).all()
    assert not result.clipped.any()
    (values_grad,) = torch.autograd.grad(result.losses.sum(), values)
    assert values_grad[0].item() == pytest.approx(-1.0, abs=EXACT)
    assert values_grad[1:].eq(0).all()


def test_clips_of_nothing_and_of_everything() -> None:
    """At clips of 0, rho 1.5 counts as 1: A = 1 -> -1, A = -1 -> the larger, 1.5. A clip of 1 frees rho below."""
    result = clipped_policy_loss(f64(1.5, 1.5).log(), f64(0, 0), f64(1, -1), 0.0, 0.0)
    assert result.losses.tolist() == pytest.approx([-1.0, 1.5], abs=EXACT)
    free = clipped_policy_loss(f64(0.01).log(), f64(0), f64(-1), 1.0, 0.2)
    assert free.losses.item() == pytest.approx(0.01, abs=EXACT) and not free.clipped.any()


def test_the_ratio_that_is_reported_keeps_no_graph() -> None:
    logp = f64(-1.0, -2.0).requires_grad_()
    result = clipped_policy_loss(logp, logp.detach(), f64(1, 1), 0.2, 0.2)
    assert result.ratio.tolist() == [1.0, 1.0] and not result.ratio.requires_grad and result.losses.requires_grad


def test_no_tokens() -> None:
    none = torch.zeros(0)
    assert clipped_policy_loss(none, none, none, 0.2, 0.2).losses.shape == (0,)
    assert clipped_value_loss(none, none, none, 0.2).losses.shape == (0,)


def test_refusals() -> None:
    three, one = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"advantages \[1\]"):
        clipped_policy_loss(three, three, one, 0.2, 0.2)
    with pytest.raises(ValueError, match="clip_low"):
        clipped_policy_loss(three, three, three, -0.2, 0.2)
    with pytest.raises(ValueError, match="clip_low"):
        clipped_policy_loss(three, three, three, 1.001, 0.2)
    with pytest.raises(ValueError, match="clip_high"):
        clipped_policy_loss(three, three, three, 0.2, -0.2)
    with pytest.raises(ValueError, match="mask"):
        clipped_policy_loss(three, three, three, 0.2, 0.2, torch.ones(3))
    with pytest.raises(ValueError, match=r"values_old \[1\]"):
        clipped_value_loss(three, one, three, 0.2)
    with pytest.raises(ValueError, match="None for no clipping"):
        clipped_value_loss(three, three, three, 0.0)
