"""The contract of trackers: `TrackerContract`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.interfaces import Tracker
    from rlhf.parts import Parts
    from rlhf.testing.kit import Done, Kit

_ONLINE, _OFFLINE = parts.REINFORCE, parts.IMITATE


class TrackerContract(Contract):
    """What a tracker must keep: it takes whatever a run tells, and changes nothing of it.

    class TestTrackio(TrackerContract):
        name = "trackio"
        options = {"mode": "offline"}
    """

    kind = "track"

    def base(self, kit: Kit) -> dict[str, Any]:
        return self._recipe(kit, _OFFLINE)

    def _recipe(self, kit: Kit, algorithm: str) -> dict[str, Any]:
        data = str(kit.once("data", kit.data))
        engine = {"reward": parts.REWARD, "engine": {"max_new_tokens": 4}} if algorithm == _ONLINE else {}
        return {"algo": algorithm, "data": data, "eval_data": data, "eval_rows": 4, "save_every": 2, **engine}

    def tracker(self, kit: Kit, folder: Path) -> tuple[Tracker, dict[str, Any]]:
        """One that has been told nothing yet, and what `run_started` tells of the run of a folder."""
        from rlhf.assemble import make
        from rlhf.component import Context

        plan = self.plan(kit)
        made: Tracker = make(self.component(plan), Context(plan=plan))
        run = {"directory": str(folder), "shown": str(folder), "plan": plan, "steps": 4, "first_step": 0}
        return made, {**run, "notes": ["a note"]}

    def heard(self, kit: Kit, algorithm: str) -> Done:
        """A run that it hears of, made once."""

        def run() -> Done:
            folder = kit.fresh("tracked")
            done = kit.work(self.plan(kit, **self._recipe(kit, algorithm), max_steps=4), folder).go()
            kit.found["folder", self.name, repr(self.options), repr(self.recipe)] = folder
            return done

        found: Done = kit.once((self.name, repr(self.options), repr(self.recipe), algorithm), run)
        return found

    def folder(self, kit: Kit) -> Path:
        """Of a run that it has heard of."""
        self.heard(kit, _OFFLINE)
        found: Path = kit.found["folder", self.name, repr(self.options), repr(self.recipe)]
        return found

    # The terms

    def test_it_hears_of_an_online_run(self, rlhf_kit: Kit) -> None:
        """Rollouts, steps, evaluations, checkpoints, the end."""
        _kept(self.heard(rlhf_kit, _ONLINE).said)

    def test_it_hears_of_an_offline_run(self, rlhf_kit: Kit) -> None:
        """Which has no rollouts."""
        _kept(self.heard(rlhf_kit, _OFFLINE).said)

    def test_it_hears_of_a_run_that_is_resumed(self, rlhf_kit: Kit) -> None:
        folder = rlhf_kit.fresh("resumed")
        plan = self.plan(rlhf_kit, max_steps=4)
        rlhf_kit.work(plan, folder).go(stop_after=2)
        _kept(rlhf_kit.work(plan, folder).go(resume=True).said)

    def test_the_run_stays_as_it_is(self, rlhf_kit: Kit) -> None:
        """To the bit: it draws no random numbers of the run's, and changes no rollouts."""

        def alone(parts: Parts) -> None:
            parts.trackers = []

        for algorithm in (_ONLINE, _OFFLINE):
            plan = self.plan(rlhf_kit, **self._recipe(rlhf_kit, algorithm), max_steps=4)
            without = rlhf_kit.work(plan, change=alone).go()
            same = self.heard(rlhf_kit, algorithm).metrics == without.metrics
            require(same, "with it, a run's numbers are others than without it: it must only listen")

    def test_what_it_hears_stays_as_it_is(self, rlhf_kit: Kit) -> None:
        """Other trackers are told the same metrics after it."""
        tracker, run = self.tracker(rlhf_kit, self.folder(rlhf_kit))
        metrics = {"loss": 1.0, "reward/mean": 0.5}
        told = dict(run)
        tracker.run_started(run)
        tracker.step_finished(1, metrics)
        tracker.evaluated(1, metrics)
        tracker.run_finished({"status": "done", "steps": 1}, None)
        require(metrics == {"loss": 1.0, "reward/mean": 0.5}, f"it changes the metrics that it is told: {metrics}")
        require(run == told, "it changes what `run_started` tells it")

    def test_odd_numbers_and_names(self, rlhf_kit: Kit) -> None:
        """A metric may be NaN or infinite, come in any step, or stay away."""
        tracker, run = self.tracker(rlhf_kit, self.folder(rlhf_kit))
        odd = {"loss": math.nan, "a/b/c d": math.inf, "optim/updates": 0.0}
        for event, arguments in (
            ("run_started", (run,)),
            ("step_finished", (1, odd)),
            ("step_finished", (2, {})),
            ("evaluated", (2, {"loss": -math.inf})),
        ):
            self._tell(tracker, event, *arguments)
        self._tell(tracker, "run_finished", {"status": "done", "steps": 2}, None)

    def test_a_run_that_fails(self, rlhf_kit: Kit) -> None:
        """It ends with what went wrong, perhaps before the first step."""
        for steps in (0, 1):
            tracker, run = self.tracker(rlhf_kit, self.folder(rlhf_kit))
            self._tell(tracker, "run_started", run)
            if steps:
                self._tell(tracker, "step_finished", 1, {"loss": 1.0})
            summary = {"status": "failed", "steps": steps, "error": "ValueError: no"}
            self._tell(tracker, "run_finished", summary, ValueError("no"))

    def _tell(self, tracker: Tracker, event: str, *arguments: Any) -> None:
        try:
            getattr(tracker, event)(*arguments)
        except Exception as error:
            broken(f"told {event}{arguments[:2]}, it raises {type(error).__name__}: {error}, and is dropped")


def _kept(said: list[str]) -> None:
    """It was not dropped."""
    dropped = [line for line in said if line.startswith("tracker ")]
    require(not dropped, f"a run drops it: {'; '.join(dropped)}")
