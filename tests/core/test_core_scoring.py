"""The forward that algorithms are handed: micro-batches, old log-probs, and what isn't computed twice."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch

from built import parts_of, rollouts_of, some
from rlhf.errors import RunError
from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Context, Engine, LogProbs
from rlhf.loop import Loop
from rlhf.parts import Parts
from rlhf.plan import Plan
from rlhf.rundir import RunDirectory
from rlhf.scoring import Ahead, Scorer
from rlhf.world import World


@pytest.fixture(scope="module")
def shared() -> Parts:
    return parts_of(algo={"name": "ppo", "value_model": "shared"})


@pytest.fixture(scope="module")
def separate() -> Parts:
    return parts_of(algo="ppo")


@pytest.mark.parametrize("budget", [1, 17, 40, 10_000])
def test_scores_do_not_depend_on_how_rows_are_cut(separate: Parts, budget: int) -> None:
    sequences = some(9)
    whole, cut = (Scorer(separate.models, b).together(sequences, "policy", "value") for b in (10_000, budget))
    # float32 sums of other shapes differ in their last bits: ulp is 2e-6 for these log-probs of random tokens, about
    # -25, and a few dozen of them add up; rows mixed up would differ by whole nats
    assert torch.allclose(whole[0].logp, cut[0].logp, atol=1e-4, rtol=0)
    assert torch.allclose(whole[1].score, cut[1].score, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("said", "told", "taken", "weighed"),
    [
        (LogProbs(exact=True), True, True, False),
        (LogProbs(exact=False), True, False, True),
        (LogProbs(exact=True), False, False, False),
        (LogProbs(exact=True, after_temperature=False), True, False, False),  # sampled at temperature .5
        (LogProbs(exact=True, available=False), True, False, False),
    ],
)
def test_the_engines_log_probs_stand_only_where_they_are_exact(
    separate: Parts, said: LogProbs, told: bool, taken: bool, weighed: bool
) -> None:
    class Says(Engine):
        logprobs = said

    engine = Says(None, Context(plan=cast(Plan, None)))
    sequences = some()
    claimed = torch.full((len(sequences.tokens),), -7.0)
    rollouts = rollouts_of(sequences, claimed if told else None, temperature=0.5)
    scorer = Scorer(separate.models, 10_000, engine)
    found = scorer.logp_old(rollouts)
    own = Scorer(separate.models, 10_000)(rollouts, "policy").logp
    assert torch.equal(found, claimed if taken else own)
    experience = Experience(rollouts)
    scorer.off_policy.attach(experience)
    assert ("importance" in experience) == weighed
    if weighed:
        assert torch.equal(experience.importance, torch.exp((own + 7.0).double()).clamp(max=2.0).float())


def test_log_probs_from_before_the_temperature_are_of_use_at_one(separate: Parts) -> None:
    class Says(Engine):
        logprobs = LogProbs(exact=True, after_temperature=False)

    claimed = torch.full((len(some().tokens),), -7.0)
    scorer = Scorer(separate.models, 10_000, Says(None, Context(plan=cast(Plan, None))))
    assert torch.equal(scorer.logp_old(rollouts_of(some(), claimed)), claimed)


def test_truncated_samples_have_no_old_log_probs(separate: Parts) -> None:
    class Says(Engine):
        logprobs = LogProbs(truncated=True)

    scorer = Scorer(separate.models, 10_000, Says(None, Context(plan=cast(Plan, None))))
    with pytest.raises(RunError, match="a part of the policy's distribution"):
        scorer.logp_old(rollouts_of(some(), torch.full((len(some().tokens),), -7.0)))


def test_old_log_probs_are_computed_once_and_what_was_asked_for_anyway_is_compared(
    separate: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Says(Engine):
        logprobs = LogProbs(exact=False)

    forwards: list[int] = []
    forward = separate.backend.forward
    monkeypatch.setattr(separate.backend, "forward", lambda asked: (forwards.append(1), forward(asked))[1])
    rollouts = rollouts_of(some(), torch.full((len(some().tokens),), -7.0))
    scorer = Scorer(separate.models, 10_000, Says(None, Context(plan=cast(Plan, None))))
    first = scorer.logp_old(rollouts)
    assert scorer.logp_old(rollouts) is first and len(forwards) == 1
    expected = float((first.double() + 7.0).abs().mean())
    other = Scorer(separate.models, 10_000, Says(None, Context(plan=cast(Plan, None))))
    for one, weighed in ((scorer, True), (other, False)):
        one(rollouts, "policy")  # an algorithm that asks for it has paid for the comparison
        metrics = one.off_policy.metrics(World())
        assert metrics["engine/logp_difference"] == pytest.approx(expected, rel=1e-12)
        assert ("importance/mean" in metrics) == weighed


def test_log_probs_are_of_the_temperature_that_sampled(separate: Parts) -> None:
    sequences = some()
    scorer = Scorer(separate.models, 10_000)
    at_half = scorer(rollouts_of(sequences, None, 0.5), "policy").logp
    assert not torch.allclose(at_half, scorer(sequences, "policy").logp, atol=0.1)
    experience = Experience(rollouts_of(sequences, None, 0.5))
    batch = Batch(experience, Totals(1, 1, 1))
    for of in (experience, batch, experience.select(torch.arange(5))):
        assert torch.equal(scorer(of, "policy").logp, at_half)


# The first pass is the first loss's forward


def first_pass(parts: Parts, *roles: str) -> tuple[Scorer, Scorer, Ahead]:
    """(without gradient, with gradient, what the one leaves for the other)."""
    plain, gradient, ahead = Scorer(parts.models, 10_000), Scorer(parts.models, 10_000, gradient=True), Ahead()
    plain.ahead = gradient.ahead = ahead
    return plain, gradient, ahead


def test_what_was_scored_for_the_experience_is_the_first_losss_forward(
    separate: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, forwards = some(), []
    forward = separate.backend.forward
    monkeypatch.setattr(
        separate.backend, "forward", lambda asked: (forwards.append([r.role for r in asked]), forward(asked))[1]
    )
    plain, gradient, _ = first_pass(separate)
    with torch.no_grad():
        old = plain(sequences, "value").values
    assert not old.requires_grad
    policy, value = gradient.together(sequences, "policy", "value")
    assert forwards == [["value"], ["policy"]]
    assert torch.equal(value.values.detach(), old) and value.values.requires_grad and policy.logp.requires_grad
    again = gradient(sequences, "value").values  # a backward frees the graph: it is given once
    assert forwards[2:] == [["value"]] and torch.equal(again.detach(), old)
    ours = torch.autograd.grad(value.values.sum(), list(separate.models.body("value").parameters()), allow_unused=True)
    plainly = torch.autograd.grad(again.sum(), list(separate.models.body("value").parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in ours)
    for mine, theirs in zip(ours, plainly, strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


def test_what_is_kept_is_for_the_very_same_question(separate: Parts) -> None:
    """Other sequences, an entropy that wasn't computed, or several micro-batches: then it is computed."""
    sequences = some()
    plain, gradient, ahead = first_pass(separate)
    with torch.no_grad():
        plain(sequences, "policy")
        assert ahead.take(sequences.select(torch.arange(5)), ["policy"], 1.0, entropy=False) == {}
        assert ahead.take(sequences, ["policy"], 1.0, entropy=False) == {}  # the first loss wanted others: it is freed
        plain(sequences, "policy")
    assert ahead.take(sequences, ["policy"], 1.0, entropy=True) == {}
    assert gradient(sequences, "policy", entropy=True).entropy.requires_grad
    narrow = Scorer(separate.models, 10)
    narrow.ahead = ahead
    with torch.no_grad():
        narrow(sequences, "policy")  # in pieces
        assert ahead.take(sequences, ["policy"], 1.0, entropy=False) == {}
        plain(sequences, "reference")  # isn't trained
        assert ahead.take(sequences, ["reference"], 1.0, entropy=False) == {}
        plain(sequences, "policy")
    ahead.clear()
    assert ahead.take(sequences, ["policy"], 1.0, entropy=False) == {}


