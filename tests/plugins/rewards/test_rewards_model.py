"""The reward model: the tokens that were sampled where they mean the same to it, else its own encoding of the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf import facts
from rlhf.entries import AlgorithmEntry, Entry, RewardEntry, Role
from rlhf.errors import RequestError
from rlhf.facts import Machine, ModelFacts
from rlhf.interfaces import Context, Failed, HeadRequest, LoadSpec
from rlhf.plan import Component, Plan, RolePlan
from rlhf.recipe import RunOptions
from rlhf.rows import PromptRow
from rlhf.scores import Scores
from rlhf.sequences import Rollouts, Sequences
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.hf import HFPolicy
from rlhf_plugins.rewards import ModelConfig, rlhf_rewards, scores_one_number
from rlhf_plugins.rewards.model import RewardModel, same_vocabulary

LETTERS = "abcdefghij?u"
CONTEXT = 24
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}?{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a?{% endif %}"
)
OTHER_TEMPLATE = TEMPLATE.replace("a?{%", "a??{%")


def save_tokenizer(folder: Path, letters: str = LETTERS, template: str | None = None, pad: bool = False) -> None:
    """A token a letter, numbered in the order of `letters`; <eos> is 0."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<eos>")
    if pad:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def llama(context: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, bos_token_id=None, eos_token_id=0, **more,
    )  # fmt: skip


@attrs.frozen
class Bench:
    """A policy's folder and a reward model's, and the run's parts around them."""

    folder: Path
    label: str = ""
    config: ModelConfig = attrs.Factory(ModelConfig)

    @property
    def role(self) -> str:
        return self.label or "reward"

    @property
    def plan(self) -> Plan:
        def part(entry: Entry, config: Any = None, label: str = "") -> Component:
            return Component(entry, config, label)

        roles = {"policy": Role("policy", trainable=True), self.role: Role(self.role, head="scalar", start="given")}
        folders = {"policy": "policy", self.role: "judge"}
        facts_of = {name: facts.model(str(self.folder / folders[name])) for name in roles}
        any_entry = part(AlgorithmEntry(name="any", summary="", impl="m:C"))
        return Plan(
            algo=any_entry, policy=any_entry, engine=None, optim=any_entry, backend=any_entry, launch=any_entry,
            rewards=(part(RewardEntry(name="model", summary="", impl="m:C"), self.config, self.label),),
            trackers=(), data=(), eval_data=(), run=RunOptions(), machine=Machine(1, frozenset(), 1, (), 1),
            roles=tuple(RolePlan(role, known, (), name) for (name, role), known in zip(
                roles.items(), (f for f in facts_of.values() if isinstance(f, ModelFacts)), strict=True)),
        )  # fmt: skip

    @property
    def policy(self) -> HFPolicy:
        return HFPolicy(HFPolicyConfig(), Context(self.plan))

    def reward(self) -> RewardModel:
        return RewardModel(self.config, Context(self.plan, policy=self.policy, label=self.label or "model"))

    def module(self) -> nn.Module:
        spec = LoadSpec(self.role, str(self.folder / "judge"), "scalar", False, "keep", "cpu")
        return self.policy.load(spec)

    def rollouts(self, prompts: list[Any], of: list[int], texts: list[str], finish: list[str]) -> Rollouts:
        """As the policy would sample them: its own tokens, closed by its <eos> where it stopped."""
        codec = self.policy.codec(str(self.folder / "policy"))
        rows = [PromptRow(prompt) for prompt in prompts]
        responses = [
            codec.response(text, prompts[i], end=reason == "stop")
            for text, i, reason in zip(texts, of, finish, strict=True)
        ]
        tokens = [codec.prompt(prompt) for prompt in prompts]
        count = len(texts)
        return Rollouts(
            Sequences.of(tokens, responses, prompt_of=of), None, tuple(finish), tuple(rows[i] for i in of),  # type: ignore[arg-type]
            tuple(codec.prompt_text(tokens[i]) for i in of), tuple(texts), ("",) * count, torch.zeros(count),
        )  # fmt: skip


