"""The engine against the model's own forward and `generate`."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from needs import FSDP2
from rlhf.compose import compose
from rlhf.errors import RequestError, RunError
from rlhf.interfaces import HeadRequest
from rlhf.plan import resource
from rlhf.planning.phases import predict
from rlhf.sequences import Generation, Sample
from rlhf_plugins.engines import hf
from rlhf_plugins.engines.sampling import uniforms

FP32 = {"rtol": 0.0, "atol": 2e-5}
"""Rounding of float32 in logits of about 10, summed in another order."""
FAMILIES = ["llama", "gpt2", "mistral"]


def responses(generation: Generation) -> list[list[int]]:
    return [tokens.tolist() for tokens in generation.sequences.responses()]


@pytest.mark.parametrize("max_batch", [1, 3, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generates(family: str, max_batch: int, load: Any, attach: Any, ask: Any) -> None:
    module, spec = load(family)
    requests = ask(3, 9, 1, 9, 20, 6, 2, greedy=True)
    generation = attach((module, spec), max_new_tokens=24, max_batch=max_batch).generate(requests)
    for request, found in zip(requests, responses(generation), strict=True):
        with torch.no_grad():
            own = module.generate(request.prompt.tokens[None], max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert found == own[0, len(request.prompt.tokens) :].tolist()
    if family != "gpt2":  # its tied head repeats the last token for ever
        assert set(generation.finish) == {"stop", "length"}
    for reason, tokens in zip(generation.finish, responses(generation), strict=True):
        assert (reason == "stop") == (tokens[-1] == 0)  # the end token is kept
        assert 0 not in tokens[:-1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_forward(
    family: str, temperature: float, load: Any, attach: Any, ask: Any, policy: Any
) -> None:
    module, spec = load(family)
    engine = attach((module, spec), max_new_tokens=16, temperature=temperature, max_batch=5)
    assert engine.logprobs.available and engine.logprobs.exact and not engine.logprobs.truncated
    generation = engine.generate(ask(3, 9, 1, count=4))
    (scores,) = policy.score(module, generation.sequences, [HeadRequest("policy", "lm", temperature=temperature)])
    torch.testing.assert_close(generation.logp, scores.logp.detach(), **FP32)
    assert generation.sequences.prompt_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_each_token_is_drawn_by_a_uniform_of_its_own(load: Any, attach: Any, ask: Any) -> None:
    module, spec = load()
    generation = attach((module, spec), max_new_tokens=16).generate(ask(3, 8, count=2))
    for row, tokens in enumerate(generation.sequences.responses()):
        prompt = generation.sequences.prompt(row)
        with torch.no_grad():
            logits = module(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        cumulative = torch.softmax(logits.double(), -1).cumsum(-1)  # [R, V]
        uniform = uniforms((row // 2, row % 2), 16)[: len(tokens)]
        assert tokens.tolist() == (cumulative < uniform[:, None]).sum(-1).tolist()


def test_a_response_depends_on_its_seed_alone(load: Any, attach: Any, ask: Any) -> None:
    loaded, requests = load(), ask(3, 9, 1, 14, count=3)
    whole = responses(attach(loaded, max_new_tokens=20).generate(requests))
    assert all(len({tuple(tokens) for tokens in whole[i : i + 3]}) > 1 for i in (0, 3, 6, 9))  # samples differ
    for max_batch in (1, 5):
        assert responses(attach(loaded, max_new_tokens=20, max_batch=max_batch).generate(requests)) == whole
    backwards = responses(attach(loaded, max_new_tokens=20).generate(requests[::-1]))
    assert [backwards[i : i + 3] for i in (9, 6, 3, 0)] == [whole[i : i + 3] for i in (0, 3, 6, 9)]
    alone = responses(attach(loaded, max_new_tokens=20).generate([requests[2]]))
    assert alone == whole[6:9]
    fewer = responses(attach(loaded, max_new_tokens=20).generate([attrs.evolve(requests[2], count=1)]))
    assert fewer == whole[6:7]
    other = responses(attach(loaded, max_new_tokens=20).generate([attrs.evolve(requests[2], seed=99)]))
    assert other != whole[6:9]


def test_without_seeds_calls_differ_and_a_restored_engine_repeats_them(load: Any, attach: Any, ask: Any) -> None:
    loaded, requests = load(), ask(3, 5, seed=None)
    engine = attach(loaded, max_new_tokens=20)
    first = responses(engine.generate(requests))
    engine.sync(lambda: iter(()), version=4)
    state = engine.state()
    second = engine.generate(requests)
    assert responses(second) != first and second.version == 4
    again = attach(loaded, max_new_tokens=20)
    again.load_state(state)
    third = again.generate(requests)
    assert responses(third) == responses(second) and third.version == 4


def test_sampled_frequencies_are_the_models_probabilities(load: Any, attach: Any, ask: Any) -> None:
    loaded = load(sharpness=4.0)
    count, heat = 4000, 0.8
    requests = ask(4, count=count)
    engine = attach(loaded, max_new_tokens=1, temperature=heat, max_batch=count)
    seen = torch.bincount(torch.tensor([tokens[0] for tokens in responses(engine.generate(requests))]), minlength=20)
    with torch.no_grad():
        logits = loaded[0](input_ids=requests[0].prompt.tokens[None]).logits[0, -1]
    expected = torch.softmax(logits / heat, -1) * count
    assert expected.max() > 4 * expected.min()  # far enough from uniform to tell
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 19 degrees of freedom: passed by chance once in a thousand, but the seed is fixed


def test_finished_rows_are_computed_no_more_and_prompts_once(load: Any, attach: Any, ask: Any) -> None:
    module, spec = load(stops=[0, 3])
    shapes: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    generation = attach((module, spec), max_new_tokens=30).generate(ask(7, 5, 6, count=4))
    prefill, steps = shapes[0], shapes[1:]
    assert prefill == (2, 7) or prefill == (3, 7)  # 5 may be padded to 7 or not
    decoded = sum(rows for rows, width in shapes if width == 1)
    assert decoded == int((generation.sequences.lengths - 1).sum()) and len(steps) > 0
    assert sum(rows for rows, width in shapes if width > 1) == 3


def test_slots_are_moved_back_when_their_columns_end(
    load: Any, attach: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, requests = load(), ask(*[12, 2, 3, 9, 4, 2, 5, 3, 8, 2], count=2)
    whole = attach(loaded, max_new_tokens=15).generate(requests)
    monkeypatch.setattr(hf, "_SPARE", 1)
    moves: list[int] = []
    plain = hf.SlotCache.move
    monkeypatch.setattr(hf.SlotCache, "move", lambda self, end: (moves.append(end), plain(self, end)))
    moved = attach(loaded, max_new_tokens=15, max_batch=3).generate(requests)
    assert responses(moved) == responses(whole)
    torch.testing.assert_close(
        moved.logp, whole.logp, **FP32
    )  # a column lost would show here before it does in a token
    assert len(moves) > 1


def test_every_end_token_stops_and_is_kept(load: Any, attach: Any, ask: Any) -> None:
    free = attach(load(stops=[0]), max_new_tokens=30).generate(ask(3, 4, 5, 6))
    both = attach(load(stops=[0, 3, 7]), max_new_tokens=30).generate(ask(3, 4, 5, 6))
    for long, short in zip(responses(free), responses(both), strict=True):
        ends = [i for i, token in enumerate(long) if token in (0, 3, 7)]
        assert short == (long[: ends[0] + 1] if ends else long)
    assert both.sequences.token_count < free.sequences.token_count


def test_a_stop_text_ends_the_response_that_holds_it(load: Any, attach: Any, ask: Any, policy: Any) -> None:
    loaded, requests = load(), ask(3, 4, 5, 6)
    codec = policy.codec(loaded[1].model)
    unstopped = attach(loaded, max_new_tokens=30).generate(requests)
    free = [codec.decode(tokens) for tokens in unstopped.sequences.responses()]
    longest = max(range(4), key=lambda i: len(free[i]))
    stop = free[longest][4:6]
    stopped = attach(loaded, max_new_tokens=30, stop=("zz", stop)).generate(requests)
    texts = [codec.decode(tokens) for tokens in stopped.sequences.responses()]
    for long, short in zip(free, texts, strict=True):
        assert short == (long[: long.index(stop) + 2] if stop in long else long)
    assert len(stop) == 2 and len(texts[longest]) < len(free[longest]) and stopped.finish[longest] == "stop"


def test_responses_end_with_the_models_context(load: Any, attach: Any, ask: Any) -> None:
    loaded = load(stops=[])
    loaded[0].get_output_embeddings().weight.data[0] = 0.0
    engine = attach(loaded, max_new_tokens=50, temperature=0.0)
    engine._stops = set()
    generation = engine.generate(ask(90, 40))
    assert generation.sequences.lengths.tolist() == [6, 50] and generation.finish == ("length", "length")
    with pytest.raises(RunError, match="context of 96"):
        engine.generate(ask(96))


def test_temperature_zero_is_greedy_and_can_be_asked_for_alone(load: Any, attach: Any, ask: Any) -> None:
    loaded = load()
    greedy = responses(attach(loaded, max_new_tokens=9).generate(ask(3, 4, greedy=True)))
    assert responses(attach(loaded, max_new_tokens=9, temperature=0.0).generate(ask(3, 4))) == greedy
    assert responses(attach(loaded, max_new_tokens=9).generate(ask(3, 4), temperature=0.0)) == greedy
    assert responses(attach(loaded, max_new_tokens=9).generate(ask(3, 4))) != greedy


def test_truncation_is_told_and_kept_to(load: Any, attach: Any, ask: Any) -> None:
    module, spec = load()
    engine = attach((module, spec), max_new_tokens=12, top_k=2)
    assert engine.logprobs.truncated and not engine.logprobs.exact
    generation = engine.generate(ask(3, 5, count=6))
    for i, tokens in enumerate(generation.sequences.responses()):
        prompt = generation.sequences.prompt(i)
        with torch.no_grad():
            logits = module(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        assert bool((logits.topk(2).indices == tokens[:, None]).any(-1).all())


def test_half_precision_is_not_exact(load: Any, attach: Any) -> None:
    assert not attach(load(compute=torch.bfloat16)).logprobs.exact
    assert not attach(load(weights=torch.bfloat16)).logprobs.exact


def test_adapters_are_sampled_from(load: Any, attach: Any, ask: Any, policy: Any) -> None:
    module, spec = load()
    plain = responses(attach((module, spec), max_new_tokens=12).generate(ask(3, 5)))
    torch.manual_seed(1)
    wrapped = get_peft_model(module, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    generation = attach((wrapped, spec), max_new_tokens=12).generate(ask(3, 5))
    assert responses(generation) != plain
    (scores,) = policy.score(wrapped, generation.sequences, [HeadRequest("policy", "lm")])
    torch.testing.assert_close(generation.logp, scores.logp.detach(), **FP32)


def test_the_module_is_left_as_it_was(load: Any, attach: Any, ask: Any) -> None:
    module, spec = load()
    module.set_attn_implementation("sdpa")  # it samples by a faster one
    attach((module, spec), max_new_tokens=3).generate(ask(3))
    assert module.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_two_requests_of_one_prompt_share_it(load: Any, attach: Any, ask: Any) -> None:
    (request,) = ask(5, count=2)
    baseline = Sample(request.prompt, greedy=True, seed=1)
    generation = attach(load(), max_new_tokens=5).generate([request, baseline])
    assert len(generation.sequences.prompts) == 1 and generation.sequences.prompt_of.tolist() == [0, 0, 0]


def test_dropout_is_off_even_in_training_mode(load: Any, attach: Any, ask: Any, policy: Any) -> None:
    module, spec = load("gpt2")  # whose config drops out a tenth
    generation = attach((module.train(), spec), max_new_tokens=12).generate(ask(3, 5))
    (scores,) = policy.score(module, generation.sequences, [HeadRequest("policy", "lm")])
    torch.testing.assert_close(generation.logp, scores.logp.detach(), **FP32)


def test_nothing_asked_is_nothing(load: Any, attach: Any) -> None:
    assert len(attach(load()).generate([]).sequences) == 0


def test_a_model_with_another_memory_is_refused(load: Any, attach: Any) -> None:
    module, spec = load()
    module.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(RequestError, match="linear_attention"):
        attach((module, spec))


@FSDP2
def test_a_plan_counts_the_policy_that_is_gathered_for_a_rollout(typed: Any, installed: Any, machine: Any) -> None:
    """Of the starter's weights in float32 each of four ranks lacks three quarters; loaded they are whole."""
    gathered, loaded = {}, {}
    for backend in ("fsdp2", "ddp"):
        recipe = typed("--algo", "ppo", "--mem", "fp32", "--nproc", "4", "--backend", backend)
        phases = {one.phase: one.device for one in predict(compose(recipe, installed, machine)).phases}
        gathered[backend] = phases["rollout"].get("gathered weights", 0.0)
        loaded[backend] = phases["load"]["weights"]
    model = AutoModelForCausalLM.from_pretrained(resource("rlhf_plugins.starter:model"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert gathered == {"fsdp2": pytest.approx(4 * count * 3 / 4), "ddp": 0.0}
    assert loaded["fsdp2"] == loaded["ddp"]
