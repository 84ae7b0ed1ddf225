"""GAE: worked values, its limits, masked tokens and independent rows. Whitening and explained variance by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional import advantages as adv

F64 = torch.float64
EXACT = 1e-12  # float64 values of order 1 after a few dozen operations


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 0, 7])
    rewards = torch.randn(13, generator=generator, dtype=F64)
    values = torch.randn(13, generator=generator, dtype=F64)
    return rewards, values, lengths


def test_gae_by_hand() -> None:
    """delta = (0 + .6 - .5, 0 + .7 - .6, 1 + 0 - .7) = (.1, .1, .3); A = (.1 + .95 * .385, .1 + .95 * .3, .3)."""
    result = adv.gae(f64(0, 0, 1), f64(0.5, 0.6, 0.7), torch.tensor([3]), gamma=1.0, lam=0.95)
    assert result.advantages.tolist() == pytest.approx([0.46575, 0.385, 0.3], abs=EXACT)
    assert result.returns.tolist() == pytest.approx([0.96575, 0.985, 1.0], abs=EXACT)  # A + V


def test_gae_discounted_by_hand() -> None:
    """gamma .9, lambda .5: delta = (1 + .9 * .4 - .2, 2 - .4) = (1.16, 1.6); A = (1.16 + .45 * 1.6, 1.6)."""
    result = adv.gae(f64(1, 2), f64(0.2, 0.4), torch.tensor([2]), gamma=0.9, lam=0.5)
    assert result.advantages.tolist() == pytest.approx([1.88, 1.6], abs=EXACT)


def test_gae_at_lambda_one_is_monte_carlo() -> None:
    rewards, values, lengths = random_batch()
    for gamma in (1.0, 0.9):
        result = adv.gae(rewards, values, lengths, gamma=gamma, lam=1.0)
        to_go: list[float] = []
        for row in torch.split(rewards, lengths.tolist()):
            n = len(row)
            to_go += [sum(gamma**k * row[t + k].item() for k in range(n - t)) for t in range(n)]
        assert result.returns.tolist() == pytest.approx(to_go, abs=EXACT)
        minus_value = [g - v for g, v in zip(to_go, values.tolist(), strict=True)]
        assert result.advantages.tolist() == pytest.approx(minus_value, abs=EXACT)


def test_rewards_to_go_by_hand() -> None:
    """lambda = gamma = 1 without a critic: [-.01, -.02, .97] sums from the right to [.94, .95, .97]."""
    result = adv.gae(f64(-0.01, -0.02, 0.97), f64(0, 0, 0), torch.tensor([3]), gamma=1.0, lam=1.0)
    assert result.returns.tolist() == pytest.approx([0.94, 0.95, 0.97], abs=EXACT)


def test_gae_at_lambda_zero_is_the_td_error() -> None:
    """r = (1, 2 | 3), V = (.5, .25 | 4), gamma .8: (1 + .8 * .25 - .5, 2 - .25 | 3 - 4)."""
    result = adv.gae(f64(1, 2, 3), f64(0.5, 0.25, 4), torch.tensor([2, 1]), gamma=0.8, lam=0.0)
    assert result.advantages.tolist() == pytest.approx([0.7, 1.75, -1.0], abs=EXACT)


def test_gae_rows_are_independent() -> None:
    rewards, values, lengths = random_batch()
    together = adv.gae(rewards, values, lengths, 0.99, 0.95)
    alone = [
        adv.gae(r, v, torch.tensor([len(r)]), 0.99, 0.95).advantages
        for r, v in zip(torch.split(rewards, lengths.tolist()), torch.split(values, lengths.tolist()), strict=True)
    ]
    assert torch.equal(together.advantages, torch.cat(alone))  # bitwise: the same operations a row


def test_gae_at_gamma_zero_is_the_next_reward_less_the_value() -> None:
    """r = (1, 2), V = (.5, .25): (1 - .5, 2 - .25), whatever lambda is."""
    for lam in (0.0, 1.0):
        result = adv.gae(f64(1, 2), f64(0.5, 0.25), torch.tensor([2]), gamma=0.0, lam=lam)
        assert result.advantages.tolist() == [0.5, 1.75]  # exact in binary


def test_gae_steps_over_masked_tokens() -> None:
    """With any mask, GAE is GAE of the response with the masked tokens cut out, and 0 at those tokens."""
    rewards, values, lengths = random_batch()
    own = torch.tensor([0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0]).bool()
    poisoned = torch.where(own, 0.0, float("nan"))  # what is masked must not even be read
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 0.0)):
        masked = adv.gae(rewards + poisoned, values + poisoned, lengths, gamma, lam, own)
        compact = adv.gae(rewards[own], values[own], torch.tensor([2, 1, 0, 4]), gamma, lam)
        assert torch.equal(masked.advantages[own], compact.advantages)  # bitwise: the same operations
        assert torch.equal(masked.returns[own], compact.returns)
        assert masked.advantages[~own].eq(0).all()
        assert masked.returns[~own].eq(0).all()


def test_gae_over_a_tool_call_by_hand() -> None:
    """Own, tool, tool, own; lambda .5: delta = (.2 - .1, 1 - .2); A_0 = .1 + .5 * .8 = .5, not .1 + .125 * .8."""
    own = torch.tensor([True, False, False, True])
    result = adv.gae(f64(0, 0, 0, 1), f64(0.1, 9, 9, 0.2), torch.tensor([4]), 1.0, 0.5, own)
    assert result.advantages.tolist() == pytest.approx([0.5, 0, 0, 0.8], abs=EXACT)


def test_gae_of_nothing_and_of_one_token() -> None:
    empty = adv.gae(torch.zeros(0), torch.zeros(0), torch.tensor([0, 0]), 1.0, 0.95)
    assert empty.advantages.shape == empty.returns.shape == (0,)
    one = adv.gae(f64(3), f64(1), torch.tensor([1]), 0.5, 0.5)
    assert (one.advantages.item(), one.returns.item()) == (2.0, 3.0)  # exact in binary


def test_gae_is_data_and_at_least_float32() -> None:
    values = torch.ones(2, dtype=torch.bfloat16).requires_grad_()
    result = adv.gae(torch.ones(2, dtype=torch.bfloat16), values, torch.tensor([2]), 1.0, 0.95)
    assert not result.advantages.requires_grad
    assert not result.returns.requires_grad
    assert result.advantages.dtype == result.returns.dtype == torch.float32


def test_gae_refuses() -> None:
    with pytest.raises(ValueError, match="values"):
        adv.gae(torch.zeros(3), torch.zeros(2), torch.tensor([3]), 1.0, 0.95)
    for gamma, lam in ((1.0, 95.0), (1.0, 1.001), (1.001, 1.0), (-0.001, 1.0), (1.0, -0.001)):
        with pytest.raises(ValueError, match="gamma and lam"):
            adv.gae(torch.zeros(3), torch.zeros(3), torch.tensor([3]), gamma, lam)
    with pytest.raises(ValueError, match="mask"):
        adv.gae(torch.zeros(3), torch.zeros(3), torch.tensor([3]), 1.0, 0.95, torch.ones(3))


def test_whiten_by_hand() -> None:
    """(1, 2, 3, 6): mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5; unbiased would be 4.667."""
    scale = 1 / math.sqrt(3.5 + 1e-8)
    white = adv.whiten(f64(1, 2, 3, 6))
    assert white.tolist() == pytest.approx([-2 * scale, -scale, 0.0, 3 * scale], abs=EXACT)
    kept = adv.whiten(f64(1, 2, 3, 6), shift_mean=False)
    assert kept.tolist() == pytest.approx([3 - 2 * scale, 3 - scale, 3.0, 3 + 3 * scale], abs=EXACT)


def test_whiten_eps_is_inside_the_root() -> None:
    """(-1, 1): variance 1; with eps 3 the scale is 1 / sqrt(4)."""
    assert adv.whiten(f64(-1, 1), eps=3.0).tolist() == pytest.approx([-0.5, 0.5], abs=EXACT)


def test_whiten_masked_by_hand() -> None:
    """Own (1, 3): mean 2, variance 1. What is masked is neither counted nor returned."""
    own = torch.tensor([True, False, True])
    scale = 1 / math.sqrt(1 + 1e-8)
    for shift_mean, centre in ((True, 0.0), (False, 2.0)):
        white = adv.whiten(f64(1, float("nan"), 3), own, shift_mean)
        assert white.tolist() == pytest.approx([centre - scale, 0.0, centre + scale], abs=EXACT)


def test_whiten_over_ranks_is_whiten_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, generator=generator, dtype=F64) * 3 + 100
    own = torch.rand(50, generator=generator) < 0.7
    shards = [slice(0, 3), slice(3, 3), slice(3, 50)]  # one rank without tokens
    summed = torch.stack([adv.moments(x[s], own[s]).stack() for s in shards]).sum(0)
    stats = adv.Moments.unstack(summed)
    ours = torch.cat([adv.whiten_with(x[s], stats, own[s]) for s in shards])
    # 1e-9: total_sq / count - mean^2 is a difference of two numbers near 1e4 in float64, good to about 1e-12 * 1e3
    torch.testing.assert_close(ours, adv.whiten(x, own), rtol=0, atol=1e-9)
    kept = x[own]
    direct = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(ours[own], direct, rtol=0, atol=1e-7)  # and eps, 1e-8 of a variance near 9


def test_whiten_survives_a_large_mean_in_float32() -> None:
    """1000 + (-.5, .5): variance .25, which float32 sums of squares near 1e6 (step .06) would lose."""
    white = adv.whiten(torch.tensor([999.5, 1000.5]))
    assert white.dtype == torch.float32
    assert white.tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)  # float32, and eps


def test_whiten_of_nothing_one_and_constants() -> None:
    assert adv.whiten(torch.zeros(0)).shape == (0,)
    assert adv.whiten(torch.ones(2), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]
    assert adv.whiten(f64(5)).tolist() == [0.0]
    assert adv.whiten(f64(5), shift_mean=False).tolist() == [5.0]
    assert adv.whiten(torch.full((1000,), 0.1)).abs().max().item() < 1e-6  # rounding over sqrt(eps), not over 0


def test_whiten_gradient() -> None:
    own = torch.tensor([True, False, True, True])
    x = f64(1, 50, 3, -2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adv.whiten(x, own), (x,))
    weights = f64(1, 2, 3, 4)
    (x_grad,) = torch.autograd.grad((adv.whiten(x, own) * weights).sum(), x)
    assert x_grad[1].item() == 0.0


def test_moments_are_sums_in_float64() -> None:
    """(1, 2, -4) without the last: 2 tokens, 3, 1 + 4. Float32 would count no further than 2^24."""
    stats = adv.moments(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([True, True, False]))
    assert stats.stack().tolist() == [2.0, 3.0, 5.0]
    assert {stats.count.dtype, stats.total.dtype, stats.total_sq.dtype} == {F64}


def test_whiten_is_whiten_with_its_own_moments() -> None:
    x = f64(1, 2, 3, 6)
    assert torch.equal(adv.whiten_with(x, adv.moments(x)), adv.whiten(x))  # with the same eps


def test_whiten_refuses() -> None:
    with pytest.raises(ValueError, match="eps"):
        adv.whiten(torch.zeros(2), eps=0.0)
    square = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="one-dimensional"):
        adv.moments(square)
    with pytest.raises(ValueError, match="one-dimensional"):
        adv.whiten_with(square, adv.moments(torch.zeros(2)))
    with pytest.raises(ValueError, match="one-dimensional"):
        adv.whiten(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="3"):
        adv.Moments.unstack(torch.zeros(2))


def test_explained_variance_by_hand() -> None:
    """returns (1, 2, 3, 4): variance 1.25. Errors (.5, -.5, .5, -.5): variance .25, so 1 - .2."""
    returns = f64(1, 2, 3, 4)
    assert adv.explained_variance(f64(0.5, 2.5, 2.5, 4.5), returns).item() == pytest.approx(0.8, abs=EXACT)
    assert adv.explained_variance(returns, returns).item() == 1.0
    assert adv.explained_variance(returns + 7, returns).item() == 1.0  # an offset is forgiven
    assert adv.explained_variance(f64(2, 2, 2, 2), returns).item() == pytest.approx(0.0, abs=EXACT)
    assert adv.explained_variance(-returns, returns).item() == pytest.approx(-3.0, abs=EXACT)  # error 2R: 1 - 4


def test_explained_variance_masked() -> None:
    nan = float("nan")
    own = torch.tensor([True, True, False, True, True])
    values, returns = f64(0.5, 2.5, nan, 2.5, 4.5), f64(1, 2, nan, 3, 4)
    assert adv.explained_variance(values, returns, own).item() == pytest.approx(0.8, abs=EXACT)


def test_explained_variance_is_a_number_of_float64() -> None:
    """Float32 steps by 8 near 1e8, so there it would see no variance of (0, 1, 2, 3) and the errors of (.5, -.5)."""
    returns = f64(1, 2, 3, 4) + 1e8
    values = (f64(0.5, 2.5, 2.5, 4.5) + 1e8).requires_grad_()
    found = adv.explained_variance(values, returns)
    assert found.item() == pytest.approx(0.8, abs=EXACT) and not found.requires_grad  # halves near 1e8 are exact
    from_single = adv.explained_variance(torch.tensor([0.5, 2.5]), torch.tensor([1.0, 2.0]))
    assert from_single.dtype == F64


def test_explained_variance_refuses() -> None:
    with pytest.raises(ValueError, match=r"values \[1\]"):
        adv.explained_variance(torch.zeros(1), torch.zeros(3))


def test_explained_variance_of_nothing_is_nan() -> None:
    assert adv.explained_variance(torch.zeros(0), torch.zeros(0)).isnan()
    constant = torch.full((7,), 0.1)  # its computed variance need not be 0
    assert adv.explained_variance(torch.arange(7.0), constant).isnan()