class Watching:
    """The core's no-grad forward, which keeps what it was asked."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._module = bench, bench.module()
        self.asked: list[tuple[Sequences, str]] = []

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        self.asked.append((of, role))
        if not len(of):
            return Scores(role, score_=torch.zeros(0))
        with torch.no_grad():
            return self._bench.policy.score(self._module, of, [HeadRequest(role, "scalar")])[0]

    def direct(self, tokens: list[int]) -> float:
        """The classifier's own forward of one sequence: what it says of the last token."""
        with torch.no_grad():
            return float(self._module(input_ids=torch.tensor([tokens])).logits)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(
        letters: str = LETTERS, template: str | None = None, pad: bool = False, more_said: bool = False, **more: Any
    ) -> Bench:
        torch.manual_seed(1)
        LlamaForSequenceClassification(llama(CONTEXT, num_labels=1)).save_pretrained(tmp_path / "judge")
        save_tokenizer(tmp_path / "judge", letters, template, pad)
        llama(64, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "policy")
        save_tokenizer(tmp_path / "policy", template=TEMPLATE, pad=more_said)
        return Bench(tmp_path, **more)

    return make


MakeBench = Callable[..., Bench]
CHAT = ({"role": "user", "content": "bad"},)
SAMPLES: tuple[Any, ...] = (["abc", CHAT], [0, 0, 1], ["jig", "fade", "h"], ["stop", "length", "stop"])
SAME = 1e-5  # float32 scores of order 1 through two layers, in another order of summing


def letters(text: str, order: str = LETTERS) -> list[int]:
    """Token ids, ! standing for <eos>."""
    return [0 if c == "!" else order.index(c) + 1 for c in text]


def test_same_tokenizer_scores_the_sampled_tokens(bench: MakeBench) -> None:
    made = bench(template=TEMPLATE)
    given, score = made.rollouts(*SAMPLES), Watching(made)
    found = made.reward().judge(given, score)  # type: ignore[arg-type]
    ((asked, role),) = score.asked
    assert role == "reward"
    assert len(asked.prompts) == 2  # the group's prompt is held once
    assert asked.tokens.tolist() == given.sequences.tokens.tolist()
    expected = [
        score.direct(letters("abcjig!")),
        score.direct(letters("abcfade")),  # cut by the length limit: not closed
        score.direct(letters("u?bad!a?h!")),
    ]
    assert found == pytest.approx(expected, abs=SAME)
    assert len({round(x, 3) for x in expected}) == 3  # else the comparison would show nothing


def test_encoding_again_gives_the_same_scores(bench: MakeBench) -> None:
    made = bench(template=TEMPLATE)
    given, score = made.rollouts(*SAMPLES), Watching(made)
    fast = made.reward().judge(given, score)  # type: ignore[arg-type]
    again = attrs.evolve(made, config=ModelConfig(template="own")).reward().judge(given, score)  # type: ignore[arg-type]
    assert again == pytest.approx(fast, abs=SAME)
    assert torch.equal(score.asked[0][0].tokens, score.asked[1][0].tokens)


def test_another_tokenizer_and_template(bench: MakeBench) -> None:
    order = LETTERS[::-1]
    made = bench(letters=order, template=OTHER_TEMPLATE)
    score = Watching(made)
    found = made.reward().judge(made.rollouts(*SAMPLES), score)  # type: ignore[arg-type]
    expected = [
        score.direct(letters("abcjig!", order)),
        score.direct(letters("abcfade", order)),
        score.direct(letters("u?bad!a??h!", order)),
    ]
    assert found == pytest.approx(expected, abs=SAME)
    assert len(score.asked[0][0].prompts) == 2


@pytest.mark.parametrize(
    ("own", "prompt", "response"),
    [
        ({"template": TEMPLATE}, "u?bad!a?", "h!"),
        ({"template": None}, "u?bad!a?", "h!"),  # none that could differ
        ({"template": TEMPLATE, "pad": True}, "u?bad!a?", "h!"),  # a token more, which the policy never says
        ({"template": TEMPLATE, "more_said": True}, "u?bad!a?", "c!"),  # one that it wouldn't know
        ({"template": OTHER_TEMPLATE}, "u?bad!a??", "c!"),
        ({"template": TEMPLATE, "config": ModelConfig(template="own")}, "u?bad!a?", "c!"),
        ({"template": OTHER_TEMPLATE, "config": ModelConfig(template="same")}, "u?bad!a?", "h!"),
    ],
)
def test_which_is_read(bench: MakeBench, own: dict[str, Any], prompt: str, response: str) -> None:
    """Tokens and text are made to disagree here, so that it shows which of the two was taken."""
    made = bench(**own)
    score = Watching(made)
    given = attrs.evolve(made.rollouts([CHAT], [0], ["h"], ["stop"]), texts=("c",))
    made.reward().judge(given, score)  # type: ignore[arg-type]
    asked = score.asked[0][0]
    assert (asked.prompt(0).tolist(), asked.tokens.tolist()) == (letters(prompt), letters(response))


