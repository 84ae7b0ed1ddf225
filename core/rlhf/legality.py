"""Do the components of a plan go together? Pure functions of the plan: capabilities, conflicts, slots, constraints."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.entries import KINDS, Constraint, MemoryEntry
from rlhf.errors import Problem
from rlhf.plan import Component, Plan, RolePlan
from rlhf.registry import Registry


def problems_of(plan: Plan, registry: Registry) -> list[Problem]:
    """All that speaks against a plan, not the first of it; `registry` says who could mend it."""
    return [*_of_run(plan, registry), *_of_roles(plan, registry), *_of_constraints(plan)]


def _of_run(plan: Plan, registry: Registry) -> Iterator[Problem]:
    """Needs and conflicts of what there is one of; memory strategies are each role's own."""
    provided = plan.provides()
    for component in plan.components():
        if component.kind != "mem":
            others = (c.entry.provides for c in plan.components() if c is not component)
            yield from _capabilities(component, provided, plan.machine.provides.union(*others), registry)


def _of_roles(plan: Plan, registry: Registry) -> Iterator[Problem]:
    """Problems of the memory strategies, each once, with the roles that have it."""
    shared = plan.machine.provides.union(*(c.entry.provides for c in plan.components() if c.kind != "mem"))
    roles: dict[Problem, list[str]] = {}
    for role in plan.roles:
        if role.view == "own":
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
        fix = f"add one that does: {', '.join(givers)}" if givers else "nothing installed here, nor this machine, does"
        yield Problem(f"--{component.kind} {component.name} needs {need!r}, which nothing provides", fix)
    for clash in sorted(component.entry.conflicts & others):
        yield Problem(f"--{component.kind} {component.name} excludes {clash!r}", "leave one of them out")


def _of_constraints(plan: Plan) -> Iterator[Problem]:
    for component in plan.components():
        for constraint in component.entry.constraints:
            yield from _asked_of(constraint, plan, component)


def _asked_of(constraint: Constraint, plan: Plan, component: Component) -> list[Problem]:
    try:
        return list(constraint(plan, component))
    except Exception as error:  # a plugin's fault must not take down a run that may not even use it
        what = f"{component}: its check failed: {type(error).__name__}: {error}"
        return [Problem(what, "leave it out, and tell its author")]
