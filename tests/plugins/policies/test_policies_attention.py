"""Attention by matrix products: what the fused kernel gives, to bfloat16; gradients; what it leaves to others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.api import HeadRequest, LoadSpec, Sequences
from rlhf_plugins.policies import attention
from rlhf_plugins.policies.hf import HFPolicy


class Layer(torch.nn.Module):
    """What transformers hands over as the module."""

    is_causal = True
    num_key_value_groups = 3


def states(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query [2, 6, count, 8], key and value [2, 2, width, 8], exact in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 6, count, 8), (2, 2, width, 8), (2, 2, width, 8))
    made = [torch.randn(shape, generator=draw).bfloat16().to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def reference(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """From the definition, in float64: softmax(q k / sqrt(d)) v, a key head for every three query heads."""
    q, k, v = query.double(), key.double().repeat_interleave(3, 1), value.double().repeat_interleave(3, 1)
    scores = (q @ k.transpose(-1, -2)) / 8**0.5
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def masks(count: int, width: int) -> dict[str, Tensor | None]:
    """Causal; and one of each row, True where a query may look."""
    causal = torch.ones(count, width, dtype=torch.bool).tril(width - count)
    own = causal.clone()
    own[:, 1] = False  # a token that none but itself sees
    own[1, 1] = True
    return {"causal": None, "rows": torch.stack([causal, own])[:, None]}


@pytest.mark.parametrize("name", ["causal", "rows"])
def test_it_is_the_definition_to_bfloat16_and_so_are_its_gradients(name: str) -> None:
    mask = masks(7, 7)[name]
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if mask is None else ~mask
    ours, theirs = states(7, 7), [x.detach().double().requires_grad_() for x in states(7, 7)]
    found, _ = attention.grouped_attention(Layer(), *ours, mask, 8**-0.5)
    expected = reference(*theirs, hidden)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    # Weights, scores and results are rounded to 8 bits: 2^-9 each, of norms
    for a, b in ((found, expected), *((x.grad, y.grad) for x, y in zip(ours, theirs, strict=True))):
        assert a is not None and b is not None
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < 4 * 2**-9
    assert found.dtype == torch.bfloat16


def test_a_query_that_sees_nothing_is_no_nan() -> None:
    mask = masks(5, 5)["rows"]
    assert mask is not None
    mask[0, 0, 2] = False
    ours = states(5, 5)
    found, _ = attention.grouped_attention(Layer(), *ours, mask, 8**-0.5)
    found.float().sum().backward()
    assert all(bool(torch.isfinite(x).all()) for x in (found, *(y.grad for y in ours if y.grad is not None)))


def test_a_rectangle_behind_a_cache_needs_its_mask() -> None:
    mask = masks(3, 9)["rows"]
    assert mask is not None
    ours = states(3, 9)
    found, _ = attention.grouped_attention(Layer(), *ours, mask, 8**-0.5)
    expected = reference(*ours, ~mask)
    assert float((found.double() - expected).norm() / expected.norm()) < 4 * 2**-9


@pytest.mark.parametrize("why", ["float32", "dropout", "softcap", "size"])
def test_what_it_does_not_do_is_left_to_the_fused_kernel(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (asked.append(k), (a[1], None))[1])
    ours = states(4, 4, torch.float32 if why == "float32" else torch.bfloat16)
    options: dict[str, Any] = {"dropout": {"dropout": 0.1}, "softcap": {"softcap": 30.0}}.get(why, {})
    if why == "size":
        monkeypatch.setattr(attention, "MOST", 2 * 6 * 4 * 4 - 1)
    attention.grouped_attention(Layer(), *ours, None, 8**-0.5, **options)
    assert len(asked) == 1


def test_a_policy_takes_it_on_a_cpu_and_its_scores_stay(
    folder: Callable[..., str], policy: Callable[..., HFPolicy], spec: Callable[..., LoadSpec], ragged: Sequences,
    tmp_path: Any,
) -> None:  # fmt: skip
    place = folder("llama")
    head = [HeadRequest("policy", "lm")]
    scores: dict[str, Tensor] = {}
    for name, options in (("auto", {}), ("sdpa", {"attention": "sdpa"}), ("eager", {"attention": "eager"})):
        made = policy(**options)
        module: Any = made.load(spec(place, compute=torch.bfloat16))
        assert module.config._attn_implementation == {"auto": attention.NAME}.get(name, name)
        with torch.no_grad():
            scores[name] = made.score(module, ragged, head)[0].logp
        if name == "auto":
            made.save(module, tmp_path / "saved", spec(place))
            assert attention.NAME not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))
    exact: Any = policy(attention="sdpa").load(spec(place))
    with torch.no_grad():
        expected = policy().score(exact, ragged, head)[0].logp
    strays = {name: float((logp - expected).abs().mean()) for name, logp in scores.items()}
    assert strays["auto"] < 1.5 * max(strays["sdpa"], strays["eager"]), strays  # of 22 tokens; noise of bfloat16
    assert strays["auto"] > 0
