"""Drawing tokens, by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_plugins.engines.sampling import draw, uniforms

P = torch.tensor([0.5, 0.1, 0.25, 0.15])
NOT_GREEDY = torch.tensor([False])


def at(u: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[int, float]:
    uniform = torch.tensor([u], dtype=torch.float64)
    tokens, logp = draw(P.log()[None], uniform, NOT_GREEDY, temperature=temperature, top_k=top_k, top_p=top_p)
    return int(tokens), float(logp)


def test_a_uniform_picks_the_token_whose_share_it_falls_in() -> None:
    """Cumulative: .5, .6, .85, 1."""
    assert [at(u)[0] for u in (0.0, 0.49, 0.51, 0.59, 0.61, 0.84, 0.86, 1 - 1e-12)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert math.isclose(at(0.7)[1], math.log(0.25), abs_tol=1e-6)


def test_temperature() -> None:
    """At 1/2 the shares go as squares: .25, .01, .0625, .0225 of .345."""
    assert math.isclose(at(0.0, temperature=0.5)[1], math.log(0.25 / 0.345), abs_tol=1e-6)
    assert at(0.74, temperature=0.5)[0] == 1  # between .7246 and .7536


def test_top_k_keeps_the_likeliest_and_its_log_probs_are_of_what_is_kept() -> None:
    """.5 and .25 are kept: 2/3 and 1/3."""
    assert [at(u, top_k=2)[0] for u in (0.0, 0.66, 0.67, 0.999)] == [0, 0, 2, 2]
    assert math.isclose(at(0.9, top_k=2)[1], math.log(1 / 3), abs_tol=1e-6)
    assert at(0.9, top_k=9) == at(0.9)


def test_top_p_keeps_the_fewest_that_hold_it() -> None:
    """.5 + .25 falls short of .8; with .15 it doesn't."""
    assert {at(u / 100, top_p=0.8)[0] for u in range(100)} == {0, 2, 3}
    assert {at(u / 100, top_p=0.7)[0] for u in range(100)} == {0, 2}
    assert {at(u / 100, top_p=0.01)[0] for u in range(100)} == {0}
    assert {at(u / 100, top_k=3, top_p=0.99)[0] for u in range(100)} == {0, 2, 3}
    even, most = torch.zeros(1, 2), torch.tensor([0.99], dtype=torch.float64)
    assert draw(even, most, NOT_GREEDY, temperature=1.0, top_p=0.5)[0].tolist() == [0]  # a half holds a half


def test_all_of_the_distribution_is_all_of_it() -> None:
    """The second token has e^-30 = 1e-13: to float32 the first one holds 1 already."""
    tokens, logp = draw(
        torch.tensor([[0.0, -30.0]]), torch.tensor([1 - 2**-53], dtype=torch.float64), NOT_GREEDY, temperature=1.0
    )
    assert tokens.tolist() == [1] and float(logp) == -30.0


def test_log_probs_are_float32_whatever_the_logits() -> None:
    uniform = torch.tensor([0.3], dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        assert draw(P.log()[None].to(dtype), uniform, NOT_GREEDY, temperature=1.0)[1].dtype == torch.float32


def test_of_tokens_alike_the_first_are_kept() -> None:
    even = torch.zeros(1, 5000)
    drawn = {
        int(draw(even, torch.tensor([u / 10], dtype=torch.float64), NOT_GREEDY, temperature=1.0, top_k=2)[0])
        for u in range(10)
    }
    assert drawn == {0, 1}


def test_greedy_rows_ignore_their_uniform() -> None:
    logits: Tensor = P.log().repeat(2, 1)
    uniform = torch.tensor([0.99, 0.99], dtype=torch.float64)
    tokens, logp = draw(logits, uniform, torch.tensor([True, False]), temperature=1.0)
    assert tokens.tolist() == [0, 3] and logp.shape == (2,)
    assert math.isclose(float(logp[0]), math.log(0.5), abs_tol=1e-6)


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 1 - 2**-53):
        tokens, logp = draw(logits, torch.tensor([u], dtype=torch.float64), NOT_GREEDY, temperature=1.0)
        assert tokens.tolist() == [1] and float(logp) == 0.0
    for n in range(2, 100):  # shares that add up to 1 only to rounding
        even = torch.cat([torch.zeros(n), torch.tensor([-torch.inf])])[None]
        tokens, _ = draw(even, torch.tensor([1 - 2**-53], dtype=torch.float64), NOT_GREEDY, temperature=1.0)
        assert tokens.tolist() == [n - 1]


def test_uniforms_are_fixed_by_all_of_the_seed_and_longer_ones_begin_alike() -> None:
    assert torch.equal(uniforms([3, 1], 8), uniforms([3, 1], 20)[:8])
    assert not torch.equal(uniforms([3, 1], 8), uniforms([3, 2], 8))
    assert not torch.equal(uniforms([4, 0], 8), uniforms([3, 1], 8))
    assert uniforms([3, 1], 8).dtype == torch.float64
