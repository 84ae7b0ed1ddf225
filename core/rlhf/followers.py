"""Frozen weights that run after trained ones: target heads, references that are renewed. See `rlhf.entries.Follows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rlhf.entries import Follows
from rlhf.errors import Problem, RequestError

if TYPE_CHECKING:
    from rlhf.interfaces import State


class Followers:
    """All of a run's."""

    def __init__(self) -> None:
        self._steps = 0
        self._pairs: dict[str, tuple[Follows, dict[str, tuple[nn.Parameter, nn.Parameter]]]] = {}

    def add(self, role: str, follows: Follows, own: nn.Module, other: nn.Module, *, copy: bool) -> None:
        """
        Args:
            copy: it begins as the other is.

        Raises:
            RequestError: their weights aren't alike.
        """
        mine, theirs = (dict(module.named_parameters()) for module in (own, other))
        if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
            what = f"role {role} follows {follows.role}, which is another model: weights of other names or shapes"
            raise RequestError(Problem(what, f"let it start from the same: leave --model {role}=... out"))
        self._pairs[role] = (follows, {name: (mine[name], theirs[name]) for name in mine})
        if copy:
            own.load_state_dict(other.state_dict())

    def stepped(self) -> None:
        """An optimiser step has changed the trained weights."""
        self._steps += 1
        for follows, pairs in self._pairs.values():
            if self._steps % follows.every == 0:
                for own, other in pairs.values():
                    step = other.data.to(own.device, own.dtype)
                    own.data.lerp_(step, follows.rate)  # at 1 exactly the other's

    def state(self) -> State:
        weights = {
            role: {name: own.data for name, (own, _) in pairs.items()} for role, (_, pairs) in self._pairs.items()
        }
        return {"steps": self._steps, "weights": weights} if weights else {}

    def load_state(self, state: State) -> None:
        self._steps = state.get("steps", 0)
        for role, weights in state.get("weights", {}).items():
            for name, weight in weights.items():
                self._pairs[role][1][name][0].data.copy_(weight)