def test_log_probs_at_another_temperature_are_another_question(separate: Parts) -> None:
    sequences = some()
    plain, gradient, _ = first_pass(separate)
    for asked, wanted in (
        (sequences, rollouts_of(sequences, None, 0.5)),
        (rollouts_of(sequences, None, 0.5), sequences),
    ):
        with torch.no_grad():
            plain(asked, "policy")
            expected = Scorer(separate.models, 10_000)(wanted, "policy").logp
        assert torch.equal(gradient(wanted, "policy").logp.detach(), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_random_in_a_loss_is_in_no_score_before_it(dropout: float) -> None:
    parts = parts_of(algo="ppo", mem=["fp32", {"name": "lora", "dropout": dropout}])
    with torch.no_grad():
        for weight in parts.models.trained.parameters():
            if weight.requires_grad:
                weight.fill_(0.1)  # adapters and a head that start at 0 would hide it
    sequences = some()
    plain, gradient, ahead = first_pass(parts)
    with torch.no_grad():
        before, alone = plain(sequences, "value").values, Scorer(parts.models, 10_000)(sequences, "value").values
    assert torch.equal(before, alone)
    assert bool(ahead.take(sequences, ["value"], 1.0, entropy=False)) == (dropout == 0)
    assert torch.equal(gradient(sequences, "value").values.detach(), alone) == (dropout == 0)


def test_roles_on_one_trunk_are_left_to_the_loss(shared: Parts) -> None:
    """Asked for one by one they would take a backward of the trunk each, where the loss takes one for both."""
    sequences = some()
    plain, _, ahead = first_pass(shared)
    with torch.no_grad():
        plain(sequences, "value")
    assert ahead.take(sequences, ["value"], 1.0, entropy=False) == {}


@pytest.mark.parametrize(("mem", "saved"), [("fp32", 1), ("bf16,lora", 2), ("bf16,lora,checkpointing", 2)])
def test_a_run_computes_the_same_with_one_forward_less(
    mem: str, saved: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Two steps of PPO, two epochs of one minibatch: to the bit, but for one forward a step of the values, and, where
    the engine's log-probs aren't exact, of the policy. Under adapters the reference is scored, with the policy's off,
    between that forward and its backward."""
    found = []
    for name in ("ahead", "plain"):
        parts = parts_of(algo={"name": "ppo", "epochs": 2, "minibatches": 1}, max_steps=2, track="none", mem=mem)
        forwards: list[int] = []
        forward = parts.backend.forward
        monkeypatch.setattr(
            parts.backend, "forward", lambda asked, f=forward, n=forwards: (n.append(len(asked)), f(asked))[1]
        )
        if name == "plain":
            monkeypatch.setattr("rlhf.loop.Ahead", lambda: None)
        directory = RunDirectory(tmp_path / name)
        directory.open(parts.plan)
        Loop(parts, directory, print).run(None)
        directory.close()
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in m.items() if not k.startswith(("time/", "perf/", "memory/"))} for m in metrics]
        found.append((kept, sum(forwards)))
    (ours, fewer), (plain, more) = found
    assert ours == plain and len(ours) == 2
    assert more - fewer == 2 * saved
