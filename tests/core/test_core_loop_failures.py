"""What fails in the loop: is left out and counted, or ends the run with its reason; nothing half done stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from at_work import Run, Says, metrics_of, plan_of
from rlhf.errors import RunError
from rlhf.interfaces import Failed, Score, Tracker
from rlhf.loop import Parts
from rlhf.rollouts import Source
from rlhf.saved import whole


def test_what_could_not_be_judged_is_left_out_counted_and_told(tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        answer = lambda rollouts: [Failed("timed out") if i < 3 else 1.0 for i in range(len(rollouts))]  # noqa: E731
        parts.sampler.sources = [Source("slow", 1.0, Says(answer))]

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1}, max_steps=1), change)
    run.go()
    assert run.metrics()[0]["rollout/failed"] == 3 and run.metrics()[0]["reward/mean"] == 1.0
    assert any("slow: timed out" in text and "3 rollouts" in text for text in run.said)


def test_what_the_engine_could_not_have_is_left_out_counted_and_told(tmp_path: Path) -> None:
    """The first two responses of a step of 8, beside one that can't be judged."""

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        engine = parts.sampler.engine
        generate = engine.generate

        def failing(requests: Any, temperature: float | None = None) -> Any:
            found = generate(requests, temperature)
            of = found.sequences
            lengths = torch.where(torch.arange(len(of)) < 2, 0, of.lengths)
            kept = (torch.arange(len(of)) >= 2).repeat_interleave(of.lengths)
            sequences = attrs.evolve(of, tokens=of.tokens[kept], mask=of.mask[kept], lengths=lengths)
            return attrs.evolve(
                found, sequences=sequences, logp=found.logp[kept], failed={0: "engine: lost", 1: "late"}
            )

        engine.generate = failing  # type: ignore[method-assign]
        seen = lambda rollouts: [Failed("timed out"), *[float(len(rollouts))] * (len(rollouts) - 1)]  # noqa: E731
        parts.sampler.sources = [Source("judge", 1.0, Says(seen))]
        parts.context.say("a component speaks")

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1}, max_steps=1), change)
    run.go()
    (found,) = run.metrics()
    assert (found["rollout/failed"], found["rollout/left_out"]) == (3, 3)
    assert found["reward/mean"] == 6.0  # the reward saw six, and gave none of the others a number
    assert found["response/length"] > 0
    assert any("3 rollouts failed, 3 are left out" in text and "first: engine: lost" in text for text in run.said)
    assert "a component speaks" in run.said


def test_a_loss_that_is_not_finite_ends_the_run_and_what_was_done_stays(tmp_path: Path) -> None:
    plan = plan_of(algo="sft", max_steps=4, save_every=1)

    def change(parts: Parts) -> None:
        loss = parts.algorithm.loss

        def broken(batch: Any, score: Any) -> Tensor:
            return loss(batch, score) * (math.nan if parts.algorithm.step == 2 else 1.0)

        parts.algorithm.loss = broken  # type: ignore[method-assign]

    run = Run(tmp_path / "broken", plan, change)
    with pytest.raises(RunError, match="the loss is nan in step 3; nothing of it was applied"):
        run.go()
    summary = run.directory.summary()
    assert summary is not None and summary["status"] == "failed" and summary["steps"] == 2
    assert "RunError: the loss is nan in step 3" in summary["error"]

    Run(tmp_path / "broken", plan).go(resume=True)
    whole = Run(tmp_path / "whole", plan)
    whole.go()
    assert metrics_of(tmp_path / "broken") == whole.metrics() and len(whole.metrics()) == 4


