"""AOT: who meets whom, worked minibatches, gradients against those of the sorted loss written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_plugins.functional.transport import aot, aot_unpaired, counterparts

EXACT = 1e-12  # float64 values of order 1 after a few operations


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


C, R = f64(1.0, -2.0, 0.5), f64(0.25, -0.5, 3.0)


def nls(x: float) -> float:
    """-log s(x)."""
    return math.log1p(math.exp(-x))


def test_each_meets_the_one_of_its_rank() -> None:
    assert counterparts(f64(3, 1, 2), f64(10, 30, 20)).tolist() == [30, 10, 20]
    assert counterparts(f64(1, 1, 0), f64(5, 6, 7)).tolist() == [6, 7, 5]  # among equals the earlier is the smaller
    assert counterparts(f64(), f64()).shape == (0,)
    with pytest.raises(ValueError, match=r"y \[1\]"):
        counterparts(f64(1, 2), f64(1))


def test_aot_by_hand() -> None:
    """x = 1, -2, .5 and y = .25, -.5, 3: sorted they differ by -2 + .5, .5 - .25, 1 - 3; with beta 2."""
    losses = aot(C, counterparts(C, R), 2.0)
    assert losses.tolist() == pytest.approx([nls(-4.0), nls(-3.0), nls(0.5)], abs=EXACT)
    smoothed = aot(C, counterparts(C, R), 2.0, 0.1)
    assert smoothed[2].item() == pytest.approx(0.9 * nls(0.5) + 0.1 * nls(-0.5), abs=EXACT)


def test_where_order_is_kept_aot_is_dpo() -> None:
    """One pair, or pairs that are already sorted alike."""
    x, y = f64(-1.0, 0.5, 2.0), f64(-3.0, 0.0, 1.0)
    assert aot(x, counterparts(x, y), 0.3).tolist() == pytest.approx([nls(0.6), nls(0.15), nls(0.3)], abs=EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sum_and_gradient_of_sorted_differences(smoothing: float) -> None:
    """Terms of single pairs add up to what sorting in the graph gives, value and gradient."""

    def plainly(x: Tensor, y: Tensor) -> Tensor:
        d = 0.7 * (x.sort().values - y.sort().values)
        return (-(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)).sum()

    c, r = C.clone().requires_grad_(), R.clone().requires_grad_()
    found = aot_unpaired(c, r, counterparts(c, r), counterparts(r, c), 0.7, smoothing).sum()
    wanted = plainly(c, r)
    assert found.item() == pytest.approx(wanted.item(), abs=EXACT)
    for mine, theirs in zip(torch.autograd.grad(found, (c, r)), torch.autograd.grad(wanted, (c, r)), strict=True):
        assert mine.tolist() == pytest.approx(theirs.tolist(), abs=EXACT)
    found = aot(c, counterparts(c, R), 0.7, smoothing).sum()
    wanted = plainly(c, R)
    assert found.item() == pytest.approx(wanted.item(), abs=EXACT)
    (mine,), (theirs,) = torch.autograd.grad(found, c), torch.autograd.grad(wanted, c)
    assert mine.tolist() == pytest.approx(theirs.tolist(), abs=EXACT)


def test_what_is_met_has_no_gradient() -> None:
    c, r = C.clone().requires_grad_(), R.clone().requires_grad_()
    aot(c, counterparts(c, r), 1.0).sum().backward()
    assert r.grad is None
