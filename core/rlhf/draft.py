"""One draft: a choice of components with their options, roles and data made into a plan, or all that stands in its
way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlhf import hub, legality
from rlhf.entries import MANY, AlgorithmEntry, FormatEntry, StarterEntry, Times, address
from rlhf.errors import PluginError, Problem
from rlhf.facts import Machine, ModelFacts
from rlhf.options import default_of, fields, structure, typed
from rlhf.plan import Component, DataSource, Plan, RolePlan, resource
from rlhf.recipe import Pick, Picks, Recipe, RunOptions
from rlhf.registry import Registry
from rlhf.roles import Memory, name_problems, place, role_models, wanted_roles
from rlhf.rows import PromptRow, row_needs

_LABEL = re.compile(r"[\w-]+")
_NEEDED = ("policy", "optim", "backend", "launch")


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
    setters: Mapping[str, str] = attrs.Factory(dict)
    """Recipe keys -> who set them: the algorithm's name, the starter, or a memory strategy."""
    scaled: Mapping[str, str] = attrs.Factory(dict)
    """Of these, why some are so many times what is usual."""

    @property
    def online(self) -> bool:
        return "rollouts" in self.algorithm.requires


@attrs.frozen
class Draft:
    """What became of a choice."""

    plan: Plan | None
    request: list[Problem]
    """Problems that another choice wouldn't mend: a bad option, a missing file."""
    combination: list[Problem]

    @property
    def problems(self) -> list[Problem]:
        """Each once."""
        return list({str(problem): problem for problem in [*self.request, *self.combination]}.values())


def draft(ask: Ask, choice: Choice) -> Draft:
    """Make what a choice says, and look for everything that speaks against it."""
    recipe, starter, settings = ask.recipe, choice.starter, choice.settings
    defaults = {name: value for name, value in settings.items() if name in fields(RunOptions)}
    run, request = structure(RunOptions, {**defaults, **recipe.run}, "--")

    def made(kind: str, picks: Iterable[Pick]) -> tuple[Component, ...]:
        found = (_component(kind, pick, ask, settings, request) for pick in picks)
        return tuple(component for component in found if component is not None)

    parts = {kind: made(kind, picks) for kind, picks in choice.picks.items()}
    memory = Memory(
        everyone=parts["mem"],
        fillers=made("mem", choice.fillers),
        own={name: made("mem", role.mem) for name, role in recipe.roles.items() if role.mem is not None},
    )
    request += _doubled(parts)
    combination = list(_unasked(choice))
    roles: list[RolePlan] = []
    if parts["algo"]:
        base = recipe.model or (starter.model if starter else None)
        try:
            wanted = wanted_roles(parts["algo"][0], parts["reward"])
        except PluginError as error:
            return Draft(None, request, [*combination, Problem(str(error), "leave it out, and tell its author")])
        request += name_problems(parts["algo"][0], wanted, recipe.roles)
        models, unfound = role_models(wanted, recipe.roles, base, ask.models)
        roles, unfit = place(wanted, recipe.roles, models, memory)
        request += [*unfound, *unfit]
        combination += [] if unfound else memory.idle(roles)
    request += _unplaced_options(recipe, choice)
    request += _missing(ask, choice)
    data, held_out = recipe.data, recipe.eval_data
    if starter is not None and not data:
        data, held_out = (starter.data,), held_out or (starter.eval_data,)
    sources = _sources("data", data, ask, settings, request)
    eval_sources = _sources("eval-data", held_out, ask, settings, request)
    ptx_sources = _sources("ptx-data", recipe.ptx_data, ask, settings, request)
    request += _mixture(recipe, run, choice, roles)
    if not request:
        request += [Problem(f"no --{kind} is installed") for kind in _NEEDED if not parts.get(kind)]
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
        data=sources,
        eval_data=eval_sources,
        run=run,
        machine=ask.machine,
        ptx_data=ptx_sources,
        notes=(*filter(None, [ask.machine.unused]), *_notes(recipe, choice, roles)),
    )
    problems = [*combination, *legality.problems_of(plan, ask.registry)]
    if not problems:
        plan = attrs.evolve(plan, notes=(*plan.notes, *legality.notes_of(plan)))
    return Draft(plan, request, problems)


