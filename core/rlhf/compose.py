"""Composition: from a recipe to a plan, or to every reason why not. Pure data; imports no torch, loads no weights.

    pick -> structure the options -> modules present? -> capabilities -> facts -> constraints -> frozen plan

This file decides what to try: where the user names nothing, the highest rank among the legal wins. `draft` makes a
plan of one choice, `roles` places its models, `legality` judges it, `suggest` looks for the nearest legal one. Nothing
here knows a plugin's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from rlhf import facts, suggest
from rlhf.draft import Ask, Choice, Draft, draft
from rlhf.entries import KINDS, SINGLE, AlgorithmEntry, Entry, MemoryEntry, Role, StarterEntry, Times
from rlhf.errors import PluginError, Problem, RequestError
from rlhf.facts import Machine, ModelFacts
from rlhf.options import structure
from rlhf.plan import Component, Plan
from rlhf.recipe import Pick, Recipe, RoleRecipe
from rlhf.registry import Registry
from rlhf.roles import roles_of
from rlhf.rows import PromptRow

_MOST_DRAFTS = 400
"""Drafts tried before giving up; each takes well under a millisecond."""


def compose(
    recipe: Recipe, registry: Registry, machine: Machine, models: Mapping[str, ModelFacts] | None = None
) -> Plan:
    """Check and freeze a recipe.

    Args:
        models: facts of models that aren't there yet, by what the recipe calls them: a pipeline's later stages.

    Raises:
        RequestError: with all problems at once and, where it is a matter of combination, the nearest legal one.
    """
    ask = Ask(recipe, registry, machine, models or {})
    first: Draft | None = None
    for choice in itertools.islice(choices(ask), _MOST_DRAFTS):
        tried = draft(ask, choice)
        if tried.plan is not None and not tried.problems:
            return tried.plan
        first = first or tried
        if first.request:  # no other combination mends it
            raise RequestError(first.problems)
    if first is None:  # without an algorithm nothing else can be judged
        found = [registry.find(kind, pick.name) for kind, picks in recipe.picks.items() for pick in picks]
        unknown = [problem for problem in found if isinstance(problem, Problem)]
        raise RequestError(unknown or Problem("no algorithm is installed", "pip install rlhf-kit again"))
    raise RequestError(first.problems, _nearest(ask))


@attrs.frozen
class Chosen:
    """What a recipe would use, for `--help`."""

    entries: Mapping[str, Mapping[str, Entry]]
    """By kind, what options address them by -> entry. Named ones, even where an option that they need is missing, and
    those taken unasked."""
    settings: Mapping[str, Any]
    """Recipe keys -> what stands where the user says nothing, in place of an option's own default."""
    setters: Mapping[str, str]
    """Recipe keys -> who set them."""


def chosen_by(recipe: Recipe, registry: Registry) -> Chosen:
    """What a recipe would use.

    Raises:
        RequestError: one that was named isn't there.
    """
    choice = next(choices(Ask(recipe, registry, facts.machine())), None)
    picks = {**recipe.picks, **(choice.picks if choice else {})}
    own = (pick for role in recipe.roles.values() for pick in role.mem or ())
    picks["mem"] = (*picks.get("mem", ()), *own, *(choice.fillers if choice else ()))
    found: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
    problems = []
    for kind, named in picks.items():
        for pick in named:
            entry = registry.find(kind, pick.name)
            if isinstance(entry, Problem):
                problems.append(entry)
            else:
                found[kind][pick.key] = entry
    if problems:
        raise RequestError(problems)
    return Chosen(found, choice.settings if choice else {}, choice.setters if choice else {})


def _nearest(ask: Ask) -> str:
    """The fewest changes to what was named that make it legal, as a command line; empty when none is near."""
    left = _MOST_DRAFTS
    for recipe in suggest.nearby(ask.recipe, ask.registry):
        other = attrs.evolve(ask, recipe=recipe)
        for choice in choices(other):
            left -= 1
            if left < 0:
                return ""
            tried = draft(other, choice)
            if tried.plan is not None and not tried.problems:
                return suggest.command(recipe)
            if tried.request:
                break
    return ""


def choices(ask: Ask) -> Iterator[Choice]:
    """Every way to fill in what the recipe leaves open, the best-ranked first."""
    named = ask.recipe.picks
    for algo in named.get("algo") or _ranked(ask.registry, "algo"):
        entry = ask.registry.find("algo", algo.name)
        if not isinstance(entry, AlgorithmEntry):
            continue
        starter = _starter(ask.registry, entry)
        settings, setters, scaled = _settings(ask, algo, entry, starter)
        kinds = [kind for kind in SINGLE if kind != "engine" or "rollouts" in entry.requires or named.get("engine")]
        slots = sorted({e.slot for e in _memory(ask.registry) if e.slot and e.rank})
        candidates = [
            *(named.get(kind) or _picks(settings.get(kind)) or _ranked(ask.registry, kind) for kind in kinds),
            *(_slot(ask, slot, settings) for slot in slots),
        ]
        for chosen in _best_first(candidates):
            singles = zip(kinds, chosen[: len(kinds)], strict=True)
            yield Choice(
                algorithm=entry,
                picks={
                    **{kind: (pick,) for kind, pick in singles if pick is not None},
                    "algo": (algo,),
                    "mem": named.get("mem", ()),
                    "reward": named.get("reward") or _picks(settings.get("reward")),
                    "track": _trackers(ask),
                },
                fillers=tuple(pick for pick in chosen[len(kinds) :] if pick is not None),
                starter=starter,
                settings=settings,
                setters=setters,
                scaled=scaled,
            )


