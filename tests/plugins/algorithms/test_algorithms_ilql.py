"""Implicit language Q-learning: the loss by hand, what a row becomes, target heads, the model that is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from worked import Words, close, double

from at_work import Run, plan_of
from built import parts_of, some
from rlhf.errors import RequestError
from rlhf.experience import Experience
from rlhf.interfaces import Context
from rlhf.rows import RewardedRow
from rlhf.scoring import Scorer
from rlhf_plugins.algorithms.ilql import ILQL
from rlhf_plugins.algorithms.offline_rl import ILQLConfig

Make = Callable[..., Any]


def test_the_loss_of_two_worked_tokens(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """One response, reward 1 at its second token, gamma .5, tau .8. V = .2, .4; target Qs .5, .9 and .6, .3, whose
    min is .5, .3. So y = .5 x .4 = .2 and 1; Q1 = .3, .8 and Q2 = .2, .5 are off by .1, -.2 and 0, -.5."""
    config = ILQLConfig(gamma=0.5, tau=0.8, cql_coef=0.1, awac_coef=2.0, awac_beta=1.0)
    q1, value, logp = double([0.3, 0.8], True), double([0.2, 0.4], True), double([-1.0, -2.0], True)
    score = hand(
        policy={"logp": logp},
        value={"values": value},
        q1={"values": q1, "logp": double([-0.5, -1.5])},
        q2={"values": double([0.2, 0.5]), "logp": double([-1.0, -2.0])},
        target_q1={"values": double([0.5, 0.9])},
        target_q2={"values": double([0.6, 0.3])},
    )
    given = batch(Experience(rollouts([2], [0.0]), {"reward": double([0.0, 1.0])}))
    loss = ILQL(config, context).loss(given, score)
    of_q = (0.01 + 0.04 + 0.0 + 0.25) / 2
    of_v = (0.8 * 0.09 + 0.2 * 0.01) / 2  # ahead by .3, behind by .1
    cql = (0.5 + 1.5 + 1.0 + 2.0) / 2
    awac = (math.exp(0.3) * 1.0 + math.exp(-0.1) * 2.0) / 2
    assert float(loss.detach()) == pytest.approx(of_q + of_v + 0.1 * cql + 2.0 * awac, rel=1e-12)
    assert {name: float(part) for name, part in given.logged.items()} == pytest.approx(
        {"q/loss": of_q, "q/cql": cql, "q/mean": 0.4, "value/loss": of_v, "value/mean": 0.3, "policy/loss": awac},
        rel=1e-6,
    )
    loss.backward()
    assert q1.grad is not None and value.grad is not None and logp.grad is not None
    close(q1.grad, [0.1, -0.2])
    close(value.grad, [-0.8 * 0.3, 0.2 * 0.1])  # of its own loss alone: Q's goal and the weights are data
    close(logp.grad, [-math.exp(0.3), -math.exp(-0.1)])


def test_the_reward_is_at_the_last_token(context: Context) -> None:
    (found,) = ILQL(ILQLConfig(), context).examples(RewardedRow("why", "good", -0.5), Words())  # type: ignore[arg-type]
    assert (found.prompt.tolist(), found.response.tolist()) == ([3], [4, 0])
    assert found.token_fields["reward"].tolist() == [0.0, -0.5]


def test_q_values_are_of_the_tokens_that_were_said() -> None:
    parts, sequences = parts_of(algo="ilql"), some()
    score = Scorer(parts.models, 10_000, gradient=True)
    q1, t1, value = score.together(sequences, "q1", "target_q1", "value")
    module: Any = parts.models.body("policy")
    head = parts.models.trained.heads["q1"]
    numbers = []
    for i, response in enumerate(sequences.responses()):
        prompt = sequences.prompt(i)
        states = module.base_model(input_ids=torch.cat([prompt, response])[None]).last_hidden_state[0]
        numbers.append(head(states[len(prompt) - 1 : -1]))
    table = torch.cat(numbers).detach()
    said, logs = (x[torch.arange(len(table)), sequences.tokens] for x in (table, torch.log_softmax(table, -1)))
    # float32 sums of 128 products of numbers about 1
    torch.testing.assert_close(q1.values.detach(), said, rtol=0, atol=1e-4)
    torch.testing.assert_close(q1.logp.detach(), logs, rtol=0, atol=1e-4)
    assert torch.equal(t1.values.detach(), q1.values.detach())  # a target begins as what it follows
    assert not value.values.any() and not torch.equal(q1.values, score(sequences, "q2").values)


def heads(run: Run) -> dict[str, torch.Tensor]:
    return {name: head.weight.detach().clone() for name, head in run.parts.models.trained.heads.items()}  # type: ignore


def test_targets_follow_and_go_on_where_they_were(tmp_path: Path) -> None:
    """Of a run that stops after 2 of 4 steps, and goes on, the targets too are those of one that doesn't stop."""
    recipe: dict[str, Any] = {"algo": {"name": "ilql", "polyak": 0.25}, "batch_size": 8}
    run = Run(tmp_path / "one", plan_of(**recipe, max_steps=1))
    before = heads(run)
    run.go()
    after = heads(run)
    assert not torch.equal(after["q1"], before["q1"])
    expected = 0.75 * before["q1"] + 0.25 * after["q1"]
    torch.testing.assert_close(after["target_q1"], expected, rtol=0, atol=1e-6)  # float32 numbers of .1

    whole = Run(tmp_path / "whole", plan_of(**recipe, max_steps=4))
    whole.go()
    Run(tmp_path / "parts", plan_of(**recipe, max_steps=2)).go()
    parts = Run(tmp_path / "parts", plan_of(**recipe, max_steps=4))
    parts.go(resume=True)
    for name, weight in heads(whole).items():
        assert torch.equal(weight, heads(parts)[name]), name


def test_the_saved_model_is_shifted(tmp_path: Path) -> None:
    """Its logits are the policy's plus twice the mean of the target heads; the policy itself stays as it is."""
    parts = parts_of(algo={"name": "ilql", "shift": 2.0})
    parts.models.save(tmp_path)
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    module: Any = parts.models.body("policy")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        states = module.base_model(input_ids=ids).last_hidden_state
        q = [parts.models.trained.heads[f"target_{name}"](states) for name in ("q1", "q2")]
        expected = module(input_ids=ids).logits + q[0] + q[1]
        # float32 sums of 128 products of numbers about 1, in another order
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
        assert (q[0] + q[1]).abs().max() > 0.1
    assert module.config.tie_word_embeddings and not saved.config.tie_word_embeddings
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert torch.equal(saved.get_input_embeddings().weight, module.get_input_embeddings().weight)


def test_without_a_shift_the_policy_is_saved_as_it_is(tmp_path: Path) -> None:
    parts = parts_of(algo={"name": "ilql", "shift": 0.0})
    parts.models.save(tmp_path)
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    module: Any = parts.models.body("policy")
    assert torch.equal(saved.lm_head.weight, module.lm_head.weight)


def test_adapters_are_refused() -> None:
    with pytest.raises(RequestError, match="excludes 'adapters'"):
        plan_of(algo="ilql", mem="lora")
