"""Importance weights in whole runs, and what an engine says of its log-probs and follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from at_work import metrics_of, weights_of
from built import parts_of
from rlhf import facts, legality
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.errors import RequestError, RunError
from rlhf.experience import token_mean
from rlhf.interfaces import LogProbs
from rlhf.loop import Loop, resume_from
from rlhf.parts import Parts
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rundir import RunDirectory
from rlhf_plugins.engines.hf import HFEngine


def run(folder: Path, change: Callable[[Parts], None] = lambda parts: None, **recipe: Any) -> tuple[Any, Parts, Any]:
    """(metrics by step, parts, what was said)."""
    said: list[str] = []
    parts = parts_of(**{"algo": {"name": "ppo", "epochs": 2, "minibatches": 2}, "max_steps": 2, "track": "none",
                        **recipe})  # fmt: skip
    change(parts)
    directory = RunDirectory(folder)
    directory.open(parts.plan)
    Loop(parts, directory, said.append).run(None)
    directory.close()
    return metrics_of(folder), parts, said


def off_by(nats: float, varying: bool = False) -> Callable[[Parts], None]:
    """A fake engine: says of each token that it was e^nats times as likely as it was; `varying`: of some tokens."""

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        engine, generate = parts.sampler.engine, parts.sampler.engine.generate

        def wrong(requests: Any, temperature: float | None = None) -> Any:
            found = generate(requests, temperature)
            return attrs.evolve(found, logp=found.logp + nats * (found.sequences.tokens % 3 if varying else 1))

        engine.logprobs = LogProbs(exact=False)
        engine.generate = wrong  # type: ignore[method-assign]

    return change


def test_an_exact_engine_has_nothing_to_correct(tmp_path: Path) -> None:
    metrics, parts, said = run(tmp_path / "exact")
    assert not any(key.startswith(("engine/", "importance/")) for line in metrics for key in line)
    without, off, _ = run(tmp_path / "off", importance="off", importance_cap=1.0)
    assert metrics == without and not any("importance" in line for line in said)
    assert all(torch.equal(weights_of(off)[name], p) for name, p in weights_of(parts).items())


def test_an_engine_off_by_rounding_is_weighed_by_about_one(tmp_path: Path) -> None:
    """In fp32 the trainer's log-probs are the engine's up to rounding, and with them the run."""
    exact, _, _ = run(tmp_path / "exact")
    found, other, _ = run(tmp_path / "said to be inexact", off_by(0.0))
    assert all(line["engine/logp_difference_max"] < 1e-4 for line in found)  # ulp is 2e-6 of log-probs about -25
    assert all(line["importance/mean"] == pytest.approx(1.0, abs=1e-4) for line in found)
    uncorrected, off, _ = run(tmp_path / "off", off_by(0.0), importance="off")
    for a, b, c in zip(exact, found, uncorrected, strict=True):
        assert b["policy/loss"] == pytest.approx(a["policy/loss"], abs=1e-4)
        assert {k for k in b if k not in a} - {k for k in c if k not in a} == {
            "importance/mean", "importance/clipped", "importance/ess",
        }  # fmt: skip
    moved = max(float((p - weights_of(other)[name]).abs().max()) for name, p in weights_of(off).items())
    assert 0 <= moved < 1e-5  # steps of 3e-6 or so


def test_what_is_off_is_weighed_back_in_every_minibatch(tmp_path: Path) -> None:
    nats, still = 0.1, {"name": "adamw", "learning_rate": 1e-12}
    found, _, said = run(tmp_path / "off by", off_by(nats), optim=still)
    plain, _, _ = run(tmp_path / "plain", optim=still)
    assert not any("importance" in line for line in said)
    for line, before in zip(found, plain, strict=True):
        # every weight is e^-.1: rounding of float32 log-probs about -25, and of their difference
        close: dict[str, Any] = {"abs": 1e-5}
        assert line["engine/logp_difference"] == pytest.approx(nats, **close)
        assert line["engine/logp_difference_max"] == pytest.approx(nats, **close)
        assert line["engine/kl"] == pytest.approx(math.exp(-nats) - 1 + nats, **close)
        assert line["importance/mean"] == pytest.approx(math.exp(-nats), **close)
        assert line["importance/clipped"] == 0.0 and line["importance/ess"] == pytest.approx(1.0, **close)
        # the weights stand still, so the loss is linear in them; the value's isn't touched
        assert line["policy/loss"] == pytest.approx(math.exp(-nats) * before["policy/loss"], abs=1e-5)
        assert line["value/loss"] == pytest.approx(before["value/loss"], **close)


def test_masked_beyond_the_cap_nothing_is_learnt_by_the_policy(tmp_path: Path) -> None:
    options = {"importance_cap": 1.5, "importance_beyond": "mask", "importance": "sequence"}
    found, _, _ = run(tmp_path, off_by(-1.0), **options)
    for line in found:
        assert line["importance/masked"] == 1.0 and line["importance/mean"] == line["importance/ess"] == 0.0
        assert line["policy/loss"] == 0.0 and line["value/loss"] > 0.0


def test_how_a_batch_is_cut_changes_nothing_of_the_weights(tmp_path: Path) -> None:
    """float32 sums in another order, as in the loop's own test; at eps 1e-3 an update is smooth in its gradient."""
    optim = {"name": "adamw", "eps": 1e-3}
    (fine, _, _), (coarse, _, _) = (
        run(
            tmp_path / str(budget),
            off_by(0.2, varying=True),
            optim=optim,
            micro_batch_tokens=budget,
            importance="sequence",
        )
        for budget in (1, 1_000_000)
    )
    for a, b in zip(fine, coarse, strict=True):
        assert set(a) == set(b) and a["importance/ess"] < 0.999
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key


