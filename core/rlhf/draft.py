"""One draft: a choice of components with their options, roles and data made into a plan, or all that stands in its
way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlhf import legality
from rlhf.entries import MANY, AlgorithmEntry, FormatEntry, StarterEntry, address
from rlhf.errors import Problem
from rlhf.facts import Machine, ModelFacts
from rlhf.options import fields, structure
from rlhf.plan import Component, DataSource, Plan, RolePlan, resource
from rlhf.recipe import Pick, Picks, Recipe, RunOptions
from rlhf.registry import Registry
from rlhf.roles import Memory, name_problems, place, role_models, wanted_roles
from rlhf.rows import PromptRow, row_needs

_LABEL = re.compile(r"[\w-]+")
_NEEDED = ("policy", "optim", "backend", "launch")
Parts = Mapping[str, list[Component]]
"""Kind -> the components made; memory strategies are kept apart."""


@attrs.frozen
class Ask:
    """A recipe, and what there is to make a plan of."""

    recipe: Recipe
    registry: Registry
    machine: Machine
    models: Mapping[str, ModelFacts] = attrs.Factory(dict)
    """Facts of models that aren't there yet, by what the recipe calls them."""


@attrs.frozen
class Choice:
    """One way to fill in what a recipe leaves open."""

    algorithm: AlgorithmEntry
    picks: Picks
    """Of every kind, whoever chose them; of memory strategies and trackers all that were named."""
    fillers: tuple[Pick, ...]
    """Memory strategies for the slots that nobody filled."""
    starter: StarterEntry | None
    settings: Mapping[str, Any]
    """Recipe keys -> what stands where the user says nothing."""


@attrs.frozen
class Draft:
    """What became of a choice."""

    plan: Plan | None
    request: list[Problem]
    """Problems that another choice wouldn't mend: a bad option, a missing file. Without any there is a plan."""
    combination: list[Problem]

    @property
    def problems(self) -> list[Problem]:
        """Each once."""
        return list({str(problem): problem for problem in [*self.request, *self.combination]}.values())


def draft(ask: Ask, choice: Choice) -> Draft:
    """Make what a choice says, and look for everything that speaks against it."""
    recipe = ask.recipe
    defaults = {name: value for name, value in choice.settings.items() if name in fields(RunOptions)}
    run, request = structure(RunOptions, {**defaults, **recipe.run}, "--")

    def made(kind: str, picks: tuple[Pick, ...]) -> tuple[Component, ...]:
        found = []
        for pick in picks:
            component, problems = _component(kind, pick, ask, choice.settings)
            request.extend(problems)
            if component is not None:
                found.append(component)
        return tuple(found)

    parts = {kind: made(kind, picks) for kind, picks in choice.picks.items()}
    memory = Memory(
        everyone=parts["mem"],
        fillers=made("mem", choice.fillers),
        own={name: made("mem", role.mem) for name, role in recipe.roles.items() if role.mem is not None},
    )
    request += _doubled(parts)
    roles, problems = _roles(ask, choice.starter, parts, memory) if parts["algo"] else ([], [])
    request += problems
    request += _unplaced_options(recipe, choice)
    request += _missing(ask, choice)
    data, eval_data, problems = _data(ask, choice)
    request += problems
    for kind in _NEEDED:
        if not parts.get(kind) and not request:
            request.append(Problem(f"no --{kind} is installed"))
    combination = [*_idle(choice), *memory.idle(roles)]
    if request:
        return Draft(None, request, combination)
    plan = Plan(
        algo=parts["algo"][0],
        policy=parts["policy"][0],
        engine=parts["engine"][0] if parts.get("engine") else None,
        rewards=parts["reward"],
        optim=parts["optim"][0],
        backend=parts["backend"][0],
        launch=parts["launch"][0],
        trackers=parts["track"],
        roles=tuple(roles),
        data=data,
        eval_data=eval_data,
        run=run,
        machine=ask.machine,
        notes=tuple(_notes(recipe, choice, roles)),
    )
    return Draft(plan, request, [*combination, *legality.problems_of(plan, ask.registry)])


