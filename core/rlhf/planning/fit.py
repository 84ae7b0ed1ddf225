"""What to change so that a plan fits a device: the fewest changes, and of these the ones that change results least.

Tried are smaller micro-batches and what components say eases them (`Entry.eases`), every installed memory strategy
that declares a footprint (for all roles, or for one frozen role), and every other optimiser. Each is composed anew, so
that what is offered is legal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import attrs

from rlhf.compose import choices
from rlhf.draft import Ask, draft
from rlhf.entries import MemoryEntry, OptimizerEntry, address
from rlhf.plan import Component, Plan, RolePlan
from rlhf.planning.architecture import Uncountable
from rlhf.planning.memory import Lengths
from rlhf.planning.prediction import Prediction, prediction
from rlhf.recipe import Pick, Recipe, RoleRecipe

_LEAST_TOKENS = 256
"""Micro-batches are not made smaller."""
_MOST = 3
"""Changes at once."""
_BY_PHASE = {"wrap": 1, "shard": 2, "load": 4, "adapt": 4}
"""How much a strategy of a phase may change what is learnt: recomputing and sharding, nothing."""


@attrs.frozen
class Step:
    """What to type, and what it lays on top of what was asked for."""

    words: str
    over: Recipe


@attrs.frozen
class Change:
    """One thing to change; of a number, how far: the gentlest step first."""

    sort: str
    """No two of one sort are made together."""
    weight: int
    """How much it may change what is learnt: 0 nothing."""
    steps: tuple[Step, ...]


@attrs.frozen
class Fit:
    """Changes that make a plan fit."""

    words: str
    """To add to the command line."""
    weight: int
    recipe: Recipe
    prediction: Prediction


def nearest_fit(ask: Ask, plan: Plan, lengths: Lengths) -> Fit | None:
    """The nearest change after which the plan fits its device: of those that change least of what is learnt the fewest,
    then the one that leaves the least memory idle; None where up to three don't help."""
    changes = list(_changes(ask, plan))
    nearest: Fit | None = None
    for count in range(1, _MOST + 1):
        found = []
        for chosen in itertools.combinations(changes, count):
            weight = sum(change.weight for change in chosen)
            if len({change.sort for change in chosen}) < count or (nearest is not None and weight >= nearest.weight):
                continue
            fit = _gentlest(ask, chosen, lengths)
            if fit is not None:
                found.append(fit)
        if found:
            nearest = min(found, key=lambda fit: (fit.weight, -fit.prediction.memory.needed))
    return nearest


def attempt(ask: Ask) -> Plan | None:
    """The plan of a recipe, if it is legal."""
    for choice in itertools.islice(choices(ask), 40):
        tried = draft(ask, choice)
        if tried.plan is not None and not tried.problems:
            return tried.plan
        if tried.request:
            return None
    return None


def _gentlest(ask: Ask, chosen: Sequence[Change], lengths: Lengths) -> Fit | None:
    """The changes, each as gentle as the others allow; None where they don't help even at their utmost."""
    steps = [change.steps[-1] for change in chosen]
    weight = sum(change.weight for change in chosen)
    fit = _tried(ask, steps, weight, lengths)
    for i, change in enumerate(chosen) if fit is not None else ():
        for step in change.steps[:-1]:
            gentler = _tried(ask, [*steps[:i], step, *steps[i + 1 :]], weight, lengths)
            if gentler is not None:
                fit, steps[i] = gentler, step
                break
    return fit


def _tried(ask: Ask, steps: Sequence[Step], weight: int, lengths: Lengths) -> Fit | None:
    recipe = ask.recipe
    for step in steps:
        recipe = _laid(recipe, step.over)
    plan = attempt(attrs.evolve(ask, recipe=recipe))
    try:
        found = prediction(plan, lengths) if plan is not None else None
    except Uncountable:
        return None
    if found is None or not found.fits:
        return None
    return Fit(" ".join(step.words for step in steps), weight, recipe, found)