def _component(
    kind: str, pick: Pick, ask: Ask, settings: Mapping[str, Any], problems: list[Problem]
) -> Component | None:
    """The component picked, its options the user's over the settings'; None where `problems` says why not."""
    entry = ask.registry.find(kind, pick.name)
    if isinstance(entry, Problem):
        problems.append(entry)
        return None
    if pick.label and (kind not in MANY or not _LABEL.fullmatch(pick.label)):
        fix = "a label is of letters, digits, - and _" if kind in MANY else f"only {', '.join(sorted(MANY))} take one"
        problems.append(Problem(f"--{kind} {pick.name}: the label {pick.label!r} can't be used", fix))
        return None
    prefix = address(kind, pick.key)
    known = fields(entry.config) if entry.config is not None else {}
    # A default for an option that this component doesn't have means nothing to it; a user's option is checked.
    defaults = {name: settings[f"{prefix}.{name}"] for name in known if f"{prefix}.{name}" in settings}
    for name, value in defaults.items():
        if isinstance(value, Times):
            defaults[name] = value.of(default_of(known[name]))
    given = {**defaults, **pick.options, **ask.recipe.options.get(prefix, {})}
    config, wrong = structure(entry.config, given, f"--{prefix}.")
    problems += wrong
    offer = ask.registry.offer(kind, pick.name)
    if wrong or offer is None:
        return None
    return Component(entry, config, pick.label, offer.distribution, offer.version)


def _doubled(parts: Mapping[str, tuple[Component, ...]]) -> Iterator[Problem]:
    """Components that options can't tell apart; of memory strategies, see `Memory.of`."""
    for kind, components in parts.items():
        keys = [component.key for component in components]
        for key in sorted({key for key in keys if keys.count(key) > 1 and kind != "mem"}):
            yield Problem(f"--{kind} {key} is given twice", f"tell them apart: --{kind} {key}:LABEL")


def _unasked(choice: Choice) -> Iterator[Problem]:
    """What samples and judges, beside an algorithm that does without."""
    for kind in ("engine", "reward"):
        if choice.picks.get(kind) and not choice.online:
            why = f"{choice.algorithm.name} samples nothing, it learns from its data"
            yield Problem(f"--{kind} {choice.picks[kind][0].name}: {why}", f"leave --{kind} out")


def _missing(ask: Ask, choice: Choice) -> Iterator[Problem]:
    """Rewards and data that the algorithm can't do without."""
    name = choice.algorithm.name
    if choice.online and choice.algorithm.rewards and not choice.picks["reward"]:
        known = ", ".join(entry.name for entry in ask.registry.entries("reward"))
        what = f"--reward is needed: {name} learns from rewards, and this data brings none of its own"
        yield Problem(what, f"installed: {known}; several add up")
    if not ask.recipe.data and choice.starter is None:
        what = f"--data is needed: {name} has no data of its own to start from"
        yield Problem(what, row_needs(choice.algorithm.data or PromptRow))


def _mixture(recipe: Recipe, run: RunOptions | None, choice: Choice, roles: Iterable[RolePlan]) -> Iterator[Problem]:
    """Data to learn beside, where there is nothing beside which, or no weight; and a weight without data."""
    coef = run.ptx_coef if run is not None else 0.0
    name = choice.algorithm.name
    if (recipe.ptx_data or coef) and not choice.online:
        what = f"--ptx-data is learnt beside what an algorithm samples, and {name} samples nothing"
        yield Problem(what, "leave --ptx-data and --ptx-coef out, or give the rows as --data")
    elif recipe.ptx_data and run is not None and not coef:
        what = "--ptx-data is given, and --ptx-coef is 0, so that nothing of it would be learnt"
        yield Problem(what, "give --ptx-coef a weight, such as 1; InstructGPT's is 27.8")
    elif coef and not recipe.ptx_data:
        yield Problem(f"--ptx-coef {coef:g} is the weight of nothing", "give --ptx-data PATH, or leave it out")
    elif recipe.ptx_data and roles and not any(_speaks(role) for role in roles):
        yield Problem(f"--ptx-data is learnt by a trained role 'policy', and {name} has none", "leave it out")


def _speaks(role: RolePlan) -> bool:
    return role.name == "policy" and role.role.trainable and role.role.head == "lm"


def _unplaced_options(recipe: Recipe, choice: Choice) -> Iterator[Problem]:
    """Options of components that the run doesn't have."""
    own = tuple(pick for role in recipe.roles.values() for pick in role.mem or ())
    chosen = {**choice.picks, "mem": (*choice.picks["mem"], *choice.fillers, *own)}
    places = {address(kind, pick.key) for kind, picks in chosen.items() for pick in picks} | {"format"}
    for prefix, options in recipe.options.items():
        if prefix not in places:
            kind, _, name = prefix.partition(".")
            what = f"--{prefix}.{next(iter(options)).replace('_', '-')}: the run has no --{kind} {name}".rstrip()
            yield Problem(what, f"add --{kind} {name or 'NAME'}, or leave the option out")


