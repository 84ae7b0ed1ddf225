"""Roles are logical, modules are physical: builds the modules a plan asks for, and serves forwards by role."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from rlhf import allocator
from rlhf.data import derive
from rlhf.entries import Follows
from rlhf.errors import RunError
from rlhf.floor import BYTES, ModelShape
from rlhf.followers import Followers
from rlhf.interfaces import (
    Backend,
    Context,
    HeadRequest,
    LoadSpec,
    MemoryStrategy,
    OptimizerStrategy,
    Policy,
    TrainedParameter,
    Weights,
)
from rlhf.plan import Plan, RolePlan
from rlhf.registry import resolve
from rlhf.scores import LogitSource, ScoreRequest, Scores
from rlhf.sequences import Sequences


class Container(nn.Module):
    """Modules and heads behind a single forward. The trainable ones share one, which the backend wraps."""

    def __init__(
        self, policy: Policy, plans: Mapping[str, RolePlan], strategies: Mapping[str, Sequence[MemoryStrategy]]
    ) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._policy = policy
        self._plans = plans
        self._strategies = strategies
        self._shared = {plan.module for plan in plans.values() if plan.view == "adapter"}

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Roles that share a module, its adapters too, and sequences share one forward of it."""
        together: dict[tuple[str, str, int], list[int]] = {}
        for i, request in enumerate(requests):
            plan = self._plans[request.role]
            together.setdefault((plan.module, part_of(plan, self._plans), id(request.sequences)), []).append(i)
        found: dict[int, Scores] = {}
        for (module, part, _), members in together.items():
            heads = [self._head(requests[i]) for i in members]
            with self._as_role(module, part):
                scores = self._policy.score(self.bodies[module], requests[members[0]].sequences, heads)
            found.update(zip(members, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def _as_role(self, module: str, part: str) -> contextlib.AbstractContextManager[Any]:
        """Whose adapters are on is said for each forward and never kept between two: nothing depends on who was asked
        last, and a backward finds what its own forward used."""
        if module not in self._shared or not part:
            return contextlib.nullcontext()
        contexts = (strategy.as_role(self.bodies[module], part) for strategy in self._strategies[module])
        found = next((context for context in contexts if context is not None), None)
        if found is None:
            raise LookupError(f"no memory strategy of {module!r} keeps the adapters of its roles apart")
        return found

    def _head(self, request: ScoreRequest) -> HeadRequest:
        own = self.heads[request.role] if request.role in self.heads else None
        head = self._plans[request.role].role.head
        return HeadRequest(request.role, head, own, request.temperature, request.entropy, request.compare)


def part_of(plan: RolePlan, plans: Mapping[str, RolePlan]) -> str:
    """The role whose adapters are on in a forward of this one; empty where none are."""
    if plan.view == "adapters-off":
        return ""
    if plan.view == "trunk" and plan.role.shares is not None:
        return part_of(plans[plan.role.shares], plans)
    return plan.name


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
    """By role that chooses its own, in the order they acted."""
    joined: dict[str, str] = attrs.field(factory=dict, init=False)
    """Of modules that several roles share: name in `trained` -> the role whose part it is, other than the owner's."""
    followers: Followers = attrs.field(factory=Followers, init=False)
    _shapes: dict[str, ModelShape | None] = attrs.field(factory=dict, init=False)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Scores by role: trained roles in one forward of the backend's container."""
        found: dict[int, Scores] = {}
        trained: list[int] = []
        for i, request in enumerate(requests):
            role = self.plan.role(request.role)
            if role.view == "adapters-off":
                with torch.no_grad(), self._adapters_off(role.module):
                    found[i] = self.backend.forward([request])[0]
            elif role.view == "adapter" and not role.role.trainable:
                with torch.no_grad():
                    found[i] = self.backend.forward([request])[0]
            elif role.module in self.trained.bodies:
                trained.append(i)
            else:
                with torch.no_grad(), self.visiting([request.role]):
                    found[i] = self.frozen([request])[0]
        if trained:
            scores = self.backend.forward([requests[i] for i in trained])
            found.update(zip(trained, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def read(self, role: str, sequences: Sequences) -> LogitSource:
        """What a frozen role's logits are made from. Where its weights lie elsewhere, they come back for each use.

        Raises:
            RunError: it has no module of its own.
        """
        module = self.plan.role(role).module
        if module not in self.frozen.bodies:
            raise RunError(f"role {role!r} can't be compared with: it is no frozen model with a module of its own")
        with torch.no_grad(), self.visiting([role]):
            found = self.policy.read(self.frozen.bodies[module], sequences)

        def logits_of(states: Tensor) -> Tensor:
            with torch.no_grad(), self.visiting([role]):
                return found.logits_of(states)

        return LogitSource(found.states, logits_of)

    def shape(self, role: str) -> tuple[str, ModelShape | None, bool, bool]:
        """For the ledger: a role's module, its shape, whether the role reads the vocabulary head, whether adapters are
        on."""
        plan = self.plan.role(role)
        part = part_of(plan, {other.name: other for other in self.plan.roles}) or plan.module
        if part not in self._shapes:
            with self.visiting([role]):
                whole = self.policy.shape(self.body(plan.module))
            self._shapes[part] = whole if whole is None else self._without_others(whole, plan.module, part)
        return part, self._shapes[part], plan.role.head == "lm", plan.view != "adapters-off"

    def _without_others(self, shape: ModelShape, module: str, part: str) -> ModelShape:
        """A shared module's shape as one role uses it: without the adapters of the others."""
        for name, parameter in self.trained.named_parameters() if self.joined else ():
            inside = name.startswith(f"bodies.{module}.") and parameter.ndim > 1
            owner = self.joined.get(name) or (module if parameter.requires_grad else part)
            if inside and owner != part:
                count = parameter.numel()
                shape = attrs.evolve(
                    shape,
                    trunk=shape.trunk - count,
                    trunk_trained=shape.trunk_trained - (count if parameter.requires_grad else 0),
                    weight_bytes=shape.weight_bytes - count * BYTES[shape.dtype],
                )
        return shape

    @contextlib.contextmanager
    def visiting(self, roles: Iterable[str]) -> Iterator[None]:
        """While it lasts, the weights of these roles' modules are on the device: around many forwards, so that they
        come and go once."""
        with contextlib.ExitStack() as visits:
            for module in dict.fromkeys(self.plan.role(role).module for role in roles):
                for strategy in self.strategies[module]:
                    visit = strategy.visit(self.body(module))
                    if visit is not None:
                        visits.enter_context(visit)
            yield

    def stepped(self) -> None:
        """An optimiser step has changed the weights: tell the memory strategies, and move what follows them."""
        self.followers.stepped()
        for strategies in self.strategies.values():
            for strategy in strategies:
                strategy.stepped()

    @contextlib.contextmanager
    def standing_in(self, purpose: Literal["evaluate", "save"]) -> Iterator[bool]:
        """While it lasts, the trained weights are those to be evaluated, or saved; whether they are others than the
        optimiser's."""
        with contextlib.ExitStack() as held:
            found = [s.stand_in(purpose) for strategies in self.strategies.values() for s in strategies]
            others = [context for context in found if context is not None]
            for context in others:
                held.enter_context(context)
            yield bool(others)

    def apart(self, roles: Iterable[str]) -> bool:
        """Each is trained, and has a module that no other trained role reads: whatever is asked for together, it takes
        a forward of its own."""
        trained = [role for role in self.plan.roles if role.module in self.trained.bodies and role.role.trainable]
        alone = {r.name for r in trained if [other.module for other in trained].count(r.module) == 1}
        return all(role in alone for role in roles)

    @functools.cached_property
    def noisy(self) -> frozenset[str]:
        """Roles whose scores differ where gradients are recorded."""
        noisy = {
            module
            for module in self.trained.bodies
            if any(strategy.noisy(self.body(module)) for strategy in self.strategies[module])
        }
        return frozenset(role.name for role in self.plan.roles if role.module in noisy)

    def body(self, module: str) -> nn.Module:
        return self.trained.bodies[module] if module in self.trained.bodies else self.frozen.bodies[module]

    def _adapters_off(self, module: str) -> contextlib.AbstractContextManager[Any]:
        for strategy in self.strategies[module]:
            context = strategy.adapters_off(self.body(module))
            if context is not None:
                return context
        raise LookupError(f"no memory strategy of {module!r} can turn its adapters off")

    def save(self, folder: Path) -> None:
        """Write every trained role: the policy into `folder`, each other one into a folder of its name below. Called
        on every rank; rank 0 writes."""
        first = self.backend.world.rank == 0
        with self.standing_in("save"):
            for role in self.plan.roles:
                if not (role.role.trainable and role.chooses):
                    continue
                place = folder if role.name == "policy" else folder / role.name
                head = self.trained.heads[role.name] if role.name in self.trained.heads else None
                whole: dict[str, Tensor] | None = None
                if self.backend.sharded:
                    whole = {}
                    for key, tensor in self.backend.weights(role.module):  # every rank runs through, rank 0 keeps
                        if first:
                            whole[key] = tensor.detach().cpu()
                if first:
                    folded = self._folded(role)
                    more = {"folded": folded} if folded else {}
                    self.policy.save(self.body(role.module), place, self.specs[role.name], head, whole, **more)

    def _folded(self, owner: RolePlan) -> list[tuple[float, nn.Module]]:
        """Heads that a role's saved model takes in, each with its factor."""
        on_it = (role for role in self.plan.roles if role.view == "trunk" and role.module == owner.module)
        return [(role.role.folded, self.trained.heads[role.name]) for role in on_it if role.role.folded]


def build(plan: Plan, policy: Policy, backend: Backend, optimizer: OptimizerStrategy, context: Context) -> Models:
    """Load, adapt and wrap every module of the plan, and hand the trained ones to the backend.

    Raises:
        RequestError: a model can't be had, or a memory strategy doesn't fit it.
    """
    plans = {role.name: role for role in plan.roles}
    strategies: dict[str, list[MemoryStrategy]] = {}
    trained, frozen = (Container(policy, plans, strategies) for _ in range(2))
    models = Models(plan, policy, backend, trained, frozen, {}, strategies)
    for role in plan.roles:
        seed = derive(plan.run.seed, "init", role.name)
        if role.view == "own":
            module, spec = _load(role, policy, context, backend.device, seed, models)
            container = models.trained if role.role.trainable else models.frozen
            container.bodies[role.name] = module
            models.specs[role.name] = spec
            if not role.role.trainable:
                module.requires_grad_(False)
        elif role.view == "adapter":
            _join(role, context, seed, models)
        elif role.view == "trunk":
            make = policy.add_token_head if role.role.head == "tokens" else policy.add_scalar_head
            head = make(models.body(role.module), role.name, role.role.head_init, seed)
            models.trained.heads[role.name] = head.requires_grad_(role.role.follows is None)
        if role.role.follows is not None:
            _follow(role, role.role.follows, models)
    parameters: list[TrainedParameter] = []
    for name, parameter in models.trained.named_parameters():
        if parameter.requires_grad:
            owner = models.joined.get(name) or name.split(".")[1]
            rate = plans[owner].role.learning_rate
            parameters.append(TrainedParameter(name, parameter, owner, rate))
    for name in models.trained.bodies:
        models.shape(name)  # now, while its parameters are whole
    learning = (strategy for role in plan.roles if role.role.trainable for strategy in strategies.get(role.name, ()))
    backend.scaler = next(filter(None, (strategy.loss_scaler() for strategy in learning)), None)
    backend.prepare(models.trained, parameters, optimizer)
    for name, acting in strategies.items():
        for strategy in acting:
            strategy.settled([parameter for parameter in parameters if parameter.role == name])
    allocator.give_back()  # of weights in another precision, or those that other ranks keep
    return models


def _follow(role: RolePlan, follows: Follows, models: Models) -> None:
    if role.view == "trunk":  # heads of their own, drawn apart
        heads = models.trained.heads
        models.followers.add(role.name, follows, heads[role.name], heads[follows.role], copy=True)
    else:
        own, other = models.body(role.module), models.body(models.plan.role(follows.role).module)
        models.followers.add(role.name, follows, own, other, copy=False)


def _join(role: RolePlan, context: Context, seed: int, models: Models) -> None:
    """Give a role adapters, and a head, of its own on another's module."""
    spec, acting = spec_of(role, context, models.backend.device, seed)
    module = models.body(role.module)
    there = {id(parameter) for parameter in models.trained.parameters()}
    for strategy in acting:
        strategy.join(module, spec)
    for name, parameter in models.trained.named_parameters():
        if id(parameter) not in there:
            models.joined[name] = role.name
            parameter.requires_grad_(role.role.trainable)
    if role.role.head == "scalar":
        models.trained.heads[role.name] = models.policy.own_head(module, spec).requires_grad_(role.role.trainable)
    models.strategies[role.name], models.specs[role.name] = acting, spec


def _load(
    role: RolePlan, policy: Policy, context: Context, device: str, seed: int, models: Models
) -> tuple[nn.Module, LoadSpec]:
    spec, strategies = spec_of(role, context, device, seed)
    module = policy.load(spec)
    for strategy in strategies:
        module = strategy.adapt(module, spec)
    for strategy in strategies:
        module = strategy.wrap(module, spec)
    models.strategies[role.name] = strategies
    return module, spec


def spec_of(role: RolePlan, context: Context, device: str, seed: int = 0) -> tuple[LoadSpec, list[MemoryStrategy]]:
    """How a role's module is loaded, and its memory strategies, in the order they act."""
    spec = LoadSpec(
        role=role.name,
        model=role.model.path,
        head=role.role.head,
        trainable=role.role.trainable,
        head_init=role.role.head_init,
        device=device,
        trust_remote_code=context.plan.run.trust_remote_code,
        seed=seed,
        joins=role.view == "adapter",
    )
    strategies: list[MemoryStrategy] = [resolve(c)(c.config, context) for c in role.mem]
    for strategy in strategies:
        spec = strategy.load(spec)
    return spec, strategies


def weight_stream(models: Models, module: str) -> Weights:
    """What an engine calls to be given new weights: the module's own, without what other roles have put into it."""
    prefix = f"bodies.{module}."

    def stream(only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        def wanted(name: str) -> bool:
            return prefix + name not in models.joined and (only is None or only(name))

        return models.backend.weights(module, wanted)

    return stream