def test_in_bf16_the_difference_is_seen_and_corrected(tmp_path: Path) -> None:
    found, _, _ = run(tmp_path, mem="bf16")
    for line in found:
        assert 1e-4 < line["engine/logp_difference"] < line["engine/logp_difference_max"] < 1.0
        assert 0.0 < line["engine/kl"] < line["engine/logp_difference"]
        assert 0.9 < line["importance/mean"] < 1.1 and 0.9 < line["importance/ess"] <= 1.0


def test_a_loss_that_takes_no_account_of_them_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_plugins.algorithms.ppo.policy_mean", token_mean)
    _, _, said = run(tmp_path, off_by(0.1))
    assert [line for line in said if "importance" in line] == [
        "note: the loss of ppo takes no account of batch.importance: the engine's samples aren't quite the policy's own"
    ]


def test_a_loss_that_holds_for_any_samples_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_plugins.algorithms.ppo.policy_mean", token_mean)
    monkeypatch.setattr("rlhf_plugins.algorithms.ppo.PPO.off_policy", True)
    _, _, said = run(tmp_path, off_by(0.1))
    assert not any("importance" in line for line in said)


def test_while_only_the_critic_learns_nothing_is_missed(tmp_path: Path) -> None:
    _, _, said = run(tmp_path, off_by(0.1), algo={"name": "ppo", "epochs": 1, "critic_warmup": 9})
    assert not any("importance" in line for line in said)


def test_a_run_that_breaks_and_goes_on_has_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"mem": "bf16", "batch_size": 32, "save_every": 1}
    options |= {"importance_beyond": "mask", "importance_cap": 1.001}
    whole, parts, _ = run(tmp_path / "whole", **options)
    assert all(0.0 < line["importance/masked"] < 0.5 for line in whole)  # or a weight would not have mattered

    def breaks(parts: Parts) -> None:
        loss = parts.algorithm.loss
        broken = lambda batch, score: loss(batch, score) * (math.nan if parts.algorithm.step else 1.0)  # noqa: E731
        parts.algorithm.loss = broken  # type: ignore[method-assign]

    with pytest.raises(RunError, match="the loss is nan in step 2"):
        run(tmp_path / "broken", breaks, **options)
    resumed = parts_of(algo={"name": "ppo", "epochs": 2, "minibatches": 2}, max_steps=2, track="none", **options)
    directory = RunDirectory(tmp_path / "broken")
    directory.open(resumed.plan)
    found = resume_from(directory, print)
    assert found is not None and found[1]["loop"]["step"] == 1
    directory.cut_back(1)
    Loop(resumed, directory, print).run(found[1])
    directory.close()
    assert metrics_of(tmp_path / "broken") == whole
    assert all(torch.equal(weights_of(resumed)[name], p) for name, p in weights_of(parts).items())


