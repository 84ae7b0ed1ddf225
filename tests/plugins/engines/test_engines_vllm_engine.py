"""What the engine asks of a vLLM, and what it does when that one is wrong: with a fake of it, which samples nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.facts import Machine
from rlhf.interfaces import Context, LoadSpec
from rlhf.plan import Plan
from rlhf.sequences import Sample, Sequences
from rlhf_plugins.engines.vllm import engine as engines
from rlhf_plugins.engines.vllm.engine import VLLMEngine
from rlhf_plugins.engines.vllm.entry import VLLMConfig
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, Settings, Stream
from rlhf_plugins.engines.vllm.worker import fingerprint


class FakeSampler:
    """Answers each prompt with its own last token, thrice, of log-prob -1 each; keeps what it is given."""

    version = -1

    def __init__(self, settings: Settings) -> None:
        self.settings, self.asks, self.calls = settings, list[Ask](), list[str]()
        self.weights: dict[str, Tensor] = {}

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        self.calls.append("sample")
        self.asks = list(asks)
        return [Answer((ask.prompt[-1],) * 3, (-1.0,) * 3, "length") for ask in asks]

    def load(self, weights: Stream, version: int) -> None:
        self.calls.append("load")
        self.weights, self.version = {name: tensor.clone() for name, tensor in weights()}, version

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self.calls.append("load_adapter")
        self.adapter, self.version = dict(tensors), version

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        self.calls.append("score")
        return [[-1.0] * (len(tokens) - 1) for tokens in sequences]

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        return {name: fingerprint(self.weights[name]) for name in shapes if name in self.weights}

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        self.calls.append("close")


class _RolePlan:
    def provides(self) -> frozenset[str]:
        return frozenset()


class _PlanOf:
    machine = Machine(2, frozenset(), 8 << 30, (), 1)

    def role(self, name: str) -> Any:
        return _RolePlan()


@pytest.fixture
def attached(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., tuple[Any, LoadSpec]], policy: Any
) -> Callable[..., tuple[VLLMEngine, FakeSampler]]:
    def make(trainer: float | None = -1.0, family: str = "llama", **options: Any) -> tuple[VLLMEngine, FakeSampler]:
        monkeypatch.setattr(engines, "sampler_at", lambda config, settings, context: FakeSampler(settings))
        module, spec = load(family)
        engine = VLLMEngine(VLLMConfig(**options), Context(cast(Plan, _PlanOf()), seed=7))
        if trainer is not None:
            engine.trainer_logp = lambda sequences, heat: torch.full((len(sequences.tokens),), trainer)
        engine.attach(module, policy, spec)
        engine.sync(lambda only=None: iter(module.state_dict().items()), 0)
        return engine, cast(FakeSampler, engine._sampler)

    return make


def test_what_is_asked_for(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached(max_new_tokens=10, temperature=0.7, top_p=0.9, top_k=5, stop=("b",), trainer=None)
    first, second = ask(3, 90, count=2)
    found = engine.generate([first, second])
    assert [len(one.prompt) for one in fake.asks] == [3, 3, 90, 90]
    assert [one.max_tokens for one in fake.asks] == [10, 10, 6, 6]  # the context is of 96
    assert {(one.temperature, one.top_p, one.top_k, one.stop) for one in fake.asks} == {(0.7, 0.9, 5, ("b",))}
    assert {one.stop_tokens for one in fake.asks} == {(0,)}
    seeds = [one.seed for one in fake.asks]
    assert len(set(seeds)) == 4 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert found.sequences.prompt_of.tolist() == [0, 0, 1, 1] and len(found.sequences.prompts) == 2
    assert found.sequences.lengths.tolist() == [3] * 4 and found.logp.tolist() == [-1.0] * 12
    engine.generate([second, first])
    assert [one.seed for one in fake.asks] == [*seeds[2:], *seeds[:2]]  # whatever else is asked for


def test_seeds_of_its_own_differ_from_call_to_call(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached()
    engine.generate(ask(3, seed=None))
    first = fake.asks[0].seed
    engine.generate(ask(3, seed=None))
    assert fake.asks[0].seed != first
    again, other = attached()
    again.load_state({"calls": 1})
    again.generate(ask(3, seed=None))
    assert other.asks[0].seed == fake.asks[0].seed


def test_a_prompt_that_fills_the_context_is_an_error(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, _ = attached()
    with pytest.raises(RunError, match="a prompt of 96 tokens leaves no room to answer in 96 tokens"):
        engine.generate(ask(96))


def test_greedy_tokens_beside_others_have_no_log_probs(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    """vLLM tells those at temperature 1, and the batch's are at another."""
    engine, fake = attached(temperature=0.7)
    mixed = [*ask(3), *ask(4, greedy=True)]
    assert engine.generate(mixed).logp is None
    assert [one.temperature for one in fake.asks] == [0.7, 0.0]
    assert engine.generate(ask(3)).logp is not None
    assert engine.generate(mixed, temperature=1.0).logp is not None
    assert engine.generate(ask(3), temperature=0.0).logp is not None