def test_auto_reads_text_by_another_vocabulary(bench: MakeBench) -> None:
    """The same tokens and rules, numbered otherwise: as tokens, the text would be another."""
    made = bench(letters=LETTERS[::-1], template=TEMPLATE)
    score = Watching(made)
    made.reward().judge(made.rollouts(["abc"], [0], ["d"], ["stop"]), score)  # type: ignore[arg-type]
    assert score.asked[0][0].prompt(0).tolist() == letters("abc", LETTERS[::-1]) != letters("abc")


def test_codecs_that_show_no_tokenizer_are_taken_to_differ(bench: MakeBench) -> None:
    made = bench()
    known: Any = made.policy.codec(str(made.folder / "policy"))
    hidden: Any = SimpleNamespace(eos=known.eos)
    assert same_vocabulary(known, known)
    assert not same_vocabulary(known, hidden) and not same_vocabulary(hidden, known)
    assert not same_vocabulary(known, SimpleNamespace(eos=5, tokenizer=known.tokenizer))


def test_template_same_is_refused_for_another_tokenizer(bench: MakeBench) -> None:
    with pytest.raises(RequestError, match=r"another tokenizer than the policy\n.*--reward.model.template own"):
        bench(letters=LETTERS[::-1], config=ModelConfig(template="same")).reward()


def test_labelled_reward_asks_its_own_role(bench: MakeBench) -> None:
    made = bench(label="helpful")
    score = Watching(made)
    made.reward().judge(made.rollouts(["abc"], [0], ["d"], ["stop"]), score)  # type: ignore[arg-type]
    assert [role for _, role in score.asked] == ["helpful"]


def test_longer_than_it_reads_is_failed_and_the_rest_keep_their_place(bench: MakeBench) -> None:
    made = bench()
    given = made.rollouts(["a" * 20, "b"], [0, 0, 1], ["c" * 3, "c" * 4, "d"], ["stop"] * 3)  # 24, 25 and 3 tokens
    score = Watching(made)
    found = made.reward().judge(given, score)  # type: ignore[arg-type]
    assert found[1] == Failed("25 tokens; the reward model reads at most 24")
    assert found[0] == pytest.approx(score.direct(letters("a" * 20 + "ccc!")), abs=SAME)
    assert found[2] == pytest.approx(score.direct(letters("bd!")), abs=SAME)


def test_text_that_its_own_encoding_makes_too_long_is_failed(bench: MakeBench) -> None:
    made = bench(template=OTHER_TEMPLATE)
    chat = ({"role": "user", "content": "b" * 15},)  # u?b...!a? is 20 tokens, u?b...!a?? 21
    given, score = made.rollouts([chat], [0], ["cdc"], ["stop"]), Watching(made)
    (found,) = made.reward().judge(given, score)  # type: ignore[arg-type]
    assert isinstance(found, Failed) and "24 tokens" in found.why
    assert [len(of) for of, _ in score.asked] == [0]  # other ranks may have some that can be read


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM has no scalar head"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, "3 labels"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}, None),
        (None, None),  # on the hub and not here yet
    ],
)
def test_planning_reads_config_json(tmp_path: Path, config: dict[str, Any] | None, says: str | None) -> None:
    entry = next(entry for entry in rlhf_rewards() if entry.name == "model")
    component = Component(entry, ModelConfig(), "helpful")
    role = RolePlan(Role("helpful", head="scalar"), ModelFacts(str(tmp_path), config), (), "helpful")
    found = [str(p) for p in scores_one_number(_PlanOf(role), component)]  # type: ignore[arg-type]
    assert (found == []) if says is None else (says in found[0] and "--model helpful=" in found[0])


def test_planning_leaves_adapters_alone(tmp_path: Path) -> None:
    """Of an adapter's folder the facts are the base's; its head comes with the adapter."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    entry = next(entry for entry in rlhf_rewards() if entry.name == "model")
    known = ModelFacts(str(tmp_path), {"architectures": ["LlamaForCausalLM"]})
    role = RolePlan(Role("reward", head="scalar"), known, (), "reward")
    assert list(scores_one_number(_PlanOf(role), Component(entry, ModelConfig()))) == []  # type: ignore[arg-type]


@attrs.frozen
class _PlanOf:
    """A plan of which only one role is asked."""

    one: RolePlan

    def role(self, name: str) -> RolePlan:
        assert name == self.one.name
        return self.one
