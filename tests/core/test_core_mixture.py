"""Completions learnt beside what is sampled: the loss and its gradient, the order of rows, ranks, resumes, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from at_work import Run, plan_of
from fake_ranks import in_two_ranks
from rlhf.data import Refusals, Rows
from rlhf.errors import RequestError, RunError
from rlhf.experience import Batch, Experience, Totals
from rlhf.floor import Peaks
from rlhf.loop import Parts
from rlhf.mixture import Mixture, completion_example
from rlhf.parts import check_data
from rlhf.plan import plan_from_json
from rlhf.planning.duration import duration
from rlhf.planning.memory import Lengths
from rlhf.planning.phases import predict
from rlhf.planning.text import describe
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rows import CompletionRow
from rlhf.scores import ScoreRequest, Scores
from rlhf.sequences import Example, Sequences
from rlhf.suggest import command
from rlhf.world import ALONE, World

SUMS = [{"prompt": f"Question: What is {i} + 1?\nAnswer:", "completion": f" {i + 1}"} for i in range(1, 8)]


@pytest.fixture
def sums(tmp_path: Path) -> str:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return str(path)


def mixing(data: str, coef: float = 0.5, **more: Any) -> Any:
    given = {"batch_size": 4, "ptx_data": data, "ptx_coef": coef, "ptx_batch_size": 3, **more}
    return plan_of(**{"algo": {"name": "grpo", "group_size": 4, "minibatches": 2}, **given})


def gradients(folder: Path, plan: Any) -> tuple[Run, dict[str, Tensor]]:
    """A run of one step, and the gradients of its only update."""
    found: dict[str, Tensor] = {}

    def change(parts: Parts) -> None:
        update = parts.backend.update

        def noting(factor: float) -> Any:
            found.update({n: p.grad.clone() for n, p in parts.models.trained.named_parameters() if p.grad is not None})
            return update(factor)

        parts.backend.update = noting  # type: ignore[method-assign]

    run = Run(folder, plan, change)
    run.go()
    return run, found


def test_its_gradient_is_added(tmp_path: Path, sums: str) -> None:
    once = {"algo": {"name": "grpo", "group_size": 4, "minibatches": 1}, "max_steps": 1}
    _, without = gradients(tmp_path / "without", plan_of(**once, batch_size=4))
    run, beside = gradients(tmp_path / "beside", mixing(sums, 2.0, **once))
    fresh = Run(tmp_path / "fresh", mixing(sums, 2.0, **once)).parts
    assert fresh.mixture is not None
    rows = fresh.mixture.minibatch(fresh.score, ALONE).sequences
    (scores,) = fresh.models.forward([ScoreRequest("policy", rows)])
    loss = -scores.logp.mean()  # a mean over the rows' tokens
    names = [name for name, _ in fresh.models.trained.named_parameters() if name in beside]
    parameters = dict(fresh.models.trained.named_parameters())
    expected = torch.autograd.grad(loss, [parameters[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        # float32 sums of two gradients of the order of 1, in another order
        assert torch.allclose(beside[name] - without[name], 2.0 * gradient, rtol=1e-4, atol=1e-6), name
    (line,) = run.metrics()
    assert line["ptx/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)  # float32
    assert line["loss"] == pytest.approx(line["policy/loss"] + 2.0 * line["ptx/loss"], rel=1e-6)


def test_while_a_critic_warms_up_the_policy_learns_nothing_beside(tmp_path: Path, sums: str) -> None:
    algo = {"name": "ppo", "epochs": 1, "minibatches": 1, "critic_warmup": 2}
    run = Run(tmp_path / "run", mixing(sums, 2.0, algo=algo, max_steps=3))
    moved: list[float] = []
    body = run.parts.models.body("policy")
    weights = [parameter.detach().clone() for parameter in body.parameters()]
    update = run.parts.backend.update

    def noting(factor: float) -> Any:
        done = update(factor)
        moved.append(max(float((a - b).detach().abs().max()) for a, b in zip(body.parameters(), weights, strict=True)))
        return done

    run.parts.backend.update = noting  # type: ignore[method-assign]
    run.go()
    assert moved[:2] == [0.0, 0.0] and moved[2] > 0
    assert ["ptx/loss" in line for line in run.metrics()] == [False, False, True]


def test_how_it_is_cut_changes_nothing(tmp_path: Path, sums: str) -> None:
    optim = {"name": "adamw", "eps": 1e-3}  # or rounding is a step of the whole learning rate where a gradient is 0
    fine, coarse = (
        Run(tmp_path / str(budget), mixing(sums, optim=optim, micro_batch_tokens=budget)) for budget in (1, 1_000_000)
    )
    fine.go(), coarse.go()
    for a, b in zip(fine.metrics(), coarse.metrics(), strict=True):
        # float32 sums in another order: 2^-24 x some dozen roundings, in numbers of the order of 1
        assert a == pytest.approx(b, rel=2e-6, abs=2e-6)


def test_a_run_that_goes_on_takes_the_rows_that_it_would_have(tmp_path: Path, sums: str) -> None:
    plan = mixing(sums, max_steps=4, save_every=1, keep=9)
    whole = Run(tmp_path / "whole", plan)
    whole.go()

    def broken(parts: Parts) -> None:
        loss = parts.algorithm.loss
        nan = lambda batch, score: loss(batch, score) * (math.nan if parts.algorithm.step == 2 else 1.0)  # noqa: E731
        parts.algorithm.loss = nan  # type: ignore[method-assign]

    with pytest.raises(RunError, match="the loss is nan in step 3"):
        Run(tmp_path / "run", plan, broken).go()
    resumed = Run(tmp_path / "run", plan)
    resumed.go(resume=True)
    assert resumed.metrics() == whole.metrics()
    assert all(torch.equal(resumed.weights()[name], tensor) for name, tensor in whole.weights().items())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, sums: str) -> None:
    def broken(parts: Parts) -> None:
        assert parts.mixture is not None
        parts.mixture.coef = math.nan

    run = Run(tmp_path / "run", mixing(sums), broken)
    before = run.weights()
    with pytest.raises(RunError, match="the loss on --ptx-data is nan in step 1; nothing of it was applied"):
        run.go()
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in before.items())


# By itself


def of_lengths(*lengths: int, batch_size: int = 2, coef: float = 1.0) -> Mixture:
    examples = [[Example(torch.tensor([9]), torch.full((n,), n))] for n in lengths]
    rows: Rows[list[Example]] = Rows([(f"f:{i}", row) for i, row in enumerate(examples)], Refusals(), ("f",))
    return Mixture(rows, coef, batch_size, seed=0)


def taken(mixture: Mixture, world: World = ALONE) -> list[int]:
    found = mixture.minibatch(cast(Any, None), world)
    return [len(response) for response in found.sequences.responses()]


def test_every_pass_takes_each_row_once_in_an_order_of_its_own() -> None:
    mixture = of_lengths(1, 2, 3, 4, 5, batch_size=5)
    first, second = taken(mixture), taken(mixture)
    assert sorted(first) == sorted(second) == [1, 2, 3, 4, 5]
    assert first != second
    again = of_lengths(1, 2, 3, 4, 5, batch_size=5)
    again.load_state({"updates": 1})
    assert taken(again) == second and again.state() == mixture.state() == {"updates": 2}


def test_two_ranks_take_what_one_does() -> None:
    alone = of_lengths(1, 2, 3, 4, 5, batch_size=3)
    expected = [sorted(taken(alone)) for _ in range(4)]

    def work(rank: int, world: World) -> list[list[int]]:
        mixture = of_lengths(1, 2, 3, 4, 5, batch_size=3)
        return [taken(mixture, world) for _ in range(4)]

    first, second = in_two_ranks(work)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == expected
    assert all(len(a) and len(b) for a, b in zip(first, second, strict=True))


def test_its_loss_is_a_mean_over_tokens_times_its_weight() -> None:
    """Log-probs -1, -2 and -6 of a row of two tokens and one of one; 5 tokens in the step: 2 x 9 / 5."""
    sequences = Sequences.of([torch.tensor([9])] * 2, [torch.tensor([1, 2]), torch.tensor([3])])
    mixture = of_lengths(1, coef=2.0)
    logp = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)

    class Score:
        def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
            assert role == "policy"
            return Scores(role, logp_=logp)

    batch = Batch(Experience(sequences), Totals(tokens=5, sequences=3, groups=3))
    loss = mixture.loss(batch, cast(Any, Score()))
    assert float(loss.detach()) == pytest.approx(3.6, rel=1e-6)  # float32
    assert float(batch.logged["ptx/loss"]) == pytest.approx(1.8, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad.tolist() == pytest.approx([-0.4] * 3, rel=1e-6)


class Letters:
    """A codec of characters; of a chat the assistant's turns are learnt."""

    eos = 0

    def prompt(self, prompt: Any) -> Tensor:
        return torch.tensor([ord(c) for c in prompt])

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        return torch.tensor([*(ord(c) for c in text), self.eos])

    def chat(self, messages: Any) -> tuple[Tensor, Tensor]:
        tokens = [ord(c) for message in messages for c in message["content"]]
        spoken = [message["role"] == "assistant" for message in messages for _ in message["content"]]
        return torch.tensor(tokens), torch.tensor(spoken)