# What an engine says, and what follows


@attrs.frozen(kw_only=True)
class FakeOptions:
    """Of a fake engine; all are left out, as by their names."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # some engines' word for all
    min_p: float = 0.0
    max_new_tokens: int = 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"temperature": 0.7}, None),
        ({"temperature": 0.0}, "--engine.temperature 0: ppo needs log-probs of what was sampled, and greedy has none"),
        ({"top_p": 0.9}, "--engine.top-p 0.9: ppo needs log-probs of what was sampled, and truncation"),
        ({"top_k": 5}, "--engine.top-k 5: ppo needs log-probs of what was sampled, and truncation"),
        ({"min_p": 0.05}, "--engine.min-p 0.05: ppo needs log-probs of what was sampled, and truncation"),
    ],
)
def test_what_cannot_be_corrected_is_refused_with_the_plan(options: dict[str, Any], said: str | None) -> None:
    recipe = from_mapping({"algo": "ppo", "max_steps": 1}, "test")
    plan = compose(recipe, loaded(), facts.machine())
    assert plan.engine is not None
    engine = attrs.evolve(plan.engine, config=FakeOptions(**options))
    problems = [str(p) for p in legality.problems_of(attrs.evolve(plan, engine=engine), loaded())]
    assert len(problems) == (said is not None) and all(said in problem for problem in problems if said)
    tolerant = attrs.evolve(plan.algo, entry=attrs.evolve(plan.algo.entry, requires={"rollouts"}))
    assert legality.problems_of(attrs.evolve(plan, engine=engine, algo=tolerant), loaded()) == []


def test_an_installed_engines_truncation_is_refused_with_the_plan() -> None:
    recipe = from_mapping({"algo": "ppo", "max_steps": 1, "engine": {"name": "hf", "top_p": 0.9, "top_k": 4}}, "test")
    with pytest.raises(RequestError) as refused:
        compose(recipe, loaded(), facts.machine())
    assert [str(p).partition(":")[0] for p in refused.value.problems] == ["--engine.top-p 0.9", "--engine.top-k 4"]


@pytest.fixture
def engine_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[LogProbs], None]:
    def say(said: LogProbs) -> None:
        attach = HFEngine.attach

        def attached(self: Any, *arguments: Any) -> None:
            attach(self, *arguments)
            self.logprobs = said

        monkeypatch.setattr(HFEngine, "attach", attached)

    return say


def test_truncated_sampling_is_refused_before_anything_is_written(engine_says: Any) -> None:
    engine_says(LogProbs(truncated=True))
    with pytest.raises(RequestError, match="--engine hf samples from a part of the policy's distribution, and ppo"):
        parts_of(algo="ppo")


@pytest.mark.parametrize(
    ("said", "temperature", "why"),
    [
        (LogProbs(after_temperature=False), 0.7, "are of before temperature 0.7"),
        (LogProbs(available=False), 1.0, "can't be had"),
        (LogProbs(after_temperature=False), 1.0, None),
    ],
)
def test_log_probs_that_are_of_no_use_are_computed_and_it_is_said(
    engine_says: Any, said: LogProbs, temperature: float, why: str | None
) -> None:
    engine_says(said)
    plan = parts_of(algo="ppo", engine={"name": "hf", "temperature": temperature}).plan
    told: list[str] = []
    assemble(plan, told.append)
    notes = [line for line in told if "log-probs" in line]
    assert notes == ([] if why is None else [f"note: the log-probs of --engine hf {why}: they are computed, and what "
                                             "they were is not corrected for"])  # fmt: skip