def _laid(recipe: Recipe, over: Recipe) -> Recipe:
    """Added, where `Recipe.merged` would replace."""
    mem = (*recipe.picks.get("mem", ()), *over.picks.get("mem", ()))
    picks = {**recipe.picks, **over.picks, **({"mem": mem} if mem else {})}
    roles = dict(recipe.roles)
    for name, asked in over.roles.items():
        before = roles.get(name, RoleRecipe())
        roles[name] = attrs.evolve(before, mem=(*(before.mem or ()), *(asked.mem or ())))
    options = {key: {**recipe.options.get(key, {}), **over.options.get(key, {})}
               for key in {*recipe.options, *over.options}}  # fmt: skip
    return attrs.evolve(recipe, picks=picks, roles=roles, options=options, run={**recipe.run, **over.run})


def _changes(ask: Ask, plan: Plan) -> Iterator[Change]:
    tokens = _halves(plan.run.micro_batch_tokens, _LEAST_TOKENS)
    steps = [Step(f"--micro-batch-tokens {n}", Recipe(run={"micro_batch_tokens": n})) for n in tokens]
    if steps:
        yield Change("micro-batch", 0, tuple(steps))
    for component in plan.components():
        yield from _eased(component)
    for entry in ask.registry.entries("mem"):
        if isinstance(entry, MemoryEntry) and entry.footprint is not None:
            yield from _added(ask, plan, entry)
    for other in ask.registry.entries("optim"):
        if isinstance(other, OptimizerEntry) and other.footprint is not None and other.name != plan.optim.name:
            over = Recipe(picks={"optim": (Pick(other.name),)})
            yield Change("optim", 3, (Step(f"--optim {other.name}", over),))


def _halves(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number


def _eased(component: Component) -> Iterator[Change]:
    place = address(component.kind, component.key)
    for name in component.entry.eases:
        flag = f"--{place}.{name.replace('_', '-')}"
        steps = [Step(f"{flag} {n}", Recipe(options={place: {name: n}}))
                 for n in _halves(int(getattr(component.config, name)), 1)]  # fmt: skip
        if steps:
            yield Change(flag, 0, tuple(steps))


def _added(ask: Ask, plan: Plan, entry: MemoryEntry) -> Iterator[Change]:
    """A memory strategy more: for all roles, or for a frozen one."""
    weight, sort, added = _BY_PHASE[entry.phase], entry.slot or entry.name, (Pick(entry.name),)
    if not any(component.name == entry.name for role in plan.roles for component in role.mem):
        # a role that has a choice of its own takes no other, so it is added there too, where its slot is free
        own = {role.name: RoleRecipe(mem=added) for role in plan.roles
               if ask.recipe.roles.get(role.name, RoleRecipe()).mem is not None
               and entry.acts_on(role.role) and not _filled(role, entry)}  # fmt: skip
        words = [f"--mem {entry.name}", *(f"--mem {name}={_joined(ask, name, entry.name)}" for name in own)]
        yield Change(sort, weight, (Step(" ".join(words), Recipe(picks={"mem": added}, roles=own)),))
    for role in plan.roles:
        frozen = role.view == "own" and not role.role.trainable and entry.applies != "trainable"
        if frozen and not _filled(role, entry) and entry.name not in [component.name for component in role.mem]:
            words = [f"--mem {role.name}={_joined(ask, role.name, entry.name)}"]
            over = Recipe(roles={role.name: RoleRecipe(mem=added)})
            yield Change(f"{sort} of {role.name}", weight, (Step(words[0], over),))


def _filled(role: RolePlan, entry: MemoryEntry) -> bool:
    """The role has another strategy of this sort."""
    slots = {component.entry.slot for component in role.mem if isinstance(component.entry, MemoryEntry)}
    return bool(entry.slot) and entry.slot in slots


def _joined(ask: Ask, role: str, name: str) -> str:
    """A role's own strategies with one more, as typed."""
    before = ask.recipe.roles.get(role, RoleRecipe()).mem or ()
    return ",".join((*(pick.name for pick in before), name))