def full(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "at"),
    [("rlhf.checkpoint.save_file", "checkpoints"), ("transformers.PreTrainedModel.save_pretrained", "model")],
)
def test_a_disk_that_is_full_ends_the_run_and_what_was_saved_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: str
) -> None:
    plan = plan_of(algo="sft", max_steps=2, save_every=1)
    run = Run(tmp_path / "full", plan)
    told = rf"full/{at}: cannot be written: .*No space left on device"
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(RunError, match=told):
            run.go()
    assert not run.directory.model.exists()
    assert len(whole(run.directory.checkpoints)) == (0 if at == "checkpoints" else 2)
    again = Run(tmp_path / "full", plan)
    again.go(resume=True)
    assert again.directory.model.is_dir() and len(again.metrics()) == 2


def test_a_summary_that_cannot_be_written_does_not_hide_why_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, plan_of(algo="sft", max_steps=1))

    def none_left(summary: Any) -> None:
        raise RunError("summary.json: cannot be written")

    monkeypatch.setattr(run.directory, "write_summary", none_left)
    with monkeypatch.context() as patched:
        patched.setattr("rlhf.checkpoint.save_file", full)
        with pytest.raises(RunError, match="checkpoints: cannot be written"):
            run.go()
    assert "summary.json: cannot be written" in run.said
    with pytest.raises(RunError, match=r"summary\.json"):
        run.go()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (1.0, "sft returned a loss of type float, not a tensor"),
        (None, "sft returned a loss of type NoneType, not a tensor"),
        (torch.zeros(()), "the loss of sft has no gradient: it depends on no score of a trained role"),
    ],
)
def test_a_loss_that_nothing_can_be_learnt_from_is_an_error(tmp_path: Path, loss: Any, why: str) -> None:
    def change(parts: Parts) -> None:
        parts.algorithm.loss = lambda batch, score: loss  # type: ignore[method-assign]

    with pytest.raises(RunError, match=why):
        Run(tmp_path / "a", plan_of(algo="sft"), change).go()


def test_a_loss_that_is_no_scalar_and_no_requests_are_errors(tmp_path: Path) -> None:
    def shape(parts: Parts) -> None:
        parts.algorithm.loss = lambda batch, score: torch.zeros(2)  # type: ignore[method-assign]

    with pytest.raises(RunError, match=r"sft returned a loss of shape \(2,\), not a scalar"):
        Run(tmp_path / "a", plan_of(algo="sft"), shape).go()

    def silent(parts: Parts) -> None:
        parts.algorithm.requests = lambda prompts: []  # type: ignore[method-assign]

    with pytest.raises(RunError, match="PPO asked for no sample in step 1"):
        Run(tmp_path / "b", plan_of(algo="ppo"), silent).go()


def test_an_experience_of_nothing_is_a_step_without_updates(tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        experience = parts.algorithm.experience

        def sometimes(rollouts: Any, score: Score) -> Any:
            found = experience(rollouts, score)
            return found.select(torch.zeros(0, dtype=torch.long)) if parts.algorithm.step == 0 else found

        parts.algorithm.experience = sometimes  # type: ignore[method-assign]

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1, "minibatches": 1}), change)
    run.go()
    first, second = cast(Any, run.metrics())
    assert first["loss"] is None and first["optim/updates"] == 0
    assert second["optim/updates"] == 1 and math.isfinite(second["loss"])


def test_a_tracker_that_raises_is_reported_and_dropped(tmp_path: Path) -> None:
    heard: list[str] = []

    class Fails(Tracker):
        def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
            heard.append(f"fails {step}")
            raise OSError("disk full")

    class Hears(Tracker):
        def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
            heard.append(f"hears {step}")

        def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
            heard.append(f"{summary['status']} {error}")

    def change(parts: Parts) -> None:
        parts.trackers = [Fails(None, parts.context), Hears(None, parts.context)]

    run = Run(tmp_path, plan_of(algo="sft"), change)
    run.go()
    assert heard == ["fails 1", "hears 1", "hears 2", "done None"]
    dropped = [text for text in run.said if "Fails" in text]
    assert dropped == ["tracker Fails failed at step_finished and is dropped: OSError: disk full"]
