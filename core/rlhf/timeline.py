"""Where a step's seconds go: to one phase each, so that they add up to the step.

    time/step = time/rollout + time/reward + time/experience + time/update + time/sync + time/communication + time/other

Communication, which is waiting for other ranks too, is taken out of the phase that it happens in; what a backend moves
while it computes can't be told apart and stays there. A step begins where the one before it ended, so that what it left
to do (writing its metrics, trackers) is the next one's `other`. Evaluation, checkpoints and measuring the machine are
of no step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.world import World

PHASES = ("rollout", "reward", "experience", "update", "sync")
"""In their order in a step."""
PARTS = (*PHASES, "communication", "other")
"""All that a step is made of."""


class Timeline:
    """The step at work."""

    def __init__(
        self,
        world: World,
        now: Callable[[], float] = time.perf_counter,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            wait: for the device to have done what was asked of it: a phase ends with its work.
        """
        self._world, self._now, self._wait = world, now, wait
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._begun, self._met = self._now(), self._world.seconds

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """While it lasts, the step is in this phase; phases don't lie in one another."""
        start, met = self._now(), self._world.seconds
        try:
            yield
        finally:
            self._wait()
            self._phases[phase] += self._now() - start - (self._world.seconds - met)

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """While it lasts, no step is at work."""
        start, met = self._now(), self._world.seconds
        try:
            yield
        finally:
            self._begun += self._now() - start
            self._met += self._world.seconds - met

    def finish(self) -> dict[str, float]:
        """The step's seconds: "step" and its parts. The next one begins."""
        seconds, communication = self._now() - self._begun, self._world.seconds - self._met
        parts = {**self._phases, "communication": communication}
        other = max(0.0, seconds - sum(parts.values()))
        self.start()
        return {**parts, "other": other, "step": seconds}
