"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf.interfaces import Context

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rlhf_plugins.trackers.tensorboard import TensorBoard, flatten

RECIPE = {
    "algo": {"name": "tempered", "temperature": 0.5, "note": None},
    "reward": [{"name": "model", "label": "helpful", "weight": 1.0}, {"name": "length", "target": 30}],
    "data": ["a.jsonl", "b.jsonl"],
    "seed": 7,
    "trust_remote_code": False,
}
FLAT = {
    "algo": "tempered",
    "algo.temperature": 0.5,
    "reward.helpful": "model",
    "reward.helpful.label": "helpful",
    "reward.helpful.weight": 1.0,
    "reward.length": "length",
    "reward.length.target": 30,
    "data": "a.jsonl, b.jsonl",
    "seed": 7,
    "trust_remote_code": False,
}


def test_a_recipe_is_flat_as_the_command_line_writes_it() -> None:
    assert dict(flatten(RECIPE)) == FLAT
    assert list(flatten({"at": date(2026, 1, 2)})) == [("at", "2026-01-02")]


def started(folder: Path, first_step: int = 0) -> TensorBoard:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    plan: Any = SimpleNamespace(objective=("reward/mean", "max"))
    tracker = TensorBoard(None, Context(plan=plan))
    tracker.run_started({"directory": str(folder), "plan": plan, "steps": 9, "first_step": first_step, "notes": []})
    return tracker


def log(tracker: TensorBoard, steps: Mapping[int, float]) -> None:
    for step, value in steps.items():
        tracker.step_finished(step, {"loss": value, "reward/mean": -value})


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_scalars_of_steps_and_of_held_out_data(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.evaluated(0, {"reward/mean": 0.25})
    log(tracker, {1: 0.5, 2: 0.75})
    tracker.step_finished(3, {"loss": math.nan})
    tracker.evaluated(3, {"reward/mean": 1.0})
    tracker.run_finished({}, None)
    assert scalars(tmp_path, "loss")[:2] == [(1, 0.5), (2, 0.75)]
    assert math.isnan(scalars(tmp_path, "loss")[2][1])
    assert scalars(tmp_path, "reward/mean") == [(1, -0.5), (2, -0.75)]
    assert scalars(tmp_path, "heldout/reward/mean") == [(0, 0.25), (3, 1.0)]


def test_the_recipe_is_there_as_text_and_as_hyperparameters(tmp_path: Path) -> None:
    started(tmp_path).run_finished({}, None)
    events = read(tmp_path)
    (text,) = events.Tensors("recipe/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert yaml.safe_load("".join(line[4:] + "\n" for line in shown.split("\n"))) == RECIPE
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["algo"].string_value == "tempered"
    assert found["seed"].number_value == 7
    assert set(found) == set(FLAT)
    experiment = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["heldout/reward/mean"]
    assert [path.parent.name for path in tmp_path.rglob("events.*")] == ["tensorboard"]  # no run in a subfolder


def test_a_checkpoint_puts_what_came_before_it_on_disk(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    log(tracker, {1: 0.5})
    tracker.checkpoint_saved(1, tmp_path)
    assert scalars(tmp_path, "loss") == [(1, 0.5)]  # nothing was closed
    tracker.run_finished({}, None)


def test_a_resumed_run_purges_the_steps_it_repeats(tmp_path: Path) -> None:
    killed = started(tmp_path)
    killed.evaluated(0, {"reward/mean": 0.0})
    log(killed, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    killed.evaluated(3, {"reward/mean": 3.0})
    killed.run_finished({}, RuntimeError())
    resumed = started(tmp_path, first_step=2)
    log(resumed, {3: 30.0})
    resumed.run_finished({}, None)
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(tmp_path, "heldout/reward/mean") == [(0, 0.0)]
    assert len(read(tmp_path).Tensors("recipe/text_summary")) == 1


def test_a_run_that_starts_over_purges_everything(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        tracker = started(tmp_path)
        tracker.evaluated(0, {"reward/mean": value})
        log(tracker, {1: value})
        tracker.run_finished({}, None)
    assert scalars(tmp_path, "loss") == [(1, 2.0)]
    assert scalars(tmp_path, "heldout/reward/mean") == [(0, 2.0)]
    assert len(read(tmp_path).Tensors("recipe/text_summary")) == 1


def test_tracking_that_begins_with_a_resumed_run_has_the_recipe(tmp_path: Path) -> None:
    tracker = started(tmp_path, first_step=5)
    log(tracker, {6: 1.0})
    tracker.run_finished({}, None)
    assert len(read(tmp_path).Tensors("recipe/text_summary")) == 1
    assert scalars(tmp_path, "loss") == [(6, 1.0)]
