"""Two models' distributions compared in chunks, against all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.interfaces import HeadRequest
from rlhf.scores import Comparison, LogitSource
from rlhf.sequences import Sequences
from rlhf_plugins.functional.divergence import KINDS, divergence
from rlhf_plugins.policies.compared import divergences


def made(rows: int = 11, theirs: int = 11) -> tuple[Tensor, nn.Linear, Tensor, nn.Linear]:
    """(states, head, the other's states, of another width, and head), in float64."""
    torch.manual_seed(0)
    heads = nn.Linear(4, rows).double(), nn.Linear(6, theirs).double()
    return (
        torch.randn(7, 4, dtype=torch.float64), heads[0], torch.randn(7, 6, dtype=torch.float64),
        heads[1].requires_grad_(False),
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_all_at_once(kind: Any, temperature: float) -> None:
    states, head, theirs, other = made()
    weights = torch.randn(7, dtype=torch.float64)
    leaf = states.clone().requires_grad_()
    log_p = torch.log_softmax(head(leaf) / temperature, -1)
    log_q = torch.log_softmax(other(theirs) / temperature, -1)
    expected, slope = divergence(log_p.detach(), log_q, kind, 0.3)
    # the chain by hand: the slope is in logits / temperature
    grads = torch.autograd.grad((head(leaf) * slope * weights[:, None] / temperature).sum(), [leaf, *head.parameters()])

    leaf = states.clone().requires_grad_()
    compare = Comparison(LogitSource(theirs, other), kind, 0.3, temperature)
    found = divergences(leaf, head, compare, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, two in zip(torch.autograd.grad((found * weights).sum(), [leaf, *head.parameters()]), grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(divergences(states, head, compare, 2), expected, rtol=0, atol=1e-12)


def test_no_more_than_a_chunk_of_either_models_logits_is_made_at_once() -> None:
    sizes: list[int] = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states

    kept: list[int] = []
    leaf = torch.randn(7, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        found = divergences(leaf, head, Comparison(LogitSource(torch.randn(7, 5), head), "js"), 3)
    forward = len(sizes)
    found.sum().backward()
    assert sorted(sizes[:forward]) == [1, 1, 3, 3, 3, 3] and sorted(sizes[forward:]) == [1, 1, 3, 3, 3, 3]
    assert sum(kept) <= 2 * 7 * 5  # the states of both, which are what the chunks are made from again


def test_rows_that_only_one_head_has_are_left_out() -> None:
    """They are no tokens: a head is often wider than its vocabulary. They get no gradient either."""
    for rows, theirs in ((11, 8), (8, 11)):
        states, head, of_theirs, other = made(rows, theirs)
        leaf = states.clone().requires_grad_()
        found = divergences(leaf, head, Comparison(LogitSource(of_theirs, other), "forward_kl"), 4)
        log_p, log_q = (torch.log_softmax(z[:, :8], -1) for z in (head(states), other(of_theirs)))
        torch.testing.assert_close(found, divergence(log_p.detach(), log_q, "forward_kl")[0], rtol=0, atol=1e-12)
        found.sum().backward()
        assert head.weight.grad is not None and not head.weight.grad[8:].any() and head.weight.grad[:8].any()


def test_nothing_to_compare_is_nothing() -> None:
    _, head, _, other = made()
    none = torch.zeros(0, 4, dtype=torch.float64)
    assert divergences(none, head, Comparison(LogitSource(torch.zeros(0, 6).double(), other), "js"), 3).shape == (0,)


@pytest.mark.parametrize("layout", ["padded", "shared", "flat"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_by_the_policy_it_is_of_the_models_own_logits(
    family: str, layout: str, folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    """Of a model from a qwen2 with the same vocabulary: the logits of a plain forward of each sequence."""
    hf, other = policy(layout=layout, chunk_tokens=5), policy(layout="padded")
    module, teacher = hf.load(spec(folder(family))), other.load(spec(folder("qwen2"), trainable=False))
    with torch.no_grad():
        compare = Comparison(other.read(teacher, ragged), "reverse_kl", temperature=0.7)
    (scores,) = hf.score(module, ragged, [HeadRequest("policy", "lm", compare=compare)])
    scores.divergence.sum().backward()
    found = module.get_output_embeddings().weight.grad.clone()
    module.zero_grad()

    log_ps, log_qs = [], []
    for i, response in enumerate(ragged.responses()):
        prompt = ragged.prompt(i)
        ids = torch.cat([prompt, response])[None]
        for model, into in ((module, log_ps), (teacher, log_qs)):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            into.append(torch.log_softmax(logits / 0.7, -1))
    log_p, log_q = torch.cat(log_ps), torch.cat(log_qs).detach()
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected.sum().backward()
    # rounding of float32 (6e-8) over some hundred additions of numbers about 1, in another order
    torch.testing.assert_close(scores.divergence, expected, rtol=0, atol=1e-5)
    # the same in sums over 22 tokens of products of numbers up to about 3
    torch.testing.assert_close(found, module.get_output_embeddings().weight.grad, rtol=1e-4, atol=1e-4)
