"""A step's seconds: each in one phase, and all of them in the step."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from built import parts_of
from rlhf.loop import Loop
from rlhf.rundir import RunDirectory
from rlhf.timeline import PARTS, Timeline
from rlhf.world import World


class Clock:
    """A clock that is set by hand, and a world whose meetings take as long as is said."""

    def __init__(self) -> None:
        self.time = 100.0
        self.world = World()
        self.timeline = Timeline(self.world, lambda: self.time)

    def work(self, seconds: float) -> None:
        self.time += seconds

    def meet(self, seconds: float) -> None:
        self.time += seconds
        self.world.seconds += seconds


def test_each_second_is_of_one_phase_and_they_add_up() -> None:
    clock = Clock()
    timeline = clock.timeline
    clock.work(1)  # before any phase
    with timeline("rollout"):
        clock.work(10)
        clock.meet(2)
    with timeline("reward"):
        clock.work(3)
    clock.meet(4)  # between phases
    with timeline("experience"):
        clock.work(5)
    for _ in range(2):
        with timeline("update"):
            clock.work(20)
            clock.meet(1)
    with timeline("sync"):
        clock.work(6)
    clock.work(0.5)
    assert timeline.finish() == {
        "rollout": 10, "reward": 3, "experience": 5, "update": 40, "sync": 6, "communication": 8, "other": 1.5,
        "step": 73.5,
    }  # fmt: skip


def test_a_step_begins_where_the_one_before_ended_and_nothing_outside_is_of_it() -> None:
    clock = Clock()
    timeline = clock.timeline
    with timeline("update"):
        clock.work(1)
    timeline.finish()
    clock.work(0.25)  # writing the metrics of the step before
    with timeline.outside():  # a checkpoint
        clock.work(30)
        clock.meet(40)
    with timeline("update"):
        clock.work(2)
        clock.meet(3)
    found = timeline.finish()
    assert {part: taken for part, taken in found.items() if taken} == {
        "update": 2, "communication": 3, "other": 0.25, "step": 5.25,
    }  # fmt: skip
    clock.work(7)
    timeline.start()
    assert not any(timeline.finish().values())


def test_a_phase_that_breaks_is_counted_and_a_phase_waits_for_its_device() -> None:
    clock = Clock()
    timeline = Timeline(clock.world, lambda: clock.time, wait=lambda: clock.work(2))
    with pytest.raises(ZeroDivisionError), timeline("reward"):
        clock.work(1)
        _ = 1 / 0
    assert timeline.finish()["reward"] == 3


def test_a_real_runs_phases_add_up_to_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the wall, from one line of metrics to the next: within 2%, and the six phases alone too. After steps 1, 2 and
    4 the machine is measured, some .3 s that are of no step."""
    parts = parts_of(algo={"name": "ppo", "epochs": 2}, max_steps=5, batch_size=64, save_every=100, track="none")
    directory = RunDirectory(tmp_path)
    directory.open(parts.plan)
    written: list[float] = []
    log = directory.log_metrics
    monkeypatch.setattr(directory, "log_metrics", lambda *a: (written.append(time.perf_counter()), log(*a)))
    Loop(parts, directory, print).run(None)
    directory.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, (before, after) in zip(lines[1:], itertools.pairwise(written), strict=True):
        taken = {part: line[f"time/{part}"] for part in PARTS}
        assert all(seconds >= 0 for seconds in taken.values())
        assert sum(taken.values()) == pytest.approx(line["time/step"], rel=1e-9)
        wall, step = after - before, line["time/step"]
        if line["step"] in (2, 4):
            assert wall > step + 0.1  # two numbers at least, of .1 s of trying each
        else:
            assert step == pytest.approx(wall, rel=0.02)
    whole = sum(line["time/step"] for line in lines)
    six = sum(line[f"time/{part}"] for line in lines for part in PARTS if part != "other")
    assert 0.98 * whole <= six <= whole
    assert lines[0]["perf/floor_ratio"] == pytest.approx(lines[0]["time/step"] / lines[0]["perf/floor_seconds"])