def test_a_rows_sequence_is_its_completion_or_what_the_assistant_says() -> None:
    plain = completion_example(CompletionRow("ab", "c"), cast(Any, Letters()))
    assert (plain.prompt.tolist(), plain.response.tolist(), plain.mask) == ([97, 98], [99, 0], None)
    turns = [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    chat = completion_example(CompletionRow("ab", "e", cast(Any, messages)), cast(Any, Letters()))
    assert (chat.prompt.tolist(), chat.response.tolist()) == ([97, 98], [99, 100, 101])
    assert chat.mask is not None and chat.mask.tolist() == [True, False, True]


# What is asked for


def refused(make: Callable[[], Any]) -> str:
    with pytest.raises(RequestError) as caught:
        make()
    return str(caught.value)


def test_data_without_weight_weight_without_data_and_both_without_samples_are_refused(sums: str) -> None:
    assert "nothing of it would be learnt" in refused(lambda: plan_of(algo="grpo", ptx_data=sums))
    assert "is the weight of nothing" in refused(lambda: plan_of(algo="grpo", ptx_coef=0.5))
    assert "dpo samples nothing" in refused(lambda: plan_of(algo="dpo", ptx_data=sums, ptx_coef=0.5))
    assert "--ptx-data nowhere.jsonl: there is no such file" in refused(lambda: mixing("nowhere.jsonl"))


def test_rows_that_dont_fit_are_counted_and_none_at_all_is_refused(tmp_path: Path, sums: str) -> None:
    with Path(sums).open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    run = Run(tmp_path / "run", mixing(sums))
    assert any(said.startswith("ptx data: 7 rows taken, 1 refused") for said in run.said)
    Path(sums).write_text('{"prompt": "no completion"}\n')
    assert f"--ptx-data {sums}: none of its 1 rows can be used by the ptx term" in refused(
        lambda: Run(tmp_path / "other", mixing(sums))
    )


def test_a_run_goes_on_with_the_rows_that_it_began_with(tmp_path: Path, sums: str) -> None:
    begun = Run(tmp_path / "run", mixing(sums, max_steps=1))
    state = {"digest": begun.parts.digest}
    check_data(begun.parts, state)
    Path(sums).write_text(json.dumps(SUMS[0]) + "\n")
    other = Run(tmp_path / "other", mixing(sums))
    assert "--data or --ptx-data holds other rows" in refused(lambda: check_data(other.parts, state))


def test_what_rewards_see_of_a_row_is_data_too(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Question: What is 1 + 1?\nAnswer:", "answer": "2", "why": None}]
    found = []
    for change in ({}, {"answer": "3"}, {"why": ["sums"]}, {}):
        path.write_text(json.dumps({**rows[0], **change}) + "\n")
        plan = plan_of(algo={"name": "grpo", "group_size": 4}, batch_size=1, data=str(path), reward="answer")
        found.append(Run(tmp_path / str(len(found)), plan).parts.digest)
    assert found[0] == found[3] and len(set(found)) == 3


def test_a_plan_and_its_recipe_say_all_of_it(sums: str) -> None:
    plan = mixing(sums)
    again = plan_from_json(json.loads(json.dumps(plan.to_json())), loaded())
    assert [source.path for source in again.ptx_data] == [sums] and again.run.ptx_coef == 0.5
    recipe = from_mapping(plan.to_recipe(), "again")
    assert recipe.ptx_data == (sums,) and recipe.run["ptx_batch_size"] == 3
    older = {key: value for key, value in plan.to_json().items() if key != "ptx_data"}  # written before there were any
    assert plan_from_json(json.loads(json.dumps(older)), loaded()).ptx_data == ()


def test_a_plan_counts_it(sums: str) -> None:
    """32 rows fill a micro-batch of 32 x 520 tokens, where 4 groups of 2 have 8 sequences: the update keeps more, and
    takes longer by what 16640 tokens are against 2112."""
    few = {"algo": {"name": "grpo", "group_size": 2, "minibatches": 1}, "batch_size": 4, "micro_batch_tokens": 32 * 520}
    lengths = Lengths(prompt=512, response=8)

    def kept(plan: Any) -> float:
        return next(p for p in predict(plan, lengths).phases if p.phase == "update").device["activations"]

    plain, beside = plan_of(**few), plan_of(**few, ptx_data=sums, ptx_coef=1.0, ptx_batch_size=32)
    assert kept(beside) > 2 * kept(plain)
    assert kept(plan_of(**few, ptx_data=sums, ptx_coef=1.0, ptx_batch_size=4)) == kept(plain)
    peaks = Peaks({"float32": 1e11, "bfloat16": 1e11}, 1e10)
    seconds = [
        found.phases["update"] for plan in (plain, beside) if (found := duration(plan, lengths, peaks, "by hand"))
    ]
    # 32 prompts of their own, where 8 sequences share 4; what their heads compute besides is little
    assert seconds[1] - seconds[0] == pytest.approx(8 * seconds[0], rel=0.05)
    assert f"ptx data   {sums} (jsonl): weight 1, 32 rows an optimiser step" in describe(beside)
    given = from_mapping({"algo": "grpo", "ptx_data": sums, "ptx_coef": 1.0}, "test")
    assert f"--ptx-data {sums} --ptx-coef 1.0" in command(given)
