"""Scores of ragged sequences against one forward a sequence, without padding, sharing or chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rlhf.errors import RunError
from rlhf.interfaces import HeadRequest
from rlhf.sequences import Sequences
from rlhf_plugins.policies.ragged import Costs
from rlhf_plugins.policies.trunk import Trunk, examine

FP32 = {"rtol": 0.0, "atol": 1e-5}
"""Rounding of float32 (6e-8) over some hundred additions of numbers about 1, in another order."""
LM = HeadRequest("policy", "lm", entropy=True)


def naive(module: Any, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs [N], entropies [N], last layer's states [sum of lengths + B]: before each token, then at the last)."""
    logps, entropies, states = [], [], []
    for i, response in enumerate(sequences.responses()):
        prompt = sequences.prompt(i)
        out = module(input_ids=torch.cat([prompt, response])[None], output_hidden_states=True)
        table = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1].float() / temperature, dim=-1)
        logps.append(table[torch.arange(len(response)), response])
        entropies.append(-(table.exp() * table).sum(-1))
        states.append(out.hidden_states[-1][0, len(prompt) - 1 :])
    return torch.cat(logps), torch.cat(entropies), torch.cat(states)


def gradients(module: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("layout", ["padded", "shared", "flat", "auto"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2", "gemma2", "cohere", "granite", "mistral"])
def test_logp_entropy_and_their_gradients_are_those_of_a_plain_forward(
    family: str, layout: str, folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy(layout=layout, chunk_tokens=5)
    module = hf.load(spec(folder(family)))
    weights = torch.randn(2, len(ragged.tokens), generator=torch.Generator().manual_seed(3))
    logp, entropy, _ = naive(module, ragged, temperature=0.7)
    (weights[0] @ logp + weights[1] @ entropy).backward()
    expected = gradients(module)

    (scores,) = hf.score(module, ragged, [HeadRequest("policy", "lm", temperature=0.7, entropy=True)])
    (weights[0] @ scores.logp + weights[1] @ scores.entropy).backward()

    torch.testing.assert_close(scores.logp, logp, **FP32)
    torch.testing.assert_close(scores.entropy, entropy, **FP32)
    found = gradients(module)
    assert found.keys() == expected.keys() and expected
    for name in expected:
        # sums of terms that cancel: their rounding is relative to the largest of the tensor
        allowed = 1e-5 * (1.0 + float(expected[name].abs().max()))
        assert float((found[name] - expected[name]).abs().max()) < allowed, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_several_responses_stand_behind_one_prompt_where_the_model_allows_it(
    family: str, folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy(layout="shared")
    module = hf.load(spec(folder(family)))
    seen: list[tuple[int, ...]] = []
    module.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        hf.score(module, ragged, [LM])
    # 7 + 4 + 1 + 6 and 3 + 9 + 2 tokens: two rows, of which the longer has 18
    assert sum(rows for rows, _ in seen) == 2 and max(width for _, width in seen) == 18


@pytest.mark.parametrize("family", ["llama", "qwen2", "cohere", "granite"])
def test_everything_stands_in_one_row_without_padding(
    family: str, folder: Any, policy: Any, spec: Any, ragged: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = policy().load(spec(folder(family)))
    seen: list[tuple[int, ...]] = []
    module.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    flat = (1, 7 + 4 + 1 + 6 + 3 + 9 + 2)
    alone = ragged.select(torch.tensor([0, 1]))  # of two prompts
    with torch.no_grad():
        policy(layout="flat").score(module, ragged, [LM])
        assert seen == [flat]
        policy().score(module, alone, [LM])
        assert seen[1:] == [(1, sum(alone.total_lengths()))]
        # a narrow model: where a prompt is shared, its rectangles cost less than the calls of a flat row's blocks
        policy().score(module, ragged, [LM])
        assert flat not in seen[2:]
        seen.clear()
        monkeypatch.setattr(Trunk, "flat_costs", lambda self: Costs(pair=1e-3, call=32.0, most=10**9))
        policy().score(module, ragged, [LM])
        assert seen == [flat]


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_windowed_model_never_shares_rows(family: str, folder: Any, policy: Any, spec: Any) -> None:
    """Mistral's window of 12 is longer than what a model is tried on at loading."""
    traits = Trunk(policy().load(spec(folder(family)))).traits
    assert not traits.shareable and not traits.flat


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_known_scales_and_caps_of_logits_need_no_forward_of_the_models_own(
    family: str, folder: Any, policy: Any, spec: Any
) -> None:
    assert not Trunk(policy().load(spec(folder(family)))).traits.own_forward


def test_a_model_with_logits_of_its_own_making_is_read_through_its_own_forward(
    folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy(layout="padded", chunk_tokens=4)
    module = hf.load(spec(folder("llama")))
    plain = type(module).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 3.0
        return out

    module.__class__ = type("Odd", (type(module),), {"forward": forward})
    examine(module, None, torch.device("cpu"), lm=True)
    assert Trunk(module).traits.own_forward
    head = hf.add_scalar_head(module, "value", "normal", seed=1)
    scores, values = hf.score(module, ragged, [LM, HeadRequest("value", "scalar", head)])
    logp, entropy, states = naive(module, ragged)
    torch.testing.assert_close(scores.logp, logp, **FP32)
    torch.testing.assert_close(scores.entropy, entropy, **FP32)
    before = torch.cat([part[:-1] for part in states.split((ragged.lengths + 1).tolist())])
    torch.testing.assert_close(values.values, head(before)[:, 0], **FP32)


@pytest.mark.parametrize("layout", ["padded", "shared", "flat"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scalars_are_read_before_each_response_token_and_at_the_last(
    family: str, layout: str, folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy(layout=layout)
    module = hf.load(spec(folder(family, "scalar"), "scalar"))
    with torch.no_grad():
        (scores,) = hf.score(module, ragged, [HeadRequest("reward", "scalar")])
        for i, response in enumerate(ragged.responses()):
            prompt, start = ragged.prompt(i), int(ragged.lengths[:i].sum())
            states = module.base_model(input_ids=torch.cat([prompt, response])[None]).last_hidden_state[0]
            by_hand = states @ module.score.weight[0]  # [P + R], one a position
            values = scores.values[start : start + len(response)]
            torch.testing.assert_close(values, by_hand[len(prompt) - 1 : -1], **FP32)
            torch.testing.assert_close(scores.score[i], by_hand[-1], **FP32)


def test_one_forward_of_the_trunk_serves_every_head(folder: Any, policy: Any, spec: Any, ragged: Sequences) -> None:
    hf = policy(layout="padded")
    module = hf.load(spec(folder("llama")))
    head = hf.add_scalar_head(module, "value", "normal", seed=1)
    (alone,) = hf.score(module, ragged, [LM])
    calls: list[int] = []
    module.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    hf.score(module, ragged, [LM])
    once = len(calls)
    lm, value = hf.score(module, ragged, [LM, HeadRequest("value", "scalar", head)])
    assert len(calls) == 2 * once
    assert torch.equal(lm.logp, alone.logp)
    (value.values.sum() + value.score.sum()).backward()
    assert head.weight.grad.abs().sum() > 0 and module.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_scores_do_not_depend_on_what_else_is_in_the_batch(
    folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy()
    module = hf.load(spec(folder("llama")))
    with torch.no_grad():
        (whole,) = hf.score(module, ragged, [LM])
        for rows in (torch.tensor([3]), torch.tensor([4, 0]), torch.tensor([2, 1, 3])):
            (part,) = hf.score(module, ragged.select(rows), [LM])
            torch.testing.assert_close(part.logp, whole.logp[ragged.token_index(rows)], **FP32)


def test_adapters_are_scored_with_and_without(folder: Any, policy: Any, spec: Any, ragged: Sequences) -> None:
    hf = policy()
    module = hf.load(spec(folder("llama")))
    (base,) = hf.score(module, ragged, [LM])
    torch.manual_seed(2)
    wrapped = get_peft_model(
        module, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)
    )
    (scores,) = hf.score(wrapped, ragged, [LM])
    logp, entropy, _ = naive(wrapped, ragged)
    torch.testing.assert_close(scores.logp, logp, **FP32)
    torch.testing.assert_close(scores.entropy, entropy, **FP32)
    assert (scores.logp - base.logp).abs().max() > 0.1
    with wrapped.disable_adapter():
        (off,) = hf.score(wrapped, ragged, [LM])
    torch.testing.assert_close(off.logp, base.logp, rtol=0, atol=0)  # the same products
    scores.logp.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in wrapped.named_parameters())


def test_autocast_computes_in_bfloat16_and_returns_float32(
    folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf, place = policy(), folder("llama")
    (exact,) = hf.score(hf.load(spec(place)), ragged, [LM])
    module = hf.load(spec(place, compute=torch.bfloat16))
    dtypes: set[torch.dtype] = set()
    module.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    (rounded,) = hf.score(module, ragged, [LM])
    assert dtypes == {torch.bfloat16} and rounded.logp.dtype == torch.float32
    # 2^-8 a product, over two layers and logits of about 5
    torch.testing.assert_close(rounded.logp, exact.logp, rtol=0, atol=0.25)
    assert not torch.equal(rounded.logp, exact.logp)


def test_a_scalar_head_reads_in_float32_whatever_the_trunk(
    folder: Any, policy: Any, spec: Any, ragged: Sequences
) -> None:
    hf = policy()
    module = hf.load(spec(folder("llama", "scalar"), "scalar", weights=torch.bfloat16))
    (scores,) = hf.score(module, ragged, [HeadRequest("reward", "scalar")])
    assert module.score.weight.dtype == torch.float32 and module.model.norm.weight.dtype == torch.bfloat16
    assert scores.score.dtype == torch.float32
    assert not torch.equal(scores.score, scores.score.bfloat16().float())  # more digits than bfloat16 has


def test_dropout_is_off_even_in_training_mode(folder: Any, policy: Any, spec: Any, ragged: Sequences) -> None:
    hf = policy()
    module = hf.load(spec(folder("gpt2")))  # whose config drops out a tenth
    (first,) = hf.score(module, ragged, [LM])
    (second,) = hf.score(module.train(), ragged, [LM])
    assert torch.equal(first.logp, second.logp)


def test_temperature_zero_has_no_log_probs(folder: Any, policy: Any, spec: Any, ragged: Sequences) -> None:
    hf = policy()
    module = hf.load(spec(folder("llama")))
    with pytest.raises(RunError, match="temperature 0"):
        hf.score(module, ragged, [HeadRequest("policy", "lm", temperature=0.0)])