def test_nothing_is_sampled_from_weights_of_its_own(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached()
    fake.version = -1
    with pytest.raises(RunError, match="before it was given weights"):
        engine.generate(ask(3))


def test_the_version_is_that_of_the_weights(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached()
    assert engine.generate(ask(3)).version == 0
    engine.sync(engine._weights, 5)
    assert engine.generate(ask(3)).version == 5
    assert fake.calls == ["load", "sample", "load", "sample"]


def checks(engine: VLLMEngine, ask: Callable[..., list[Sample]], syncs: int) -> list[bool]:
    """After which of so many syncs, the first already made, the trainer was asked."""
    asked: list[bool] = []
    original = engine.trainer_logp

    def noting(sequences: Sequences, heat: float) -> Tensor:
        asked[-1] = True
        return cast(Any, original)(sequences, heat)  # type: ignore[no-any-return]

    engine.trainer_logp = noting
    for i in range(syncs):
        if i:
            engine.sync(cast(Any, engine._weights), i)
        asked.append(False)
        engine.generate(ask(3))
        engine.generate(ask(3))
    return asked


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0, [1, 0, 0, 0, 0]), (1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0])],
)
def test_checked_after_the_first_sync_and_every_so_many(
    attached: Any, ask: Callable[..., list[Sample]], every: int, expected: list[int]
) -> None:
    engine, _ = attached(check_every=every)
    assert checks(engine, ask, 5) == [bool(x) for x in expected]


def test_log_probs_that_are_not_the_trainers_end_the_run(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached(trainer=-1.1)
    fake.weights["model.norm.weight"] = fake.weights["model.norm.weight"] * 1.5
    with pytest.raises(RunError) as caught:
        engine.generate(ask(3, 4, 5, 6, 7))
    told = str(caught.value)
    assert "after sync 1 (version 0): off by 0.1 on average, 0.1 at most, on 12 tokens, where float32 allows" in told
    assert "other weights than it was given: model.norm.weight (by 50%), of 21 compared" in told


def test_where_all_weights_are_right_it_says_so(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, _ = attached(trainer=-1.1)
    with pytest.raises(RunError, match="The 21 weights that could be compared are as given, so it is how it computes"):
        engine.generate(ask(3))


def test_truncated_log_probs_are_not_compared_but_scored(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached(top_p=0.9, temperature=0.5)
    heats: list[float] = []
    engine.trainer_logp = lambda sequences, heat: heats.append(heat) or torch.full((len(sequences.tokens),), -1.0)  # type: ignore[func-returns-value]
    engine.generate(ask(3))
    assert fake.calls == ["load", "sample", "score"] and heats == [1.0]
    assert engine.logprobs.truncated and not engine.logprobs.exact


def test_compared_at_the_temperature_that_sampled(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    heats: list[float] = []
    for temperature, greedy in ((0.7, False), (0.0, False), (0.7, True)):
        engine, fake = attached()
        engine.trainer_logp = lambda sequences, heat: heats.append(heat) or torch.full((len(sequences.tokens),), -1.0)  # type: ignore[func-returns-value]
        engine.generate(ask(3, greedy=greedy), temperature)
        assert "score" not in fake.calls
    assert heats == [0.7, 1.0, 1.0]  # greedy: vLLM tells those at 1


def test_a_rank_without_requests_takes_part(attached: Any) -> None:
    engine, _ = attached()
    found = engine.generate([])
    assert len(found.sequences) == 0 and found.logp.shape == (0,)


def test_how_it_is_started(attached: Any) -> None:
    engine, fake = attached(max_num_seqs=32, max_new_tokens=16)
    arguments = fake.settings.arguments
    assert arguments["load_format"] == "dummy"  # no checkpoint is read that the first sync replaces
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert (arguments["dtype"], arguments["enforce_eager"], arguments["max_model_len"]) == ("float32", True, 96)
    assert arguments["kv_cache_memory_bytes"] == 1 << 24  # the least there is, for so small a model
    assert arguments["skip_tokenizer_init"] and "enable_lora" not in arguments
    assert engine.logprobs.exact and engine.logprobs.after_temperature
    _, other = attached(stop=("b",), enforce_eager=False, dtype="bfloat16")
    assert not other.settings.arguments["skip_tokenizer_init"] and not other.settings.arguments["enforce_eager"]
    assert other.settings.arguments["dtype"] == "bfloat16"
    import json

    assert json.loads(json.dumps(dict(arguments))) == arguments  # for another process


def test_asleep_between_rollouts(attached: Any, ask: Callable[..., list[Sample]]) -> None:
    engine, fake = attached(sleep=True)
    engine.generate(ask(3))
    engine.sync(engine._weights, 1)
    engine.generate(ask(3))
    assert fake.calls == ["load", "sample", "sleep", "wake", "load", "sample", "sleep"]
    engine.close()
    engine.close()
    assert fake.calls.count("close") == 1
    with pytest.raises(RunError, match="after it was closed"):
        engine.generate(ask(3))
