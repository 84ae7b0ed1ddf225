"""The loop: numbers that don't depend on how a batch is cut, and runs that stop, break, resume and evaluate cleanly."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf import checkpoint, cli, facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.errors import Interrupted, RunError
from rlhf.interfaces import Context, Failed, Reward, Score, Tracker
from rlhf.loop import Loop, Parts, resume_from
from rlhf.plan import Plan
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rollouts import Source
from rlhf.rundir import RunDirectory
from rlhf.sequences import Experience, Rollouts, Sequences

MACHINE_DEPENDENT = ("time/", "perf/", "memory/")


def plan_of(**recipe: Any) -> Plan:
    content = {"max_steps": 2, "batch_size": 8, "eval_rows": 0, "mem": "fp32", "save_every": 100, **recipe}
    return compose(from_mapping(content, "test"), loaded(), facts.machine())


class Run:
    """A run at work in this process."""

    def __init__(self, folder: Path, plan: Plan, change: Callable[[Parts], None] = lambda parts: None) -> None:
        self.said: list[str] = []
        self.parts = assemble(plan, self.said.append)
        self.parts.trackers = []
        change(self.parts)
        self.directory = RunDirectory(folder)
        self.directory.open(plan)
        self.loop = Loop(self.parts, self.directory, self.said.append)

    def go(self, resume: bool = False) -> dict[str, Any]:
        try:
            found = resume_from(self.directory, self.said.append) if resume else None
            if resume:
                self.directory.cut_back(found[1]["loop"]["step"] if found else 0)
            return self.loop.run(found[1] if found else None)
        finally:
            assert self.directory._lock is not None
            self.directory._lock.close()

    def metrics(self) -> list[dict[str, float]]:
        return metrics_of(self.directory.path)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parts.models.trained.named_parameters()}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE_DEPENDENT)} for line in lines]


# Numbers do not depend on how a batch is cut

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"algo": "sft"},
    "sft packed": {"algo": {"name": "sft", "packing": True, "pack_length": 64}, "batch_size": 4},
    "reward": {"algo": {"name": "reward", "centre_coef": 0.1}},
    "dpo": {"algo": "dpo"},
    "ppo": {"algo": {"name": "ppo", "epochs": 2, "minibatches": 2, "entropy_coef": 0.01, "normalise_rewards": True}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_how_a_batch_is_cut_changes_nothing(tmp_path: Path, name: str) -> None:
    # Adam's own eps of 1e-8 would turn rounding into a step of the whole learning rate wherever a gradient is about 0;
    # at 1e-3 an update is a smooth function of its gradient.
    optim = {"name": "adamw", "eps": 1e-3}
    runs = []
    for budget in (1, 1_000_000):  # one sequence (or pair) a forward; the whole batch in one
        run = Run(tmp_path / str(budget), plan_of(**ALGORITHMS[name], optim=optim, micro_batch_tokens=budget))
        counted: list[Tensor] = []
        backward = run.parts.backend.backward
        run.parts.backend.backward = lambda loss, b=backward, c=counted: (c.append(loss), b(loss))[1]  # type: ignore
        initial = run.weights()
        run.go()
        runs.append((run, len(counted)))
    (fine, many), (coarse, few) = runs
    assert few == sum(line["optim/updates"] for line in coarse.metrics()) and many >= 4 * few
    assert few == (8 if name == "ppo" else 2)

    # float32 sums in another order: 2^-24 x some dozen roundings, in numbers of the order of 1
    for a, b in zip(fine.metrics(), coarse.metrics(), strict=True):
        if name == "dpo" and a["step"] == 1:  # policy and reference are the same, and rounding says which is "better"
            a.pop("reward/accuracy"), b.pop("reward/accuracy")
        assert set(a) == set(b)
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), key
    for key, value in coarse.weights().items():
        assert torch.allclose(fine.weights()[key], value, rtol=0, atol=1e-6), key
    moved = max(float((p - q).abs().max()) for p, q in zip(coarse.weights().values(), initial.values(), strict=True))
    assert moved > 1e-4  # a hundred times what they may differ by


# DPO's reference


def test_the_reference_is_run_once_a_row_however_many_passes(tmp_path: Path) -> None:
    rows = [{"prompt": f"Add {i} and 1.", "chosen": f" {i + 1}", "rejected": " 5"} for i in range(10, 16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_of(algo="dpo", data=str(tmp_path / "pairs.jsonl"), max_steps=None, epochs=3, batch_size=4)
    run = Run(tmp_path / "run", plan)
    scored: list[tuple[str, int]] = []
    forward = run.parts.models.forward

    def counting(requests: Any) -> Any:
        scored.extend((request.role, len(request.sequences)) for request in requests)
        return forward(requests)

    run.parts.models = _Counting(run.parts.models, counting)  # type: ignore[assignment]
    run.parts.score._models = run.parts.models
    run.loop._gradient._models = run.parts.models
    assert run.loop.steps == 5  # 18 positions: four batches of 4 and one of 2
    run.go()
    assert sum(n for role, n in scored if role == "reference") == 2 * 6
    assert sum(n for role, n in scored if role == "policy") == 2 * 18
    first = run.metrics()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # float32 log-ratios of about 0
    assert run.metrics()[-1]["loss"] < first["loss"] - 1e-4


def test_a_resumed_run_keeps_the_references_log_probs(tmp_path: Path) -> None:
    rows = [{"prompt": f"Add {i} and 1.", "chosen": f" {i + 1}", "rejected": " 5"} for i in range(10, 14)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_of(algo="dpo", data=str(tmp_path / "pairs.jsonl"), max_steps=2, batch_size=4, save_every=1)

    def broken(parts: Parts) -> None:
        loss = parts.algorithm.loss
        nan = lambda batch, score: loss(batch, score) * (math.nan if parts.algorithm.step else 1.0)  # noqa: E731
        parts.algorithm.loss = nan  # type: ignore[method-assign]

    with pytest.raises(RunError, match="the loss is nan in step 2"):
        Run(tmp_path / "run", plan, broken).go()
    scored: list[str] = []

    def counting(parts: Parts) -> None:
        forward = parts.models.forward
        parts.models = _Counting(  # type: ignore[assignment]
            parts.models, lambda requests: (scored.extend(request.role for request in requests), forward(requests))[1]
        )
        parts.score._models = parts.models

    Run(tmp_path / "run", plan, counting).go(resume=True)
    assert set(scored) == {"policy"}  # the four rows' reference was run before the checkpoint


class _Counting:
    def __init__(self, models: Any, forward: Any) -> None:
        self._models, self.forward = models, forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)


# PPO in the loop


def test_an_early_stop_leaves_the_batchs_rest_out(tmp_path: Path) -> None:
    algo = {"name": "ppo", "epochs": 4, "minibatches": 2, "target_kl": 1e-9}
    run = Run(tmp_path, plan_of(algo=algo, optim={"name": "adamw", "learning_rate": 1e-3}))
    run.go()
    # One minibatch may still see a KL of 0, up to rounding: the policy that sampled. The next one can't.
    assert [line["optim/updates"] for line in run.metrics()] in ([1, 1], [2, 2], [1, 2], [2, 1])
    assert [line["optim/learning_rate"] for line in run.metrics()] == pytest.approx([1e-3, 1e-3], rel=1e-12)


def test_critic_warm_up_moves_the_value_model_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1, "critic_warmup": 2}, max_steps=3))
    before = run.weights()
    seen: list[set[str]] = []
    step_done = run.parts.algorithm.step_done

    def after(metrics: Mapping[str, float]) -> None:
        seen.append(
            {name.split(".")[1] for name, value in run.weights().items() if not torch.equal(value, before[name])}
        )
        step_done(metrics)

    run.parts.algorithm.step_done = after  # type: ignore[method-assign]
    run.go()
    assert seen == [{"value"}, {"value"}, {"policy", "value"}]


# What happens when, and with which numbers


def test_the_schedule_begins_with_the_first_step_and_ends_with_the_last(tmp_path: Path) -> None:
    optim = {"name": "adamw", "schedule": "linear", "learning_rate": 1e-4}
    run = Run(tmp_path, plan_of(algo="sft", max_steps=4, optim=optim))
    run.go()
    rates = [line["optim/learning_rate"] for line in run.metrics()]
    assert rates == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4], rel=1e-12)


def test_metrics_are_means_over_a_steps_updates(tmp_path: Path) -> None:
    seen: list[float] = []

    def change(parts: Parts) -> None:
        done = parts.algorithm.minibatch_done

        def noting(metrics: Mapping[str, float]) -> bool:
            seen.append(metrics["loss"])
            return done(metrics)

        parts.algorithm.minibatch_done = noting  # type: ignore[method-assign]

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 2, "minibatches": 2}, max_steps=1), change)
    run.go()
    (line,) = run.metrics()
    assert line["optim/updates"] == len(seen) == 4 and len(set(seen)) > 1
    assert line["loss"] == pytest.approx(sum(seen) / 4, rel=1e-12)


def test_each_step_draws_anew_and_by_its_number_alone(tmp_path: Path) -> None:
    def drawn(name: str, more: int) -> list[tuple[float, float, float]]:
        numbers: list[tuple[float, float, float]] = []

        def change(parts: Parts) -> None:
            loss = parts.algorithm.loss

            def drawing(batch: Any, score: Any) -> Tensor:
                numbers.append((float(torch.rand(())), random.random(), float(np.random.rand())))
                for _ in range(more):  # what a step draws is nothing to the next one
                    torch.rand(()), random.random(), np.random.rand()
                return loss(batch, score)

            parts.algorithm.loss = drawing  # type: ignore[method-assign]

        Run(tmp_path / name, plan_of(algo="sft", max_steps=3, micro_batch_tokens=1_000_000), change).go()
        return numbers

    numbers = drawn("few", 0)
    assert all(len(set(of_one)) == 3 for of_one in zip(*numbers, strict=True))
    assert drawn("many", 5) == numbers


def test_the_engine_is_given_new_weights_after_each_step(tmp_path: Path) -> None:
    given: list[tuple[int, dict[str, Tensor]]] = []
    learnt: list[dict[str, Tensor]] = []

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        engine = parts.sampler.engine

        def sync(weights: Any, version: int) -> None:
            given.append((version, {name: tensor.clone() for name, tensor in weights()}))

        engine.sync = sync  # type: ignore[method-assign]
        update = parts.backend.update

        def updating(factor: float) -> Any:
            found = update(factor)
            learnt.append({name: tensor.clone() for name, tensor in parts.backend.weights("policy")})
            return found

        parts.backend.update = updating  # type: ignore[method-assign]

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1, "minibatches": 1}, max_steps=3), change)
    run.go()
    assert [version for version, _ in given] == [0, 1, 2, 3]  # how many steps made these weights, as after a resume
    for (_, weights), after in zip(given[1:], learnt, strict=True):
        assert weights.keys() == after.keys()
        assert all(torch.equal(weights[name], after[name]) for name in after)
    assert any(not torch.equal(given[0][1][name], given[1][1][name]) for name in learnt[0])


@pytest.mark.parametrize("asked", [None, 0.0, 0.3])
def test_held_out_prompts_are_sampled_at_the_temperature_of_evaluation(tmp_path: Path, asked: float | None) -> None:
    temperatures: list[float | None] = []

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        generate = parts.sampler.engine.generate

        def noting(requests: Any, temperature: float | None = None) -> Any:
            temperatures.append(temperature)
            return generate(requests, temperature)

        parts.sampler.engine.generate = noting  # type: ignore[method-assign]

    algo = {"name": "ppo", "epochs": 1}
    Run(tmp_path, plan_of(algo=algo, max_steps=1, eval_rows=4, eval_temperature=asked), change).go()
    assert temperatures == [asked, None, asked]  # None: the engine's own, which training samples at


def test_every_evaluation_draws_the_same(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def change(parts: Parts) -> None:
        def judge(rollouts: Rollouts) -> list[float]:
            drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
            return [1.0] * len(rollouts)

        assert parts.sampler is not None
        parts.sampler.sources = [Source("draws", 1.0, Says(judge))]

    Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1}, max_steps=2, eval_rows=4, eval_every=1), change).go()
    before, _, first, _, second = drawn  # steps lie between
    assert before == first == second


def test_better_is_higher_for_a_reward_and_lower_for_a_loss() -> None:
    def best(objective: tuple[str, str], *values: float) -> list[bool]:
        parts = type("P", (), {})()
        parts.plan = type("Plan", (), {"objective": objective, "run": type("R", (), {"micro_batch_tokens": 1})()})()
        parts.feed, parts.models, parts.trackers = type("F", (), {"steps": 1})(), None, []
        loop = Loop(cast(Any, parts), cast(Any, None), lambda text: None)
        loop.heldout_before = {objective[0]: values[0]}
        return [loop._is_best({objective[0]: value}) for value in values[1:]]

    assert best(("reward/mean", "max"), 0.5, 0.4, 0.6, 0.6, 0.7) == [False, True, False, True]
    assert best(("loss", "min"), 0.5, 0.6, 0.4, 0.4, 0.3) == [False, True, False, True]


# Failures


class Says(Reward):
    def __init__(self, judge: Callable[[Rollouts], Any]) -> None:
        super().__init__(None, Context(plan=cast(Plan, None)))
        self._judge = judge

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return self._judge(rollouts)


def test_what_could_not_be_judged_is_left_out_counted_and_told(tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        answer = lambda rollouts: [Failed("timed out") if i < 3 else 1.0 for i in range(len(rollouts))]  # noqa: E731
        parts.sampler.sources = [Source("slow", 1.0, Says(answer))]

    run = Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 1}, max_steps=1), change)
    run.go()
    assert run.metrics()[0]["rollout/failed"] == 3 and run.metrics()[0]["reward/mean"] == 1.0
    assert any("slow: timed out" in text and "3 rollouts" in text for text in run.said)


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


def test_a_loss_that_is_no_scalar_and_no_requests_are_errors(tmp_path: Path) -> None:
    def shape(parts: Parts) -> None:
        parts.algorithm.loss = lambda batch, score: torch.zeros(2)  # type: ignore[method-assign]

    with pytest.raises(RunError, match=r"sft returned a loss of shape \(2,\), not a scalar"):
        Run(tmp_path / "a", plan_of(algo="sft"), shape).go()

    def silent(parts: Parts) -> None:
        parts.algorithm.requests = lambda prompts: []  # type: ignore[method-assign]

    with pytest.raises(RunError, match="ppo asked for no sample in step 0"):
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


# Evaluation


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_evaluation_leaves_no_trace(tmp_path: Path, name: str) -> None:
    def change(parts: Parts) -> None:
        """Components that report of whatever they see, held-out rows too, and draw random numbers."""
        sink = parts.context.metrics
        if parts.sampler is not None:
            judge = parts.sampler.sources[0].reward.judge

            def telling(rollouts: Rollouts, score: Score) -> Any:
                sink.mean("mine/seen", float(len(rollouts)))
                sink.mean("mine/drawn", torch.rand(()))
                return judge(rollouts, score)

            parts.sampler.sources[0].reward.judge = telling  # type: ignore[method-assign]
        else:
            experience = parts.algorithm.experience

            def telling_too(rollouts: Any, score: Score) -> Any:
                sink.mean("mine/seen", float(len(rollouts)))
                sink.mean("mine/drawn", torch.rand(()))
                return experience(rollouts, score)

            parts.algorithm.experience = telling_too  # type: ignore[method-assign]

    found = {}
    for every in (None, 1):
        plan = plan_of(algo=name, eval_rows=12, eval_every=every, batch_size=8)
        run = Run(tmp_path / str(every), plan, change)
        summary = run.go()
        assert set(summary["heldout_before"]) == set(summary["heldout_after"]) != set()
        found[every] = (run.metrics(), run.weights(), summary["heldout_before"], summary["heldout_after"])
    assert found[None][0] == found[1][0]
    assert {line["mine/seen"] for line in found[1][0]} == {8.0 if name == "ppo" else 16.0}
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[None][1].items())
    assert found[None][2:] == found[1][2:]
    if name == "dpo":
        assert found[1][2]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path: Path) -> None:
    scores = iter([0.5, 0.1, 0.9, 0.3, 0.9, 0.2])  # before, and after steps 1 to 5

    class Scripted(Loop):
        def _evaluate(self) -> dict[str, float]:
            return {"loss": -next(scores)}

    plan = plan_of(algo="sft", max_steps=5, eval_rows=4, eval_every=1, save_every=1, keep=2)
    run = Run(tmp_path, plan)
    run.loop = Scripted(run.parts, run.directory, run.said.append)
    summary = run.go()
    saved = checkpoint.whole(run.directory.checkpoints)
    assert [s.step for s in saved] == [2, 4, 5]
    assert saved[0].heldout == {"loss": -0.9}
    assert summary["best"] == {"step": 2, "metric": "loss", "value": -0.9}  # as good again is not better
    assert (summary["heldout_before"], summary["heldout_after"]) == ({"loss": -0.5}, {"loss": -0.2})


# Stopping and resuming


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    plan = plan_of(algo={"name": "ppo", "epochs": 1, "kl_control": "adaptive"}, max_steps=3, eval_rows=8)

    def change(parts: Parts) -> None:
        step_done = parts.algorithm.step_done

        def stop(metrics: Mapping[str, float]) -> None:
            step_done(metrics)
            if parts.algorithm.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        parts.algorithm.step_done = stop  # type: ignore[method-assign]

    handler = signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path / "stopped", plan, change)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 2; checkpoint saved"):
        run.go()
    assert signal.getsignal(signal.SIGTERM) is handler  # as it was before
    summary = run.directory.summary()
    assert summary is not None and (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert [saved.step for saved in checkpoint.whole(run.directory.checkpoints)] == [2]
    assert not run.directory.model.exists()

    resumed = Run(tmp_path / "stopped", plan)
    after = resumed.go(resume=True)
    whole = Run(tmp_path / "whole", plan)
    expected = whole.go()
    assert resumed.metrics() == whole.metrics()
    assert all(torch.equal(value, whole.weights()[key]) for key, value in resumed.weights().items())
    for key in ("heldout_before", "heldout_after", "best", "steps", "status"):
        assert after[key] == expected[key]
    assert set(os.listdir(tmp_path / "stopped")) >= {
        "recipe.yaml", "plan.json", "environment.json", "metrics.jsonl", "samples.jsonl", "summary.json",
        "checkpoints", "model",
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json", "value"} <= set(
        os.listdir(tmp_path / "stopped/model")
    )
    samples = [json.loads(line) for line in (tmp_path / "stopped/samples.jsonl").read_text().split("\n") if line]
    assert [s["step"] for s in samples] == [1] * 4 + [2] * 4 + [3] * 4
    assert {"prompt", "response", "reward", "reward/answer", "finish", "tokens"} <= set(samples[0])


def test_killed_before_the_model_was_written_it_goes_on_from_there(tmp_path: Path) -> None:
    plan = plan_of(algo="sft", eval_rows=4)
    run = Run(tmp_path, plan)

    def cut_short() -> None:
        raise KeyboardInterrupt

    run.loop._save_model = cut_short  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.go()
    before = run.metrics()
    resumed = Run(tmp_path, plan)
    resumed.loop._one_step = cut_short  # type: ignore[method-assign]  # no step is left to make
    summary = resumed.go(resume=True)
    assert summary["status"] == "done" and summary["heldout_after"] == run.loop.heldout_after != {}
    assert run.directory.model.is_dir() and resumed.metrics() == before


def rlhf(*words: str) -> int:
    """The exit code of a command line, carried out in this process."""
    try:
        cli.main(list(words))
    except SystemExit as done:
        code = int(done.code or 0)
    gc.collect()  # an error's traceback keeps its frames, and with them the lock of the run's folder
    return code


def test_the_command_line_from_start_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ("run", "--algo", "sft", "--batch-size", "4", "--eval-rows", "4", "--save-every", "1", "--output", str(out))

    assert rlhf(*words, "--max-steps", "2", "--resume") == 0
    assert "holds no checkpoint yet: starting from 0" in capsys.readouterr().err
    first = metrics_of(out)
    assert [line["step"] for line in first] == [1, 2]

    assert rlhf(*words, "--max-steps", "2") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert rlhf(*words, "--max-steps", "2", "--resume") == 0
    assert "already finished after 2 steps; nothing to do" in capsys.readouterr().err
    assert rlhf(*words, "--max-steps", "2", "--seed", "1", "--resume") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert metrics_of(out) == first

    torn = out / "checkpoints" / "step-000002" / "backend.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert rlhf(*words, "--max-steps", "3", "--resume") == 0
    said = capsys.readouterr().err
    assert f"checkpoint refused: {torn}: is torn" in said and "resuming from" in said and "step-000001" in said
    again = metrics_of(out)
    assert again[:2] == first and [line["step"] for line in again] == [1, 2, 3]  # step 2 was done again, alike
    assert [saved.step for saved in checkpoint.whole(out / "checkpoints")] == [2, 3]


def test_a_reward_that_breaks_is_exit_1_and_resumable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, code = tmp_path / "run", tmp_path / "reward.py"
    words = ("run", "--algo", "ppo", "--batch-size", "4", "--eval-rows", "0", "--save-every", "1", "--max-steps", "2",
             "--algo.epochs", "1", "--reward", "python", "--reward.python.path", f"{code}:judge",
             "--output", str(out))  # fmt: skip
    code.write_text(
        "calls = []\n"
        "def judge(completions, **_):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 2 else 1.0 for _ in completions]\n"
    )
    assert rlhf(*words) == 1
    assert "reward 'python' returned nan for sample 0" in capsys.readouterr().err
    assert [line["step"] for line in metrics_of(out)] == [1]
    code.write_text("def judge(completions, **_):\n    return [1.0 for _ in completions]\n")
    assert rlhf(*words, "--resume") == 0
    assert [line["step"] for line in metrics_of(out)] == [1, 2]


def test_the_smallest_share_of_a_pass_is_a_run_of_one_row(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(algo="sft", max_steps=None, epochs=1e-6))
    assert run.go()["steps"] == 1 and math.isfinite(run.metrics()[0]["loss"])


def test_minibatches_are_all_of_the_experience_in_parts_that_keep_groups(tmp_path: Path) -> None:
    class Fake:
        minibatches, unit = 3, "sequence"

    sequences = Sequences.of(
        [torch.tensor([1])] * 10, [torch.tensor([i]) for i in range(10)], group=[i // 2 for i in range(10)]
    )
    plan = plan_of(algo="sft")
    parts = cast(Any, type("P", (), {"plan": plan, "algorithm": Fake(), "optimizer": None, "trackers": [],
                                     "models": None, "feed": type("F", (), {"steps": 1})()})())  # fmt: skip
    loop = Loop(parts, cast(Any, None), lambda text: None)
    experience = Experience(sequences)
    drawn = [[rows.tolist() for rows in loop._minibatches(experience, epoch)] for epoch in (0, 1)]
    for parts_of_epoch in drawn:
        assert sorted(row for part in parts_of_epoch for row in part) == list(range(10))
        assert [len(part) for part in parts_of_epoch] == [4, 3, 3]
    assert drawn[0] != drawn[1]  # each pass is shuffled anew
    assert drawn[0] == [rows.tolist() for rows in loop._minibatches(experience, 0)]
    Fake.unit = "group"
    grouped = [rows.tolist() for rows in loop._minibatches(experience, 0)]
    assert sorted(map(len, grouped)) == [2, 4, 4]
    assert all(part == sorted(part) and {row ^ 1 for row in part} == set(part) for part in grouped)