def _sources(
    flag: str, paths: Iterable[str], ask: Ask, settings: Mapping[str, Any], problems: list[Problem]
) -> tuple[DataSource, ...]:
    """The data with the format of each file: the one named, else the one that claims the most of its name's end."""
    formats = [entry for entry in ask.registry.entries("format") if isinstance(entry, FormatEntry)]
    endings = tuple(suffix for entry in formats for suffix in entry.suffixes if suffix.startswith("."))
    sources = []
    for path in map(resource, paths):
        place = Path(path).expanduser()
        there = place.exists()
        claim = "/" if place.is_dir() else place.name.lower() if there else "hub:"
        claiming = _claiming(claim, formats)
        pick = next(iter((*ask.recipe.picks.get("format", ()), *map(Pick, claiming))), None)
        if len(claiming) > 1 and "format" not in ask.recipe.picks:
            fix = " or ".join(f"--format {name}" for name in claiming)
            problems.append(Problem(f"--{flag} {path}: {' and '.join(claiming)} both claim it", fix))
            continue
        if pick is None and there:
            known = ", ".join(f"{entry.name} ({' '.join(entry.suffixes)})" for entry in formats)
            problems.append(Problem(f"--{flag} {path}: no format claims it", f"--format NAME, of: {known}"))
            continue
        component = _component("format", pick, ask, settings, problems) if pick else None
        why = None if there or (pick and not component) else _lost(path, component, endings)
        if why is not None:
            hint = f"{hub.near(path)}give a file or folder that exists, or a data set of the hub as ORG/NAME"
            problems.append(Problem(f"--{flag} {path}: there is no such file here{why}", hint))
            continue
        if component is not None:
            # Absolute, as a run may be resumed from elsewhere.
            sources.append(DataSource(str(place.absolute()) if there else path, component))
    return tuple(sources)


def _claiming(claim: str, formats: Iterable[FormatEntry]) -> list[str]:
    """Names of the formats with the longest suffix that a name ends with, so that .jsonl.gz goes before .gz."""
    longest = {entry.name: max(map(len, filter(claim.endswith, entry.suffixes)), default=0) for entry in formats}
    return [name for name, length in longest.items() if length and length == max(longest.values())]


def _lost(path: str, component: Component | None, endings: tuple[str, ...]) -> str | None:
    """Why data that is no file or folder here can't be had; None where it can, or where only its format knows.

    Args:
        component: the format that is to read it; None where none claims it.
        endings: of file names that formats claim.
    """
    suffixes = component.entry.suffixes if component and isinstance(component.entry, FormatEntry) else ("hub:",)
    if component is not None and "hub:" not in suffixes:  # of files, or of names of its own
        return f", and --format {component.name} reads files" if suffixes else None
    name, _, inside = path.removeprefix("hub:").partition(":")
    if component is None or "/" in inside or not hub.is_id(name, endings):
        return ""
    why = hub.unavailable("dataset", name)
    return f", and {why}" if why else None


def _said(recipe: Recipe, key: str) -> bool:
    """Whether the user said something of a recipe key such as "batch_size" or "optim.learning_rate"."""
    place, _, name = key.rpartition(".")
    if not place:
        return name in recipe.run
    beside = (pick for kind, picks in recipe.picks.items() for pick in picks if address(kind, pick.key) == place)
    return name in recipe.options.get(place, {}) or any(name in pick.options for pick in beside)


def _notes(recipe: Recipe, choice: Choice, roles: list[RolePlan]) -> Iterator[str]:
    """Decisions that the user didn't make, each with its reason."""
    for kind in ("algo", "engine", "reward", "backend"):
        if choice.picks.get(kind) and not recipe.picks.get(kind):
            names = ", ".join(pick.name for pick in choice.picks[kind])
            yield f"--{kind} {names}: taken because none was named"
    for pick in choice.fillers:
        yield f"--mem {pick.name}: taken because none of its sort was named"
    for key, why in choice.scaled.items():
        if not _said(recipe, key):
            value = choice.settings[key]  # unless it is so many times an option's own default
            yield f"--{key.replace('_', '-')}{'' if isinstance(value, Times) else f' {typed(value)}'}: {why}"
    for role in roles:
        if role.view == "adapters-off":
            yield f"role {role.name}: {role.module} with its adapters off, so it costs no memory"
        elif role.view == "adapter":
            yield f"role {role.name}: adapters of its own on {role.module}'s base"
    beaten = {key: value for key, value in choice.algorithm.defaults.items() if choice.settings.get(key) != value}
    for key, own in sorted(beaten.items()):
        if key not in choice.scaled and not _said(recipe, key):
            flag, value = f"--{key.replace('_', '-')}", typed(choice.settings[key])
            yield f"{flag} {value}: set by {choice.setters[key]}; {choice.algorithm.name} alone would set {typed(own)}"
    if choice.starter and not recipe.data:
        yield f"data: the starter {choice.starter.name!r}, because no --data was given"
