"""What all components are, and launchers, which start processes and so have no need of torch. The other kinds are in
`rlhf.interfaces`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from rlhf.interfaces import Policy
    from rlhf.metrics import MetricSink
    from rlhf.plan import Plan
    from rlhf.world import World

State = dict[str, Any]
"""Nested dicts and lists of JSON values and tensors; of what is spread over ranks, `rlhf.checkpoint.Piece`s."""


def _alone() -> World:
    from rlhf.world import World

    return World()


def _sink() -> MetricSink:
    from rlhf.metrics import MetricSink

    return MetricSink()


def _unheard(text: str) -> None:
    """Where nobody listens."""


@attrs.define
class Context:
    """What a component may know of its run."""

    plan: Plan
    seed: int = 0
    device: str = "cpu"
    world: World = attrs.Factory(_alone)
    metrics: MetricSink = attrs.Factory(_sink)
    policy: Policy | None = None
    """Set for components made after the policy: engines, rewards, algorithms."""
    say: Callable[[str], None] = _unheard
    """Tells the user something, as an engine that was started again. Of several ranks rank 0 alone is heard."""
    label: str = ""
    """The component's own key in the plan; for a labelled reward its label."""


class Component:
    """What every component has."""

    def __init__(self, config: Any, context: Context) -> None:
        self.config = config
        self.context = context

    def state(self) -> State:
        """Everything it keeps between steps, for checkpoints. Called on every rank, and rank 0's is kept: what differs
        between ranks must be reduced through `context.world` first, or be a `Piece` of a tensor that is spread."""
        return {}

    def load_state(self, state: State) -> None:
        """Take back what `state` gave, on every rank, perhaps of another number; a `Piece` comes back as a `Spread`,
        of which a rank reads its own range."""


class Launcher(Component):
    """Starts the run's processes. The core calls `launch` in the process the user started, unless that one is a rank
    already (`rlhf.place`: under torchrun or Slurm)."""

    def launch(self, run: Callable[[], int], command: Sequence[str]) -> int:
        """Carry out every rank; returns the exit code.

        Args:
            run: carries out a single rank in this process.
            command: carries out one rank in a process of its own, on this machine, where RANK, WORLD_SIZE, LOCAL_RANK,
                LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which. What ends it badly is written to the file that
                RLHF_REPORT names: see `rlhf.rank.Report`.
        """
        return run()
