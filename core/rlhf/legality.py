"""Do the components of a plan go together? Pure functions of the plan: capabilities, conflicts, slots, constraints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from rlhf.entries import KINDS, Constraint, MemoryEntry
from rlhf.errors import Problem
from rlhf.options import nearest
from rlhf.plan import Component, Plan, RolePlan
from rlhf.registry import Registry


def problems_of(plan: Plan, registry: Registry) -> list[Problem]:
    """All that speaks against a plan, not the first of it; `registry` says who could mend it."""
    return [*_of_run(plan, registry), *_of_sampling(plan), *_of_roles(plan, registry), *_of_constraints(plan)]


def _of_run(plan: Plan, registry: Registry) -> Iterator[Problem]:
    """Needs and conflicts of what there is one of; memory strategies are each role's own."""
    provided = plan.provides()
    for component in plan.components():
        if component.kind != "mem":
            others = (c.entry.provides for c in plan.components() if c is not component)
            yield from _capabilities(component, provided, plan.machine.provides.union(*others), registry)


def _of_sampling(plan: Plan) -> Iterator[Problem]:
    """Options, by the names that engines share, under which no ratio to what was sampled from is known."""
    if plan.engine is None or "logprobs" not in plan.algo.entry.requires:
        return
    config, needs = plan.engine.config, f"{plan.algo.name} needs log-probs of what was sampled"
    if getattr(config, "temperature", 1.0) == 0:
        what = f"--engine.temperature 0: {needs}, and greedy has none"
        yield Problem(what, "give a temperature above 0; held-out sampling has --eval-temperature 0")
    for name, low, high in (("top_p", 1.0, math.inf), ("top_k", -math.inf, 0), ("min_p", -math.inf, 0)):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not low <= value <= high:  # where all are sampled from
            what = f"--engine.{name.replace('_', '-')} {value:g}: {needs}, and truncation changes them unaccounted"
            yield Problem(what, "leave it out; --engine.temperature is accounted for")


def _of_roles(plan: Plan, registry: Registry) -> Iterator[Problem]:
    """Problems of the memory strategies, each once, with the roles that have it."""
    shared = plan.machine.provides.union(*(c.entry.provides for c in plan.components() if c.kind != "mem"))
    roles: dict[Problem, list[str]] = {}
    for role in plan.roles:
        if role.chooses or role.role.follows is not None:
            for problem in dict.fromkeys(_of_role(role, shared, registry)):
                roles.setdefault(problem, []).append(role.name)
    for problem, names in roles.items():
        where = f"{'roles' if len(names) > 1 else 'role'} {', '.join(names)}"
        yield attrs.evolve(problem, what=f"{problem.what} ({where})")


def _of_role(role: RolePlan, shared: frozenset[str], registry: Registry) -> Iterator[Problem]:
    for component in role.mem:
        beside = shared.union(*(c.entry.provides for c in role.mem if c is not component))
        yield from _capabilities(component, shared | role.provides(), beside, registry)
    names = [component.name for component in role.mem]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"--mem {name} acts twice on one role", "leave all but one out")
    if role.role.follows is not None and "whole-weights" not in shared:
        what = f"{role.name} follows {role.role.follows.role}, whose weights no rank has whole"
        givers = [f"--backend {e.name}" for e in registry.entries("backend") if "whole-weights" in e.provides]
        yield Problem(what, " or ".join(["leave the sharding out", *givers]))
    slots: dict[str, list[str]] = {}
    for component in role.mem:
        assert isinstance(component.entry, MemoryEntry)
        slots.setdefault(component.entry.slot, []).append(component.name)
    for slot in sorted(slots):
        if slot and len(slots[slot]) > 1:
            yield Problem(f"--mem {' and '.join(slots[slot])}: a role has one {slot}", "leave all but one out")


def _capabilities(
    component: Component, provided: frozenset[str], others: frozenset[str], registry: Registry
) -> Iterator[Problem]:
    for need in sorted(component.entry.requires - provided):
        givers = [f"--{kind} {e.name}" for kind in KINDS for e in registry.entries(kind) if need in e.provides]
        near = nearest(need, {name for kind in KINDS for e in registry.entries(kind) for name in e.provides})
        nobody = "nothing installed here, nor this machine, does" + (f"; did you mean {near!r}?" if near else "")
        fix = f"add one that does: {', '.join(givers)}" if givers else nobody
        yield Problem(f"--{component.kind} {component.name} needs {need!r}, which nothing provides", fix)
    for clash in sorted(component.entry.conflicts & others):
        yield Problem(f"--{component.kind} {component.name} excludes {clash!r}", "leave one of them out")


def _of_constraints(plan: Plan) -> Iterator[Problem]:
    for component in plan.components():
        for constraint in component.entry.constraints:
            yield from _asked_of(constraint, plan, component)


def notes_of(plan: Plan) -> list[str]:
    """What the components settle themselves."""
    found: list[str] = []
    for component in plan.components():
        for note in component.entry.notes:
            try:
                found += note(plan, component)
            except Exception as error:  # told where it would have stood; the plan is no worse for it
                found.append(f"{component}: its note failed: {type(error).__name__}: {error}")
    return found


def _asked_of(constraint: Constraint, plan: Plan, component: Component) -> list[Problem]:
    try:
        return list(constraint(plan, component))
    except Exception as error:  # a plugin's fault must not take down a run that may not even use it
        what = f"{component}: its check failed: {type(error).__name__}: {error}"
        return [Problem(what, "leave it out, and tell its author")]
