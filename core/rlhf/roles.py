"""The roles of a plan: who asks for them, the model each starts from, its memory strategies, the module that serves
it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import attrs

from rlhf import facts
from rlhf.entries import MemoryEntry, Role
from rlhf.errors import PluginError, Problem
from rlhf.facts import ModelFacts
from rlhf.plan import Component, RolePlan, phase_order, resource
from rlhf.recipe import RoleRecipe

Asked = Mapping[str, RoleRecipe]
"""What the recipe says of single roles, by name."""


def roles_of(component: Component) -> tuple[Role, ...]:
    """The roles that a component asks for, with the options that it has.

    Raises:
        PluginError: its function for them fails.
    """
    roles = component.entry.roles
    try:
        found = tuple(roles(component.config) if callable(roles) else roles)
        wrong = [role for role in found if not isinstance(role, Role)]
        if wrong:
            raise TypeError(f"a {type(wrong[0]).__name__} is no Role")
    except Exception as error:  # a plugin's fault must not take down a run that may not even use it
        raise PluginError(f"{component}: its roles can't be told: {type(error).__name__}: {error}") from error
    return found


def wanted_roles(algorithm: Component, rewards: Iterable[Component]) -> list[Role]:
    """Every role of a run, each after the one it starts from or shares with, else as declared. A labelled reward's
    role takes its label."""
    roles = list(roles_of(algorithm))
    for reward in rewards:
        roles += [attrs.evolve(role, name=reward.label or role.name) for role in roles_of(reward)]
    names = {role.name for role in roles}
    waiting, ordered = roles, list[Role]()
    while waiting:
        done = {role.name for role in ordered} | {"model", "given"}
        ready = [role for role in waiting if {role.start, role.shares or role.start, _followed(role)} & names <= done]
        taken = (ready or waiting)[0]  # a circle is left as it is
        waiting.remove(taken)
        ordered.append(taken)
    return ordered


def _followed(role: Role) -> str:
    return role.follows.role if role.follows else role.start


def name_problems(algorithm: Component, roles: list[Role], asked: Asked) -> Iterator[Problem]:
    """Roles that are spoken of and aren't there, or are there twice."""
    names = [role.name for role in roles]
    for name in asked:
        if name not in names:
            what = f"{algorithm.name} has no role {name!r} in this combination"
            yield Problem(what, f"its roles: {', '.join(names)}")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"two components ask for a role {name!r}", f"label one: --reward NAME:{name}2")


def role_models(
    roles: list[Role], asked: Asked, base: str | None, known: Mapping[str, ModelFacts]
) -> tuple[dict[str, ModelFacts], list[Problem]]:
    """The model that each role starts from, and why some have none.

    Args:
        base: the run's own model, where it has one.
        known: facts of models that aren't there yet, by what the recipe calls them.
    """
    names = [role.name for role in roles]
    found: dict[str, ModelFacts] = {}
    problems: list[Problem] = []
    for role in roles:
        given = asked.get(role.name, RoleRecipe()).model
        if given is None and role.start not in ("model", "given"):
            if role.start in found:
                found[role.name] = found[role.start]
            elif role.start not in names:
                problems.append(Problem(f"role {role.name} starts from a role {role.start!r} that is not there"))
            continue
        path = given or (base if role.start == "model" else None)
        if path is None:
            flag = "--model PATH" if role.start == "model" else f"--model {role.name}=PATH"
            problems.append(Problem(f"the role {role.name!r} needs a model", f"give it with {flag}"))
            continue
        read = known.get(path) or facts.model(resource(path), role.name)
        if isinstance(read, Problem):
            problems.append(read)
        else:
            found[role.name] = read
    if len(found) < len(set(names)) and not problems:
        problems.append(Problem(f"the roles {', '.join(names)} start from one another"))
    return found, problems


@attrs.frozen
class Memory:
    """The memory strategies of a run, by whom they are for."""

    everyone: tuple[Component, ...]
    """Said for all roles."""
    fillers: tuple[Component, ...]
    """Taken for the slots that nobody filled."""
    own: Mapping[str, tuple[Component, ...]]
    """Said for one role alone, by its name."""

    def of(self, role: Role) -> tuple[Component, ...]:
        """A role's strategies, in the order they act."""
        mine = list(self.own[role.name] if role.name in self.own else self.said(role))
        taken = {_entry(component).slot for component in mine}
        # What was said for all roles, or nobody said, fills the slots that this role's own choice leaves open.
        for component in (*self.everyone, *self.fillers):
            slot = _entry(component).slot
            if slot and slot not in taken and _entry(component).acts_on(role):
                mine.append(component)
                taken.add(slot)
        once = [component for i, component in enumerate(mine) if component not in mine[:i]]  # said twice is once
        return tuple(sorted(once, key=phase_order))

    def said(self, role: Role) -> list[Component]:
        """What was said for all roles and is for this one."""
        return [component for component in self.everyone if _entry(component).acts_on(role)]

    def idle(self, plans: list[RolePlan]) -> Iterator[Problem]:
        """Strategies that were named and that no role takes."""
        used = [component for plan in plans for component in plan.mem]
        for component in self.everyone:
            if component not in used:
                fitting = [plan for plan in plans if _entry(component).acts_on(plan.role)]
                why = f"it is for none of {', '.join(plan.name for plan in plans)}"
                if fitting and all(plan.view == "own" for plan in fitting):
                    why = "every role it is for has a choice of its own"
                elif fitting:
                    names = ", ".join(plan.name for plan in fitting)
                    why = f"no role it is for ({names}) has a module of its own"
                yield Problem(f"--mem {component.key} would do nothing: {why}", "leave it out")


