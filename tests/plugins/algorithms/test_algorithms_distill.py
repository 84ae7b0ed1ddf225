"""Distillation: the loss by hand, whole distributions through a run's models, teachers that can't be had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from worked import Words, close, double

from at_work import Run, plan_of
from built import parts_of, some
from rlhf.errors import RequestError, RunError
from rlhf.experience import Experience
from rlhf.interfaces import Context
from rlhf.parts import Parts
from rlhf.plan import resource
from rlhf.rows import CompletionRow
from rlhf.scoring import Scorer
from rlhf.sequences import Sequences
from rlhf_plugins.algorithms.distill import Distill
from rlhf_plugins.algorithms.distillation import DistillConfig, OfflineDistillConfig
from rlhf_plugins.functional.divergence import divergence

Make = Callable[..., Any]


class _Checked(Distill):
    """Whose teacher is taken to fit."""

    def __init__(self, config: DistillConfig, context: Context) -> None:
        self.config, self.context = config, context


def test_the_loss_is_the_mean_over_own_tokens(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = _Checked(DistillConfig(divergence="js", beta=0.25, temperature=2.0), context)
    given = batch(Experience(rollouts([3, 1], [0.0, 0.0], masks=[torch.tensor([True, False, True]), None])))
    found = double([0.5, 9.0, 0.25, 0.75], gradient=True)
    score = hand(policy={"divergence": found})
    loss = algorithm.loss(given, score)
    assert float(loss.detach()) == pytest.approx(0.5, rel=1e-12)  # 1.5 over three tokens
    loss.backward()
    assert found.grad is not None
    close(found.grad, [1 / 3, 0.0, 1 / 3, 1 / 3])
    assert score.asked == [("policy from teacher: {'kind': 'js', 'beta': 0.25, 'temperature': 2.0}", False)]


def test_a_row_is_that_of_fine_tuning(context: Context) -> None:
    (found,) = _Checked(OfflineDistillConfig(), context).examples(CompletionRow("why", "good"), Words())  # type: ignore
    assert (found.prompt.tolist(), found.response.tolist(), found.mask) == ([3], [4, 0], None)
    assert (DistillConfig().divergence, OfflineDistillConfig().divergence) == ("reverse_kl", "forward_kl")


# Through a run's models


@pytest.fixture(scope="module", params=["", "offload"])
def parts(request: pytest.FixtureRequest, another_model: str) -> Parts:
    mem = ["fp32", *filter(None, [request.param])]
    return parts_of(algo="distill", roles={"teacher": {"model": another_model, "mem": mem}}, engine="hf")


def log_probs(parts: Parts, role: str, sequences: Sequences) -> Tensor:
    """[N, V], by a plain forward of each sequence."""
    found = []
    with parts.models.visiting([role]):
        module: Any = parts.models.body(role)
        for i, response in enumerate(sequences.responses()):
            prompt = sequences.prompt(i)
            logits = module(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(found)


def test_the_forward_compares_with_the_teachers_own_logits(parts: Parts) -> None:
    sequences = some()
    expected, slope = divergence(
        log_probs(parts, "policy", sequences).detach(), log_probs(parts, "teacher", sequences).detach(), "js", 0.3
    )
    gradient = Scorer(parts.models, 10_000, gradient=True)
    found = gradient.divergence(sequences, "policy", "teacher", kind="js", beta=0.3)
    # float32 log-probs of random tokens, about -25, whose last bit is 2e-6, through a few dozen sums
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-4)
    assert float(expected.min()) > 0.01 and gradient.asked == {"policy", "teacher"}
    found.sum().backward()
    grads = {name: p.grad for name, p in parts.models.trained.named_parameters()}
    assert all(grad is not None and grad.any() for grad in grads.values())
    head: Any = parts.models.body("policy")
    own = head.get_output_embeddings().weight.grad.clone()
    parts.models.trained.zero_grad()
    (log_probs(parts, "policy", sequences) * slope).sum().backward()  # d log p / dz, and slopes add up to 0
    torch.testing.assert_close(own, head.get_output_embeddings().weight.grad, rtol=1e-3, atol=1e-4)
    parts.models.trained.zero_grad()
    assert all(p.grad is None for p in parts.models.frozen.parameters())


@pytest.mark.parametrize("budget", [1, 17, 40])
def test_without_a_gradient_it_does_not_depend_on_how_rows_are_cut(parts: Parts, budget: int) -> None:
    sequences = some(9)
    whole, cut = (
        Scorer(parts.models, b).divergence(sequences, "policy", "teacher", kind="reverse_kl") for b in (10_000, budget)
    )
    assert torch.allclose(whole, cut, atol=1e-4, rtol=0) and not cut.requires_grad


def test_only_a_frozen_model_of_its_own_can_be_compared_with(parts: Parts) -> None:
    with pytest.raises(RunError, match="'policy' can't be compared with"):
        Scorer(parts.models, 100).divergence(some(), "policy", "policy", kind="js")


# Runs


@pytest.mark.parametrize("name", ["distill", "distill-offline"])
def test_a_run_comes_nearer_however_its_batches_are_cut(tmp_path: Path, another_model: str, name: str) -> None:
    found = []
    data = resource(f"rlhf_plugins.starter:data/{'prompts' if name == 'distill' else 'sft'}_eval.jsonl")
    for budget in (1, 1_000_000):
        plan = plan_of(
            algo=name, data=data, roles={"teacher": {"model": another_model}}, max_steps=6, batch_size=8, eval_rows=8,
            optim={"name": "adamw", "eps": 1e-3, "learning_rate": 1e-3}, micro_batch_tokens=budget,
        )  # fmt: skip
        run = Run(tmp_path / str(budget), plan)
        summary = run.go()
        assert summary["heldout_after"]["loss"] < 0.9 * summary["heldout_before"]["loss"]
        assert not {"reward/mean", "reward/std"} & {*summary["heldout_after"], *run.metrics()[0]}  # nobody judges
        assert plan.objective == ("loss", "min") and summary["best"]["metric"] == "loss"
        found.append([line["loss"] for line in run.metrics()])
    # float32 sums in another order, over six steps that move the loss by far more
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_rewards_judge_what_is_held_out(tmp_path: Path, another_model: str) -> None:
    plan = plan_of(algo="distill", roles={"teacher": {"model": another_model}}, max_steps=1, eval_rows=8,
                   reward={"name": "length"})  # fmt: skip
    summary = Run(tmp_path, plan).go()
    assert plan.objective == ("reward/mean", "max") and "reward/mean" in summary["heldout_after"]


def test_another_tokenizer_is_refused_before_weights_are_loaded(tmp_path: Path, tiny_model: Path) -> None:
    """The teacher's folder holds none."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match="has another tokenizer than the policy"):
        parts_of(algo="distill", roles={"teacher": {"model": str(teacher)}})


def test_there_must_be_a_teacher() -> None:
    with pytest.raises(RequestError, match="--model teacher=PATH"):
        plan_of(algo="distill")


def test_the_plan_counts_what_comparing_takes(another_model: str) -> None:
    """Of a chunk of n positions and V tokens: the teacher's logits, its log-probs and the slope, 4 bytes each."""
    from rlhf.planning.activations import head_bytes
    from rlhf.planning.footprint import ForwardBatch
    from rlhf.planning.memory import modules

    module = modules(plan_of(algo="distill", roles={"teacher": {"model": another_model}})).modules["policy"]
    batch = ForwardBatch(rows=64, prompt=4, response=64, gradient=True)
    plain, compared = (head_bytes(module, attrs.evolve(batch, compared=c), None) for c in (False, True))
    assert compared - plain == 64 * 64 * module.architecture.vocabulary * 12