def _best_first(candidates: Sequence[Sequence[Pick]]) -> Iterator[tuple[Pick | None, ...]]:
    """The product of the candidates, those with the smallest sum of ranks lost first; None stands where there are
    none."""
    sizes = [range(len(picks) or 1) for picks in candidates]
    found = itertools.islice(itertools.product(*sizes), 20_000)
    for places in sorted(found, key=lambda places: (sum(places), places)):
        yield tuple(picks[i] if picks else None for picks, i in zip(candidates, places, strict=True))


def _ranked(registry: Registry, kind: str) -> list[Pick]:
    return [Pick(entry.name) for entry in registry.entries(kind) if entry.rank > 0]


def _picks(value: Any) -> tuple[Pick, ...]:
    """What a setting names: nothing, one or several."""
    return tuple(Pick(name) for name in ([] if value is None else [value] if isinstance(value, str) else value))


def _trackers(ask: Ask) -> tuple[Pick, ...]:
    """Those that listen unasked, and the named ones, each once; none at all where that is said."""
    named = ask.recipe.picks.get("track")
    if named == ():
        return ()
    asked = {pick.key: pick for pick in named or ()}
    return (*(pick for pick in _ranked(ask.registry, "track") if pick.key not in asked), *asked.values())


def _memory(registry: Registry) -> list[MemoryEntry]:
    return [entry for entry in registry.entries("mem") if isinstance(entry, MemoryEntry)]


def _slot(ask: Ask, slot: str, settings: Mapping[str, Any]) -> list[Pick]:
    """Who may fill a slot, the settings' choice first; nobody where what is named for all roles fills it."""
    members = {entry.name: entry for entry in _memory(ask.registry) if entry.slot == slot}
    if any(pick.name in members for pick in ask.recipe.picks.get("mem", ())):
        return []
    able = ask.machine.provides
    ranked = [Pick(name) for name, entry in members.items() if entry.rank and entry.worthwhile <= able]
    preferred = [pick for pick in _picks(settings.get("mem")) if pick in ranked]
    return [*preferred, *(pick for pick in ranked if pick not in preferred)]


def _starter(registry: Registry, entry: AlgorithmEntry) -> StarterEntry | None:
    fitting = [
        starter
        for starter in registry.starters
        if starter.data_type is (entry.data or PromptRow)
        and (not starter.algorithms or entry.name in starter.algorithms)
    ]
    # One made for this very algorithm goes before one made for all of its kind.
    return max(fitting, key=lambda s: (bool(s.algorithms), s.rank), default=None)


def _settings(
    ask: Ask, algo: Pick, entry: AlgorithmEntry, starter: StarterEntry | None
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """What stands where the user says nothing: the algorithm's defaults, then the starter's for its own parts, then
    what the memory strategies of all trained roles set or multiply. Who set each. And why, of what was multiplied."""
    recipe, settings = ask.recipe, dict(entry.defaults)
    setters = dict.fromkeys(settings, entry.name)
    config, problems = structure(entry.config, {**algo.options, **recipe.options.get("algo", {})}, "--algo.")
    try:
        roles = () if problems else roles_of(Component(entry, config))
    except PluginError:  # the draft tells of it
        roles = ()
    if starter is not None:
        left = [r for r in roles if r.start == "model" and not recipe.roles.get(r.name, RoleRecipe()).model]
        own_model, own_data = not recipe.model and bool(left or problems), not recipe.data
        for given, its_own in (
            (starter.with_model, own_model),
            (starter.with_data, own_data),
            (starter.with_both, own_model and own_data),
        ):
            settings.update(given if its_own else {})
            setters.update(dict.fromkeys(given, f"the starter {starter.name!r}") if its_own else {})
    scaled: dict[str, str] = {}
    for strategy in _of_all_trained(ask, roles):
        for key, value in strategy.defaults.items():
            before = settings.get(key)
            if isinstance(value, Times):
                usual = "what is usual" if before is None else f"the usual {before:g}"
                if setters.get(key, entry.name) != entry.name:
                    usual = f"the {before:g} of {setters[key]}"
                settings[key] = value if before is None else value.of(before)
                setters[key] = f"{strategy.name}: {value.factor:g} times {usual}"
                scaled[key] = f"{value.factor:g} times {usual}, for --mem {strategy.name} ({value.source})"
            elif before is None:
                settings[key], setters[key] = value, strategy.name
    return settings, setters, scaled


def _of_all_trained(ask: Ask, roles: Sequence[Role]) -> list[MemoryEntry]:
    """The memory strategies named that every trained role has; a head on another's trunk has what that has."""
    everyone = ask.recipe.picks.get("mem", ())
    named: list[set[str]] = []
    for role in (role for role in roles if role.trainable and role.shares is None):
        own = ask.recipe.roles.get(role.name, RoleRecipe()).mem
        named.append({pick.name for pick in (everyone if own is None else own)})
    return [entry for entry in _memory(ask.registry) if named and all(entry.name in names for names in named)]
