"""Trackers, each with one error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from rlhf.api import Rollouts, Tracker


class NeedsRollouts(Tracker):
    """Counts on rollouts, which an offline run has none of."""

    last: Rollouts

    def rollout_finished(self, step: int, rollouts: Rollouts) -> None:
        self.last = rollouts

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        print(self.last.prompts[:1])


class Meddling(Tracker):
    """Renames metrics in place."""

    def step_finished(self, step: int, metrics: Any) -> None:
        for name in [name for name in metrics if "/" in name]:
            metrics[name.replace("/", ".")] = metrics.pop(name)


class Strict(Tracker):
    """Writes JSON, of which NaN is none."""

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        json.dumps(dict(metrics), allow_nan=False)


class Drawing(Tracker):
    """Draws which samples to show, with the run's own generator."""

    def rollout_finished(self, step: int, rollouts: Rollouts) -> None:
        torch.manual_seed(0)
        rollouts.rewards[torch.randint(len(rollouts), (1,))] = 0.0


class Late(Tracker):
    """Counts on a step before the end."""

    metrics: Mapping[str, float]

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        print(len(self.metrics))


class Fresh(Tracker):
    """Counts on steps from 1, which a resumed run has not."""

    seen = 0

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen += 1
        if step != self.seen:
            raise ValueError(f"step {step} after {self.seen - 1}")
