"""Roles are logical, modules are physical: builds the modules a plan asks for, and serves forwards by role."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from rlhf.data import derive
from rlhf.floor import Ledger, ModelShape
from rlhf.interfaces import (
    Backend,
    Context,
    Engine,
    HeadRequest,
    LoadSpec,
    MemoryStrategy,
    OptimizerStrategy,
    Policy,
    TrainedParameter,
)
from rlhf.plan import Plan, RolePlan
from rlhf.registry import resolve
from rlhf.sequences import Experience, Rollouts, ScoreRequest, Scores, Sequences, join_scores


class Container(nn.Module):
    """Modules and heads behind a single forward. The trainable ones share one, which the backend wraps."""

    def __init__(self, policy: Policy, plans: Mapping[str, RolePlan]) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._policy = policy
        self._plans = plans

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Roles that share a module and sequences share one forward of it."""
        together: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(requests):
            together.setdefault((self._plans[request.role].module, id(request.sequences)), []).append(i)
        found: dict[int, Scores] = {}
        for (module, _), members in together.items():
            heads = [self._head(requests[i]) for i in members]
            scores = self._policy.score(self.bodies[module], requests[members[0]].sequences, heads)
            found.update(zip(members, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def _head(self, request: ScoreRequest) -> HeadRequest:
        own = self.heads[request.role] if request.role in self.heads else None
        head = self._plans[request.role].role.head
        return HeadRequest(request.role, head, own, request.temperature, request.entropy)


@attrs.define
class Models:
    """Every model of a run, behind one forward by role."""

    plan: Plan
    policy: Policy
    backend: Backend
    trained: Container
    frozen: Container
    specs: dict[str, LoadSpec]
    """By module."""
    strategies: dict[str, list[MemoryStrategy]]
    """By module, in the order they acted."""
    _shapes: dict[str, ModelShape | None] = attrs.field(factory=dict, init=False)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Scores by role: trained roles in one forward of the backend's container."""
        found: dict[int, Scores] = {}
        trained: list[int] = []
        for i, request in enumerate(requests):
            role = self.plan.role(request.role)
            if role.view == "adapters-off":
                with torch.no_grad(), self._adapters_off(role.module):
                    found[i] = self.trained([request])[0]
            elif role.module in self.trained.bodies:
                trained.append(i)
            else:
                with torch.no_grad():
                    found[i] = self.frozen([request])[0]
        if trained:
            scores = self.backend.forward([requests[i] for i in trained])
            found.update(zip(trained, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def shape(self, role: str) -> tuple[str, ModelShape | None, bool, bool]:
        """For the ledger: a role's module, its shape, whether the role reads the vocabulary head, whether adapters are
        on."""
        plan = self.plan.role(role)
        if plan.module not in self._shapes:
            self._shapes[plan.module] = self.policy.shape(self.body(plan.module))
        return plan.module, self._shapes[plan.module], plan.role.head == "lm", plan.view != "adapters-off"

    def body(self, module: str) -> nn.Module:
        return self.trained.bodies[module] if module in self.trained.bodies else self.frozen.bodies[module]

    def _adapters_off(self, module: str) -> contextlib.AbstractContextManager[Any]:
        for strategy in self.strategies[module]:
            context = strategy.adapters_off(self.body(module))
            if context is not None:
                return context
        raise LookupError(f"no memory strategy of {module!r} can turn its adapters off")

    def save(self, folder: Path) -> None:
        """Write every trained role: the policy into `folder`, each other one into a folder of its name below."""
        for name in self.trained.bodies:
            self.policy.save(self.body(name), folder if name == "policy" else folder / name, self.specs[name])


def build(plan: Plan, policy: Policy, backend: Backend, optimizer: OptimizerStrategy, context: Context) -> Models:
    """Load, adapt and wrap every module of the plan, and hand the trained ones to the backend.

    Raises:
        RequestError: a model can't be had, or a memory strategy doesn't fit it.
    """
    plans = {role.name: role for role in plan.roles}
    models = Models(plan, policy, backend, Container(policy, plans), Container(policy, plans), {}, {})
    parameters: list[TrainedParameter] = []
    for role in plan.roles:
        seed = derive(plan.run.seed, "init", role.name)
        if role.view == "own":
            module, spec = _load(role, policy, context, backend.device, seed, models)
            container = models.trained if role.role.trainable else models.frozen
            container.bodies[role.name] = module
            models.specs[role.name] = spec
            if not role.role.trainable:
                module.requires_grad_(False)
        elif role.view == "trunk":
            head = policy.add_scalar_head(models.body(role.module), role.name, role.role.head_init, seed)
            models.trained.heads[role.name] = head
    for name, parameter in models.trained.named_parameters():
        if parameter.requires_grad:
            owner = name.split(".")[1]
            rate = plans[owner].role.learning_rate
            parameters.append(TrainedParameter(name, parameter, owner, rate))
    backend.prepare(models.trained, parameters, optimizer)
    return models


def _load(
    role: RolePlan, policy: Policy, context: Context, device: str, seed: int, models: Models
) -> tuple[nn.Module, LoadSpec]:
    spec = LoadSpec(
        role=role.name,
        model=role.model.path,
        head=role.role.head,
        trainable=role.role.trainable,
        head_init=role.role.head_init,
        device=device,
        trust_remote_code=context.plan.run.trust_remote_code,
        seed=seed,
    )
    strategies: list[MemoryStrategy] = [resolve(c)(c.config, context) for c in role.mem]
    for strategy in strategies:
        spec = strategy.load(spec)
    module = policy.load(spec)
    for strategy in strategies:
        module = strategy.adapt(module, spec)
    for strategy in strategies:
        module = strategy.wrap(module, spec)
    models.strategies[role.name] = strategies
    return module, spec


class Scorer:
    """The forward handed to algorithms: see `rlhf.interfaces.Score`."""

    def __init__(
        self,
        models: Models,
        budget: int,
        engine: Engine | None = None,
        gradient: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        self._models = models
        self._budget = budget
        self._engine = engine
        self._gradient = gradient
        self._ledger = ledger
        self.asked: set[str] = set()
        """Roles that were asked for, where there is a gradient: those that an optimiser step is of."""

    def __call__(self, of: Rollouts | Experience | Sequences, role: str, *, entropy: bool = False) -> Scores:
        return self.together(of, role, entropy=entropy)[0]

    def together(self, of: Rollouts | Experience | Sequences, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        sequences = of if isinstance(of, Sequences) else of.sequences
        temperature = 1.0 if isinstance(of, Sequences) else of.temperature

        def forward(part: Sequences) -> list[Scores]:
            return self._models.forward([ScoreRequest(role, part, temperature, entropy) for role in roles])

        if self._gradient:
            self.asked.update(roles)
            return tuple(forward(sequences))
        if self._ledger is not None:
            self._ledger.scored(sequences, roles)
        with torch.no_grad():
            parts = [(rows, forward(sequences.select(rows))) for rows in cut(sequences, self._budget)]
        return tuple(join_scores([(rows, scores[i]) for rows, scores in parts], sequences) for i in range(len(roles)))

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        """The engine's log-probs where they are exact; else one more forward of the policy, before it is changed."""
        engine = self._engine
        if engine is not None and engine.logprobs.exact and rollouts.logp is not None:
            return rollouts.logp
        return self(rollouts, "policy").logp


def cut(sequences: Sequences, budget: int, keep_groups: bool = False) -> Iterator[Tensor]:
    """Cut sequences into micro-batches of at most `budget` padded tokens (one unit at least), alike in length so that
    little is padded, a group's members side by side so that its prompt is shared.

    Yields row numbers, int64. How it cuts changes speed, not results: means divide by the step's totals.
    """
    lengths = sequences.total_lengths()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(sequences.group.tolist()):
        groups.setdefault(group, []).append(row)
    ordered = sorted(groups.values(), key=lambda rows: (max(lengths[row] for row in rows), rows[0]))
    units = ordered if keep_groups else [[row] for rows in ordered for row in rows]
    taken: list[int] = []
    longest = 0
    for unit in units:
        longest_then = max(longest, *(lengths[row] for row in unit))
        if taken and longest_then * (len(taken) + len(unit)) > budget:
            yield torch.tensor(taken, dtype=torch.long)
            taken, longest_then = [], max(lengths[row] for row in unit)
        taken, longest = taken + unit, longest_then
    if taken:
        yield torch.tensor(taken, dtype=torch.long)


def weight_stream(models: Models, module: str) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """What an engine calls to be given new weights."""
    return lambda: models.backend.weights(module)