def _entry(component: Component) -> MemoryEntry:
    assert isinstance(component.entry, MemoryEntry)
    return component.entry


def place(
    roles: list[Role], asked: Asked, models: Mapping[str, ModelFacts], memory: Memory
) -> tuple[list[RolePlan], list[Problem]]:
    """Give every role that has a model a module: its own, or another role's where that costs nothing. Also tells of
    heads that don't go with their trunk."""
    plans: list[RolePlan] = []
    problems: list[Problem] = []
    for role in roles:
        if role.name not in models:
            continue
        model, alone = models[role.name], asked.get(role.name, RoleRecipe()) == RoleRecipe()
        mem = memory.of(role)
        trunk = next((plan for plan in plans if plan.name == role.shares), None)
        lender = next((plan for plan in plans if alone and _lends(plan, role, memory)), None)
        host = next((plan for plan in plans if _hosts(plan, role, mem)), None)
        if trunk is not None:
            problems += _trunk_problems(role, trunk, alone)
            plans.append(RolePlan(role, model, trunk.mem, trunk.module, "trunk"))
            problems += _follow_problems(plans)
        elif lender is not None:
            plans.append(RolePlan(role, model, lender.mem, lender.module, "adapters-off"))
        elif host is not None and role.shares is None:
            plans.append(RolePlan(role, model, mem, host.module, "adapter"))
        else:
            if role.shares is not None:
                problems.append(Problem(f"role {role.name} is a head on a role {role.shares!r} that is not there"))
            if role.head == "tokens":
                problems.append(Problem(f"role {role.name}: a head of tokens must share another role's trunk"))
            plans.append(RolePlan(role, model, mem, role.name))
            problems += _follow_problems(plans)
    return plans, problems


def _lends(other: RolePlan, role: Role, memory: Memory) -> bool:
    """Whether a trained role with its adapters off is what this frozen one would be."""
    return (
        role.start == other.name
        and not role.trainable
        and role.follows is None
        and other.role.trainable
        and role.head == other.role.head
        and "adapters" in other.provides()
        # What was said for every role holds for this one too: it can't borrow a module that lacks it. But where frozen
        # modules are to lie is no reason to have one.
        and all(component in other.mem or _only_places(_entry(component)) for component in memory.said(role))
    )


def _only_places(entry: MemoryEntry) -> bool:
    return entry.applies == "frozen" and entry.phase == "shard"


def _hosts(other: RolePlan, role: Role, mem: tuple[Component, ...]) -> bool:
    """Whether a trained role's base takes adapters of this one too, as was asked for both. Of the base itself that is
    judged by whoever offers it."""
    return (
        other.view == "own"
        and other.role.trainable
        and {"adapters", _SHARED} <= other.provides()
        and _SHARED in frozenset().union(*(component.entry.provides for component in mem))
        and (other.role.head == "lm" or role.head == "scalar")
    )


_SHARED = "one-base"
"""The capability of a strategy by which roles share a base, each with adapters of its own on it."""


def _trunk_problems(role: Role, trunk: RolePlan, alone: bool) -> Iterator[Problem]:
    where = f"role {role.name} is a head on {trunk.name}'s trunk"
    if not alone:
        yield Problem(f"{where}: it has no model or --mem of its own", f"choose for {trunk.name}")
    if role.trainable != trunk.role.trainable and role.follows is None:
        yield Problem(f"{where}, and only one of the two is trained")


def _follow_problems(plans: list[RolePlan]) -> Iterator[Problem]:
    """Why the last of these can't run after the one that it follows."""
    own = plans[-1]
    if own.role.follows is None:
        return
    where = f"role {own.name} follows {own.role.follows.role}"
    other = next((plan for plan in plans[:-1] if plan.name == own.role.follows.role), None)
    if other is None or not other.role.trainable or own.role.trainable:
        yield Problem(f"{where}: it must be frozen, and the other one there and trained")
    elif (other.view, other.role.head) != (own.view, own.role.head):
        yield Problem(f"{where}, which is of another sort, or has a module of another sort")
    elif own.view == "own" and "adapters" in other.provides():
        yield Problem(f"{where}, whose weights are adapters on a base that stays", "leave the adapters out")
    elif own.view == "own" and any(_entry(component).phase != "load" for component in own.mem):
        named = ", ".join(component.key for component in own.mem if _entry(component).phase != "load")
        yield Problem(f"{where}, so its weights must be plain and in their place, and --mem {named} changes that",
                      f"give it none but a precision: --mem {own.name}=NAME")  # fmt: skip
