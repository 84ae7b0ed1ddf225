"""Runs at work, most in this process, of recipes on the built-in example, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from rlhf import facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.interfaces import Context, Reward, Score
from rlhf.loop import Loop, Parts, resume_from
from rlhf.plan import Plan
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rundir import RunDirectory
from rlhf.sequences import Rollouts

MACHINE_DEPENDENT = ("time/", "perf/", "memory/")


def wait_for_step(process: subprocess.Popen[bytes], output: Path, step: int) -> None:
    """Until the run of another process has logged this step."""
    log = output / "metrics.jsonl"
    while process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.005)


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
        return weights_of(self.parts)


def weights_of(parts: Parts) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parts.models.trained.named_parameters()}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """By step, without those that depend on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE_DEPENDENT)} for line in lines]


class Says(Reward):
    """A reward that is a function of the rollouts."""

    def __init__(self, judge: Callable[[Rollouts], Any]) -> None:
        super().__init__(None, Context(plan=cast(Plan, None)))
        self._judge = judge

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return self._judge(rollouts)
