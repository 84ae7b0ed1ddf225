"""The tracker with the real MLflow and a SQLite store, read back by MLflow's own client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from rlhf.api import Context, Plan
from rlhf_mlflow import MLflowConfig, rlhf_trackers

pytest.importorskip("mlflow", reason="MLflow isn't installed; `nox -s contrib` installs it")
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rlhf_mlflow.tracker import MLflow, flatten, legal

RECIPE = {
    "algo": {"name": "tempered", "temperature": 0.5, "note": None},
    "reward": [{"name": "model", "label": "helpful", "weight": 1.0}, {"name": "length", "target": 30}],
    "data": ["a.jsonl", "b.jsonl"],
    "seed": 7,
}
FLAT = {
    "algo": "tempered",
    "algo.temperature": "0.5",
    "reward.helpful": "model",
    "reward.helpful.label": "helpful",
    "reward.helpful.weight": "1.0",
    "reward.length": "length",
    "reward.length.target": "30",
    "data": "a.jsonl, b.jsonl",
    "seed": "7",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the environment says of servers."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its tables take a second or two to make, so tests share them."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def started(folder: Path, first_step: int = 0, **options: Any) -> MLflow:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    tracker = MLflow(MLflowConfig(**options), Context(plan=cast(Plan, None)))
    plan = SimpleNamespace(algo=SimpleNamespace(name="tempered"))
    tracker.run_started({"directory": str(folder), "plan": plan, "steps": 9, "first_step": first_step, "notes": []})
    return tracker


def found(folder: Path, store: str) -> Any:
    """The MLflow run of a directory."""
    return MlflowClient(store).get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])


def points(folder: Path, store: str, key: str) -> list[tuple[int, float]]:
    run = found(folder, store).info.run_id
    return sorted((point.step, point.value) for point in MlflowClient(store).get_metric_history(run, key))


def test_a_recipe_is_flat_as_the_command_line_writes_it() -> None:
    assert dict(flatten(RECIPE)) == FLAT


def test_a_run_is_there_with_its_options_metrics_and_status(tmp_path: Path, store: str) -> None:
    folder = tmp_path / "run-7"
    tracker = started(folder, uri=store, experiment="ours")
    assert found(folder, store).info.status == "RUNNING"
    tracker.evaluated(0, {"reward/mean": 0.25})
    tracker.step_finished(1, {"loss": 1.5, "reward/mean": 0.5})
    tracker.step_finished(2, {"loss": 1.25, "reward/mean": math.nan})
    tracker.evaluated(2, {"reward/mean": 0.75})
    tracker.run_finished({"status": "done"}, None)
    run = found(folder, store)
    assert run.data.params == FLAT
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-7")
    assert run.data.tags["rlhf.directory"] == str(folder) and run.data.tags["rlhf.algo"] == "tempered"
    assert MlflowClient(store).get_experiment(run.info.experiment_id).name == "ours"
    assert points(folder, store, "loss") == [(1, 1.5), (2, 1.25)]
    assert points(folder, store, "reward/mean") == [(1, 0.5)]  # what is no number has no point
    assert points(folder, store, "heldout/reward/mean") == [(0, 0.25), (2, 0.75)]


@pytest.mark.parametrize(("status", "theirs"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_how_a_run_ended(tmp_path: Path, store: str, status: str, theirs: str) -> None:
    started(tmp_path / "run", uri=store).run_finished({"status": status}, RuntimeError("broke"))
    assert found(tmp_path / "run", store).info.status == theirs


def test_a_resumed_run_goes_on_and_logs_no_step_twice(tmp_path: Path, store: str) -> None:
    folder = tmp_path / "run"
    tracker = started(folder, uri=store)
    for step in (1, 2, 3):
        tracker.step_finished(step, {"loss": float(step)})
    tracker.evaluated(2, {"loss": 9.0})
    first = found(folder, store).info.run_id
    tracker.run_finished({"status": "interrupted"}, None)
    again = started(folder, first_step=2, uri=store)  # the checkpoint was before step 3
    assert found(folder, store).info.run_id == first and found(folder, store).info.status == "RUNNING"
    for step in (3, 4):
        again.step_finished(step, {"loss": 10.0 * step})
    again.evaluated(4, {"loss": 8.0})
    assert points(folder, store, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert points(folder, store, "heldout/loss") == [(2, 9.0), (4, 8.0)]


def test_a_run_that_starts_over_is_another_and_the_first_is_over(tmp_path: Path, store: str) -> None:
    folder = tmp_path / "run"
    started(folder, uri=store).step_finished(1, {"loss": 1.0})
    first = found(folder, store).info.run_id
    started(folder, uri=store).step_finished(1, {"loss": 2.0})
    assert found(folder, store).info.run_id != first
    assert points(folder, store, "loss") == [(1, 2.0)]
    assert MlflowClient(store).get_run(first).info.status == "KILLED"


def test_another_store_gets_a_run_of_its_own(tmp_path: Path, store: str) -> None:
    folder, other = tmp_path / "run", f"sqlite:///{tmp_path / 'other.db'}"
    started(folder, uri=store).step_finished(1, {"loss": 1.0})
    started(folder, first_step=1, uri=other).step_finished(2, {"loss": 2.0})
    assert points(folder, other, "loss") == [(2, 2.0)]


def test_without_an_address_it_is_a_file_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    started(tmp_path / "runs" / "one").step_finished(1, {"loss": 1.0})
    assert points(tmp_path / "runs" / "one", f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", "loss") == [(1, 1.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # nothing where the user stands
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mlflow.db", "one"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    started(tmp_path / "runs" / "two")
    assert found(tmp_path / "runs" / "two", f"sqlite:///{tmp_path / 'mine.db'}").info.run_name == "two"


def test_a_server_that_is_not_there_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
        started(tmp_path / "run", uri="http://127.0.0.1:9", retries=0)


def test_names_that_mlflow_refuses_are_made_legal(tmp_path: Path, store: str) -> None:
    assert legal("reward/a+b (x)") == "reward/a_b _x_"
    tracker = started(tmp_path / "run", uri=store)
    tracker.step_finished(1, {"reward/a+b": 1.0})
    assert points(tmp_path / "run", store, "reward/a_b") == [(1, 1.0)]


def test_the_manifest_says_what_to_install() -> None:
    (entry,) = rlhf_trackers()
    assert set(entry.modules) == {"mlflow", "sqlalchemy", "alembic"}
    assert all("mlflow-skinny" in hint for hint in entry.modules.values())
