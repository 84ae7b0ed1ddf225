"""A run in MLflow: its options as parameters, a line of `metrics.jsonl` as metrics, held-out scores under `heldout/`.

Without a server nothing leaves this machine: the store is a SQLite file, and MLflow's own usage statistics are off.

    rlhf run --algo ppo --track mlflow
    mlflow ui --backend-store-uri sqlite:///runs/mlflow.db        (of the full `mlflow`)

A resumed run goes on in the MLflow run that it began, whose id is kept in RUN/mlflow.json. What that one had logged
beyond the checkpoint stays and isn't logged again: MLflow can't take metrics back, and two points of one step would
make curves double. Models and samples stay in the run's directory, which is the tag `rlhf.directory`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from rlhf.api import Tracker
from rlhf_mlflow import MLflowConfig

HELDOUT = "heldout/"
FILE = "mlflow.json"
_ILLEGAL = re.compile(r"[^\w.\- :/]")
_STATUS = {"done": "FINISHED", "interrupted": "KILLED"}
"""Ours -> MLflow's; anything else has failed."""
_LONGEST, _MOST = 6000, 100  # characters of a parameter, parameters a request: MLflow's limits


class MLflow(Tracker):
    """See the module. Whatever MLflow raises is the core's to report: the run goes on without this tracker."""

    config: MLflowConfig

    def run_started(self, run: Mapping[str, Any]) -> None:
        directory = Path(run["directory"]).absolute()
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(self.config.retries))
        beside = f"sqlite:///{directory.parent / 'mlflow.db'}"
        uri = self.config.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside
        store = hashlib.sha256(uri.encode()).hexdigest()  # a URI may hold a password
        self._client = MlflowClient(uri)
        self._logged: dict[str, int] = {}
        kept = directory / FILE
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if before.get("store") == store and run["first_step"]:
            self._run: str = before["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            self._logged = self._last_steps()
            return
        if before.get("store") == store:  # it was killed before its first checkpoint, and this is another start
            self._client.set_terminated(before["run_id"], "KILLED")
        plan, recipe = run["plan"], (directory / "recipe.yaml").read_text(encoding="utf-8")
        tags = {"rlhf.directory": str(directory), "rlhf.algo": plan.algo.name, "mlflow.source.name": "rlhf"}
        made = self._client.create_run(self._experiment(directory), run_name=directory.name, tags=tags)
        self._run = made.info.run_id
        kept.write_text(json.dumps({"store": store, "run_id": self._run}), encoding="utf-8")
        parameters = [Param(legal(key), value[:_LONGEST]) for key, value in flatten(yaml.safe_load(recipe))]
        for at in range(0, len(parameters), _MOST):
            self._client.log_batch(self._run, params=parameters[at : at + _MOST])

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log("", step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(HELDOUT, step, metrics)

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        self._client.set_terminated(self._run, _STATUS.get(str(summary["status"]), "FAILED"))

    def _log(self, prefix: str, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        named = {legal(prefix + name): value for name, value in metrics.items()}
        # A server that stores infinity as the largest double would draw it: such a step has no point.
        wanted = {key: v for key, v in named.items() if math.isfinite(v) and step > self._logged.get(key, -1)}
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in wanted.items()])

    def _last_steps(self) -> dict[str, int]:
        """The last step that each metric has."""
        keys = self._client.get_run(self._run).data.metrics
        return {key: max(point.step for point in self._client.get_metric_history(self._run, key)) for key in keys}

    def _experiment(self, directory: Path) -> str:
        """Its id."""
        name = self.config.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, str(directory.parent / "mlflow-artifacts")))
            except MlflowException:  # another run of ours has made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def legal(key: str) -> str:
    """A name as MLflow takes it: letters, digits, and _ - . : / and spaces."""
    return _ILLEGAL.sub("_", key)


def flatten(recipe: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """A recipe as flat names and texts, as the command line writes them: `algo` ppo, `algo.clip_range` 0.2,
    `reward.math.weight` 1.0. An option that is null is left out."""
    if isinstance(recipe, Mapping):
        for name, value in recipe.items():
            yield from flatten(value, key if key and name == "name" else f"{key}.{name}".lstrip("."))
    elif isinstance(recipe, list) and recipe and all(isinstance(item, Mapping) for item in recipe):
        for item in recipe:
            yield from flatten(item, f"{key}.{item.get('label') or item.get('name')}")
    elif isinstance(recipe, list):
        yield key, ", ".join(map(str, recipe))
    elif recipe is not None:
        yield key, str(recipe)