def _component(
    kind: str, pick: Pick, ask: Ask, settings: Mapping[str, Any]
) -> tuple[Component | None, list[Problem]]:
    """The component picked, with its options: the user's over the settings'."""
    entry = ask.registry.find(kind, pick.name)
    if isinstance(entry, Problem):
        return None, [entry]
    if pick.label and (kind not in MANY or not _LABEL.fullmatch(pick.label)):
        fix = "a label is of letters, digits, - and _" if kind in MANY else f"only {', '.join(sorted(MANY))} take one"
        return None, [Problem(f"--{kind} {pick.name}: the label {pick.label!r} can't be used", fix)]
    prefix = address(kind, pick.key)
    known = fields(entry.config) if entry.config is not None else {}
    # A default for an option that this component doesn't have means nothing to it; a user's option is checked.
    defaults = {name: settings[f"{prefix}.{name}"] for name in known if f"{prefix}.{name}" in settings}
    given = {**defaults, **pick.options, **ask.recipe.options.get(prefix, {})}
    config, problems = structure(entry.config, given, f"--{prefix}.")
    if problems:
        return None, problems
    offer = ask.registry.offer(kind, pick.name)
    assert offer is not None
    return Component(entry, config, pick.label, offer.distribution, offer.version), []


def _doubled(parts: Parts) -> Iterator[Problem]:
    for kind, components in parts.items():
        keys = [component.key for component in components]
        for key in sorted({key for key in keys if keys.count(key) > 1 and kind != "mem"}):
            yield Problem(f"--{kind} {key} is given twice", f"tell them apart: --{kind} {key}:LABEL")


def _roles(
    ask: Ask, starter: StarterEntry | None, parts: Parts, memory: Memory
) -> tuple[list[RolePlan], list[Problem]]:
    algorithm, asked = parts["algo"][0], ask.recipe.roles
    wanted = wanted_roles(algorithm, parts["reward"])
    base = ask.recipe.model or (resource(starter.model) if starter else None)
    models, unfound = role_models(wanted, asked, base, ask.models)
    roles, unfit = place(wanted, asked, models, memory)
    return roles, [*name_problems(algorithm, wanted, asked), *unfound, *unfit]


def _unplaced_options(recipe: Recipe, choice: Choice) -> Iterator[Problem]:
    """Options of components that the run doesn't have."""
    own = tuple(pick for role in recipe.roles.values() for pick in role.mem or ())
    chosen = {**choice.picks, "mem": (*choice.picks["mem"], *choice.fillers, *own)}
    places = {address(kind, pick.key) for kind, picks in chosen.items() for pick in picks} | {"format"}
    for prefix, options in recipe.options.items():
        if prefix not in places:
            kind, _, name = prefix.partition(".")
            what = f"--{prefix}.{next(iter(options))}: the run has no --{kind} {name}".rstrip()
            yield Problem(what, f"add --{kind} {name or 'NAME'}, or leave the option out")


def _missing(ask: Ask, choice: Choice) -> Iterator[Problem]:
    """A reward or data that the algorithm can't do without."""
    name = choice.algorithm.name
    if "rollouts" in choice.algorithm.requires and choice.algorithm.rewards and not choice.picks["reward"]:
        known = ", ".join(entry.name for entry in ask.registry.entries("reward"))
        what = f"--reward is needed: {name} learns from rewards, and this data brings none of its own"
        yield Problem(what, f"installed: {known}; several add up")
    if not ask.recipe.data and choice.starter is None:
        what = f"--data is needed: {name} has no data of its own to start from"
        yield Problem(what, row_needs(choice.algorithm.data or PromptRow))


def _idle(choice: Choice) -> Iterator[Problem]:
    """What samples and judges, beside an algorithm that does without."""
    for kind in ("engine", "reward"):
        if choice.picks.get(kind) and "rollouts" not in choice.algorithm.requires:
            what = f"{choice.algorithm.name} samples nothing, it learns from its data"
            yield Problem(f"--{kind} {choice.picks[kind][0].name}: {what}", f"leave --{kind} out")


def _data(
    ask: Ask, choice: Choice
) -> tuple[tuple[DataSource, ...], tuple[DataSource, ...], list[Problem]]:
    """(what is learnt from, what is held out, why some can't be read)."""
    data, eval_data = ask.recipe.data, ask.recipe.eval_data
    if choice.starter is not None and not data:
        data, eval_data = (choice.starter.data,), eval_data or (choice.starter.eval_data,)
    sources, problems = [], []
    for flag, paths in (("data", data), ("eval-data", eval_data)):
        found: list[DataSource] = []
        for path in map(resource, paths):
            source, unread = _source(flag, path, ask, choice.settings)
            problems += unread
            if source
        sources.append(tuple(found))
    return sources[0], sources[1], problems
