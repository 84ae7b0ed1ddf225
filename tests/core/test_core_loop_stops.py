"""Runs that stop and go on, with the numbers of one that never stopped; held-out data before and after."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from at_work import Run, metrics_of, plan_of
from rlhf import checkpoint, cli
from rlhf.errors import Interrupted
from rlhf.interfaces import Score
from rlhf.loop import Loop, Parts
from rlhf.micro import Units
from rlhf.sequences import Rollouts, Sequences
from rlhf.world import World

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


def test_each_pass_over_a_batch_is_in_an_order_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    minibatches = Units.minibatches

    def record(self: Units, count: int, seed: int) -> Any:
        seeds.append(seed)
        return minibatches(self, count, seed)

    monkeypatch.setattr(Units, "minibatches", record)
    Run(tmp_path, plan_of(algo={"name": "ppo", "epochs": 2, "minibatches": 2})).go()
    assert len(set(seeds)) == len(seeds) == 4  # of two steps


def test_minibatches_are_all_of_the_experience_in_parts_that_keep_groups() -> None:
    sequences = Sequences.of(
        [torch.tensor([1])] * 10, [torch.tensor([i]) for i in range(10)], group=[i // 2 for i in range(10)]
    )
    units = Units(sequences, "sequence", World())
    drawn = [[rows.tolist() for rows in units.minibatches(3, seed)] for seed in (0, 1)]
    for parts_of_epoch in drawn:
        assert sorted(row for part in parts_of_epoch for row in part) == list(range(10))
        assert [len(part) for part in parts_of_epoch] == [4, 3, 3]
    assert drawn[0] != drawn[1]  # each pass is shuffled anew
    assert drawn[0] == [rows.tolist() for rows in units.minibatches(3, 0)]
    grouped = [rows.tolist() for rows in Units(sequences, "group", World()).minibatches(3, 0)]
    assert sorted(map(len, grouped)) == [2, 4, 4]
    assert all(part == sorted(part) and {row ^ 1 for row in part} == set(part) for part in grouped)
