"""The arithmetic of heads, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rlhf_plugins.policies.heads import init_scalar_head, logit_transform, scalars, token_logps


def identity(states: Tensor) -> Tensor:
    return states


def test_log_probs_and_entropy_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]]).log()  # p = 1/8, 2/8, 5/8; then thirds
    logp, entropy = token_logps(logits, torch.tensor([1, 2]), identity, temperature=1.0, entropy=True, chunk=1)
    torch.testing.assert_close(logp, torch.tensor([math.log(2 / 8), -math.log(3)]))
    by_hand = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    torch.testing.assert_close(entropy, torch.tensor([by_hand, math.log(3)]))


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0]]).log()
    logp, _ = token_logps(logits, torch.tensor([1]), identity, temperature=0.5, entropy=False, chunk=8)
    torch.testing.assert_close(logp, torch.tensor([math.log(4 / 5)]))  # p in proportion to 1^2, 2^2


@pytest.mark.parametrize("temperature", [1.0, 1.01])
def test_log_probs_without_a_gradient_are_the_same(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    states, targets = torch.randn(7, 5, generator=draw), torch.randint(0, 5, (7,), generator=draw)
    expected = torch.log_softmax(states / temperature, -1)[torch.arange(7), targets]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found, _ = token_logps(states, targets, identity, temperature=temperature, entropy=False, chunk=3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # float32 log-probs of about 2


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.01])
@pytest.mark.parametrize("entropy", [True, False])
def test_gradients_are_autograds(temperature: float, entropy: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    states, head = torch.randn(7, 4, generator=draw), nn.Linear(4, 11)
    targets, weights = torch.randint(0, 11, (7,), generator=draw), torch.randn(2, 7, generator=draw)

    def grads(logp: Tensor, spread: Tensor | None, leaf: Tensor) -> list[Tensor]:
        total = weights[0] @ logp + (weights[1] @ spread if spread is not None else 0.0)
        return list(torch.autograd.grad(total, [leaf, head.weight, head.bias]))

    leaf = states.clone().requires_grad_()
    table = torch.log_softmax(head(leaf) / temperature, -1)
    plain = -(table.exp() * table).sum(-1) if entropy else None
    expected = grads(table[torch.arange(7), targets], plain, leaf)
    leaf = states.clone().requires_grad_()
    found = grads(*token_logps(leaf, targets, head, temperature=temperature, entropy=entropy, chunk=3), leaf)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32 sums of seven terms of about 1


def test_no_more_than_a_chunk_of_logits_is_made_at_once() -> None:
    sizes: list[int] = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states

    leaf = torch.randn(7, 5, requires_grad=True)
    logp, _ = token_logps(leaf, torch.zeros(7, dtype=torch.long), head, temperature=1.0, entropy=False, chunk=3)
    logp.sum().backward()
    assert sorted(sizes) == [1, 1, 3, 3, 3, 3]  # each chunk once forward, once again for the backward


def test_scalars_are_one_number_a_position_in_float32_whatever_autocast_says() -> None:
    """1 + 2^-12 needs 12 bits behind the point; bfloat16 has 7."""
    head = nn.Linear(2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2.0]]))
        head.bias.fill_(0.5)
    hidden = torch.tensor([[1 + 2**-12, 0.0], [0.0, 1.0], [1.0, 1.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scalars(hidden, head)
    assert found.tolist() == [1.5 + 2**-12, 2.5, 3.5] and found.dtype == torch.float32
    assert scalars(hidden.bfloat16(), head).tolist() == [1.5, 2.5, 3.5]
    assert scalars(hidden, head.double()).dtype == torch.float32


def test_logits_are_scaled_and_capped_as_the_config_says() -> None:
    """Cohere multiplies by its scale, Granite divides by its own, Gemma bends: cap tanh(x / cap)."""
    logits = torch.tensor([1.0, -2.0])

    def by(**config: float) -> list[float]:
        return logit_transform(SimpleNamespace(**config))(logits).tolist()

    assert by() == [1.0, -2.0] == by(logit_scale=1.0, logits_scaling=1.0)
    assert by(logit_scale=0.25) == [0.25, -0.5]
    assert by(logits_scaling=4.0) == [0.25, -0.5]
    assert by(logit_scale=3.0, logits_scaling=4.0) == [0.75, -1.5]
    assert by(logit_scale=1.01) == pytest.approx([1.01, -2.02], rel=1e-6)  # float32
    capped = [0.5 * math.tanh(2.0), 0.5 * math.tanh(-4.0)]
    assert by(final_logit_softcapping=0.5) == pytest.approx(capped, rel=1e-6)
    assert by(logit_scale=2.0, final_logit_softcapping=1.0) == pytest.approx([math.tanh(2), math.tanh(-4)], rel=1e-6)


def test_nothing_to_score_is_nothing() -> None:
    logp, entropy = token_logps(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), identity, temperature=1.0, entropy=True, chunk=3
    )
    assert logp.shape == (0,) and entropy is not None and entropy.shape == (0,)


def test_scalar_heads_start_at_zero_or_normal_by_their_seed() -> None:
    head = nn.Linear(399, 1)
    init_scalar_head(head, "zero", 0)
    assert not head.weight.any() and not head.bias.any()
    init_scalar_head(head, "normal", 1)
    first = head.weight.clone()
    drawn = torch.empty(1, 399).normal_(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        head.weight.detach(), drawn / 20, rtol=1e-6, atol=0
    )  # N(0, 1/400), to float32's rounding
    # 1/sqrt(400) = 0.05; the standard deviation of 399 draws is off by 1/sqrt(2 x 399) = 3.5%, thrice that allowed
    assert abs(float(first.detach().std()) - 0.05) < 0.05 * 0.106 and not head.bias.any()
    init_scalar_head(head, "normal", 1)
    assert torch.equal(head.weight, first)
    init_scalar_head(head, "normal", 2)
    assert not torch.equal(head.weight, first)
