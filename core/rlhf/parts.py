"""Everything a run works with, and the state of it that a checkpoint holds."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from rlhf.data import Feed
from rlhf.errors import Problem, RequestError
from rlhf.floor import Ledger
from rlhf.interfaces import Algorithm, Backend, Context, MemoryStrategy, OptimizerStrategy, State, Tracker
from rlhf.mixture import Mixture
from rlhf.models import Models
from rlhf.offline import OfflineData
from rlhf.plan import Plan
from rlhf.rollouts import Sampler
from rlhf.scoring import Scorer

Say = Callable[[str], None]


@attrs.define
class Parts:
    """Everything a run works with, built by `rlhf.assemble`."""

    plan: Plan
    context: Context
    models: Models
    backend: Backend
    algorithm: Algorithm
    optimizer: OptimizerStrategy
    score: Scorer
    """Without gradient."""
    ledger: Ledger
    feed: Feed
    trackers: list[Tracker]
    sampler: Sampler | None = None
    prompts: list[tuple[Any, torch.Tensor]] = attrs.Factory(list)
    """Online: rows with the tokens of their prompts."""
    heldout_prompts: list[tuple[Any, torch.Tensor]] = attrs.Factory(list)
    data: OfflineData | None = None
    heldout_data: OfflineData | None = None
    mixture: Mixture | None = None
    """Online: what is learnt beside."""
    last: int | None = None
    """Where the data ends for a run that goes by epochs: positions of items."""

    def hold_out(self, most: int | None) -> None:
        """Evaluate at most so many of the rows that are held out."""
        self.heldout_prompts = self.heldout_prompts[:most]
        if self.heldout_data is not None:
            self.heldout_data.items = self.heldout_data.items[:most]

    def close(self) -> None:
        """Free what components hold outside this process."""
        if self.sampler is not None:
            self.sampler.engine.close()
            for source in self.sampler.sources:
                source.reward.close()
        self.backend.close()

    @functools.cached_property
    def digest(self) -> str:
        """Of the data: prompts as encoded and what rewards see of their rows, or examples. A run goes on only with what
        it began with, since rows are known by number."""
        if self.data is not None:
            return self.data.digest()
        found = hashlib.sha256((self.mixture.digest() if self.mixture is not None else "").encode())
        for row, tokens in self.prompts:
            extra = json.dumps(row.extra, sort_keys=True, default=str)
            found.update(tokens.numpy().tobytes() + b"/" + extra.encode() + b"/")
        return found.hexdigest()


def component_states(parts: Parts) -> State:
    """What every component keeps between steps, by part; `restore` takes it back."""
    return {
        "backend": parts.backend.state(),
        "algorithm": parts.algorithm.state(),
        "optimizer": parts.optimizer.state(),
        "policy": parts.models.policy.state(),
        "followers": parts.models.followers.state(),
        "memory": {
            module: {key: s.state() for key, s in _keyed(parts.plan, module, strategies)}
            for module, strategies in parts.models.strategies.items()
        },
        "engine": parts.sampler.engine.state() if parts.sampler else {},
        "rewards": {s.name: s.reward.state() for s in parts.sampler.sources} if parts.sampler else {},
    }


def check_data(parts: Parts, state: Mapping[str, Any]) -> None:
    """Rows are known by number, so a run goes on only with those it began with.

    Raises:
        RequestError: there are others.
    """
    if state["digest"] != parts.digest:
        fix = "give it the data it began with, or start another run"
        flags = "--data" if parts.mixture is None else "--data or --ptx-data"
        raise RequestError(Problem(f"{flags} holds other rows than the run began with", fix))


def restore(parts: Parts, state: Mapping[str, Any]) -> None:
    """Give every component the state that a checkpoint holds."""
    parts.backend.load_state(state["backend"])
    parts.algorithm.load_state(state["algorithm"])
    parts.optimizer.load_state(state["optimizer"])
    parts.models.policy.load_state(state["policy"])
    parts.models.followers.load_state(state.get("followers", {}))
    for module, strategies in parts.models.strategies.items():
        for key, strategy in _keyed(parts.plan, module, strategies):
            if key in state["memory"][module]:  # what spreads weights may be another now, and keeps nothing
                strategy.load_state(state["memory"][module][key])
    if parts.sampler:
        parts.sampler.engine.load_state(state["engine"])
        for source in parts.sampler.sources:
            source.reward.load_state(state["rewards"][source.name])


def reseed(seed: int) -> None:
    """Seed every generator that a component may draw from, so that a step's draws depend on the step alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _keyed(plan: Plan, module: str, strategies: Sequence[MemoryStrategy]) -> Iterator[tuple[str, MemoryStrategy]]:
    return zip((component.key for component in plan.role(module).mem), strategies, strict=True)
