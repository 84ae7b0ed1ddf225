"""Norms and gated activations in one pass: the forward to the bit, the backward against float64, who is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_plugins.policies import fused
from rlhf_plugins.policies.fused import fuse

Build = Callable[[str], Any]


@pytest.fixture
def build(model: Build) -> Build:
    """A random model of a family, of two layers."""
    return model


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few rows of a test make several pieces, the last one shorter."""
    monkeypatch.setattr(fused, "_NUMBERS", 64)


def ids(width: int = 7) -> Tensor:
    return (torch.arange(3 * width).view(3, width) * 5) % 40


@pytest.mark.parametrize(("family", "count"), [("llama", 7), ("qwen2", 7), ("mistral", 7), ("granite", 7)])
def test_a_fused_model_computes_the_same(build: Build, family: str, count: int) -> None:
    """5 norms and 2 MLPs of two layers; torch's SiLU may differ in the last of float32's 24 bits by a number's place,
    and gradients are autograd's to such rounding over a dozen operations."""
    plain, model = build(family), build(family)
    assert fuse(model) == count
    losses = []
    for one in (plain, model):
        logits = one(input_ids=ids()).logits
        losses.append(logits)
        (logits.sin() * torch.arange(1.0, 8)[:, None]).sum().backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        assert (expected.grad - found.grad).norm() <= 2e-5 * expected.grad.norm(), name


def test_under_autocast_too(build: Build) -> None:
    plain, model = build("llama"), build("llama")
    fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (one(input_ids=ids()).logits for one in (plain, model))
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)  # 8 bits, and the next layer's sums of such
    for one, logits in ((plain, first), (model, second)):
        logits.float().square().sum().backward()
        assert one.model.norm.weight.grad.dtype == torch.float32
    # bfloat16 has 8 bits, and both ways round at the same places but for the last operations of a gradient
    for (name, expected), found in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert (expected.grad - found[1].grad).norm() <= 1e-2 * expected.grad.norm(), name


def test_without_gradient_and_in_bfloat16_it_is_the_same(build: Build) -> None:
    plain, model = build("llama").bfloat16(), build("llama").bfloat16()
    assert fuse(model) == 7
    with torch.no_grad():
        found = model(input_ids=ids())
        torch.testing.assert_close(plain(input_ids=ids()).logits, found.logits, rtol=2e-2, atol=2e-2)
    assert found.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_what_is_not_such_a_norm_is_left_alone(build: Build, family: str) -> None:
    """Gemma's norm multiplies by 1 + w; Cohere and GPT-2 subtract the mean. Cohere's MLP is gated with SiLU."""
    model = build(family)
    kinds = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
    assert fuse(model) == (2 if family == "cohere" else 0)
    assert {type(module) for module in model.modules() if "Norm" in type(module).__name__} == kinds


def test_one_that_already_has_a_forward_of_its_own_keeps_it(build: Build) -> None:
    model = build("llama")
    model.model.norm.forward = lambda x: x + 1
    assert fuse(model) == 6
    assert float(model.model.norm(torch.zeros(1))) == 1.0


def test_classes_keep_their_names_and_are_still_themselves(build: Build) -> None:
    model = build("llama")
    own = type(model.model.norm)
    fuse(model)
    assert isinstance(model.model.norm, own)
    assert type(model.model.norm).__name__ == own.__name__
    assert fuse(model) == 7  # again changes nothing that shows
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids()).logits, build("llama")(input_ids=ids()).logits)


def test_a_norm_is_the_same_to_the_bit(build: Build) -> None:
    plain, norm = build("llama").model.norm, build("llama").model.norm
    fuse(nn.ModuleList([norm]))
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    for one in (x, x.bfloat16()):
        assert torch.equal(plain(one), norm(one))


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_the_norms_gradients_are_those_of_its_definition() -> None:
    """Against float64 autograd; float32 has 7 digits, and a row sums 12 of them."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 12, generator=draw), torch.randn(12, generator=draw)
    upstream = torch.randn(2, 9, 12, generator=draw)
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    reference_norm(exact_x, exact_w, 0.1).backward(upstream.double())  # an epsilon that shows
    x.requires_grad_()
    weight.requires_grad_()
    fused._RMSNorm.apply(x, weight, 0.1).backward(upstream)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), exact_w.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_the_gated_products_gradients_are_those_of_its_definition() -> None:
    """silu(1) = .7311, silu'(1) = .9277; with u = 2 and g = 3: da = .9277 x 6 = 5.566, du = .7311 x 3 = 2.193."""
    gate, up = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    out: Any = fused._Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    out.backward(torch.tensor([[3.0]]))
    assert float(out.detach()) == pytest.approx(1.46212, abs=1e-5)
    assert gate.grad is not None and up.grad is not None
    assert (float(gate.grad), float(up.grad)) == (pytest.approx(5.56602, abs=1e-4), pytest.approx(2.19318, abs=1e-4))


def test_nothing_is_computed_for_a_frozen_weight() -> None:
    ctx = SimpleNamespace(saved_tensors=(torch.ones(2, 4), torch.ones(4), torch.ones(2, 1)),
                          needs_input_grad=(True, False, False))  # fmt: skip
    of_x, of_weight, _ = fused._RMSNorm.backward(ctx, torch.ones(2, 4))
    assert of_weight is None and of_x is not None


def test_only_inputs_and_a_number_a_row_are_kept(build: Build) -> None:
    """transformers' own keeps the input in float32, the normalised one, and the roots."""
    norm = build("llama").model.norm
    nn.Module.requires_grad_(norm, True)
    holder = nn.ModuleList([norm])
    fuse(holder)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        holder[0](torch.ones(1, 5, 32, requires_grad=True) * 2)
    assert sorted(t.numel() for t in kept) == [5, 32, 160]
