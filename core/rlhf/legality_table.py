"""Which combinations are legal: the composer is asked for each, so that the table and a run can't disagree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from rlhf import facts
from rlhf.compose import choices
from rlhf.draft import Ask, draft
from rlhf.entries import AlgorithmEntry
from rlhf.errors import Problem
from rlhf.facts import Machine, ModelFacts
from rlhf.options import structure
from rlhf.plan import Component, resource
from rlhf.recipe import Pick, Recipe, RoleRecipe
from rlhf.registry import Registry
from rlhf.roles import roles_of

AXES = ("algo", "engine", "mem", "optim", "backend")
"""Kinds that the table is of."""


@attrs.frozen(kw_only=True)
class Cell:
    """One combination and what the composer says of it."""

    algo: str
    engine: str
    """Empty where the algorithm samples nothing."""
    mem: tuple[str, ...]
    """As named for all roles; slots that this leaves open are filled as in a run."""
    optim: str
    backend: str
    legal: bool
    nproc: int
    """Processes with which it is legal: as asked for, else 2."""
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "mem": list(self.mem), "reasons": list(self.reasons)}


@attrs.frozen(kw_only=True)
class Wanted:
    """What the table is to show."""

    only: Mapping[str, tuple[str, ...]] = attrs.Factory(dict)
    """Kind -> names; a kind that is left out shows all of its own. For "mem", sets joined by commas."""
    together: int = 2
    """Memory strategies at once, at most."""
    nproc: int = 1
    told: Recipe = attrs.Factory(Recipe)
    """What every combination is told besides, of picks and of roles' models: a reward, and the model that it asks."""


def table(registry: Registry, machine: Machine, wanted: Wanted) -> Iterator[Cell]:
    """Every combination, algorithm by algorithm.

    Args:
        wanted: names must be known: see `unknown`.
    """
    judged_before: dict[Any, list[Cell]] = {}
    for algo in _names(registry, "algo", wanted):
        entry = registry.find("algo", algo)
        if not isinstance(entry, AlgorithmEntry):
            continue
        base = base_recipe(entry, registry, machine)
        alike = _as_composed(entry), base == Recipe()
        base = _told(base, wanted.told)
        if alike in judged_before:
            yield from (_of_another(cell, algo) for cell in judged_before[alike])
            continue
        cells = judged_before[alike] = []
        for cell in _of_algorithm(algo, entry, base, registry, machine, wanted):
            cells.append(cell)
            yield cell


def _told(base: Recipe, more: Recipe) -> Recipe:
    return attrs.evolve(base, picks={**base.picks, **more.picks}, roles={**base.roles, **more.roles})


def _of_algorithm(
    algo: str, entry: AlgorithmEntry, base: Recipe, registry: Registry, machine: Machine, wanted: Wanted
) -> Iterator[Cell]:
    engines = _names(registry, "engine", wanted) if "rollouts" in entry.requires else [""]
    optims, backends = (_names(registry, kind, wanted) for kind in ("optim", "backend"))
    given = (role.model for role in base.roles.values() if role.model)
    paths = {*(starter.model for starter in registry.starters), *given}
    read = {path: facts.model(resource(path)) for path in {*paths, *map(resource, paths)}}
    models = {path: found for path, found in read.items() if isinstance(found, ModelFacts)}
    for engine, optim, backend in itertools.product(engines, optims, backends):
        ask = _Asked(base, registry, machine, algo, engine, optim, backend, models)
        # with as many processes as the rest goes with; where it goes with neither, both are tried each time
        asked = tuple(dict.fromkeys((wanted.nproc, max(wanted.nproc, 2))))
        fitting = tuple(n for n in asked if not ask.reasons((), n)) or asked
        yield from (ask.cell(mem, fitting) for mem in _memories(registry, wanted))


def _as_composed(entry: AlgorithmEntry) -> Any:
    """All that composing looks at: where two algorithms have the same, one is judged for both."""
    config, problems = structure(entry.config, {}, "--algo.")
    roles = () if problems else roles_of(Component(entry, config))
    modules = tuple(sorted(entry.modules))
    return entry.requires, entry.provides, entry.conflicts, entry.constraints, modules, roles, entry.data, entry.rewards


def _of_another(cell: Cell, algo: str) -> Cell:
    """The cell of an algorithm that is alike; reasons name this one."""
    name = re.compile(rf"(?<![\w+-]){re.escape(cell.algo)}(?![\w+-])")
    return attrs.evolve(cell, algo=algo, reasons=tuple(name.sub(algo, reason) for reason in cell.reasons))


def unknown(registry: Registry, wanted: Wanted) -> list[Problem]:
    """Names that nothing installed has."""
    asked = [(kind, name) for kind, names in wanted.only.items() for one in names for name in one.split(",") if name]
    found = [registry.find(kind, name) for kind, name in asked]
    return [problem for problem in found if isinstance(problem, Problem)]


def _names(registry: Registry, kind: str, wanted: Wanted) -> list[str]:
    return list(wanted.only.get(kind) or (entry.name for entry in registry.entries(kind)))


def _memories(registry: Registry, wanted: Wanted) -> list[tuple[str, ...]]:
    """Nothing, each alone, each two together, ..."""
    if wanted.only.get("mem"):
        return [tuple(name for name in one.split(",") if name) for one in wanted.only["mem"]]
    names = sorted(entry.name for entry in registry.entries("mem"))
    return [mem for count in range(wanted.together + 1) for mem in itertools.combinations(names, count)]


@attrs.frozen
class _Asked:
    """All of a combination but the memory strategies."""

    base: Recipe
    registry: Registry
    machine: Machine
    algo: str
    engine: str
    optim: str
    backend: str
    models: Mapping[str, ModelFacts]
    """Read once, not for each combination."""

    def cell(self, mem: tuple[str, ...], processes: Sequence[int]) -> Cell:
        """Legal with the first of these numbers of processes with which it is; else the reasons of the first."""
        judgements = {n: self.reasons(mem, n) for n in processes}
        legal = next((n for n, reasons in judgements.items() if not reasons), None)
        return Cell(
            algo=self.algo,
            engine=self.engine,
            mem=mem,
            optim=self.optim,
            backend=self.backend,
            legal=legal is not None,
            nproc=legal or processes[0],
            reasons=() if legal else judgements[processes[0]],
        )

    def reasons(self, mem: Sequence[str], nproc: int) -> tuple[str, ...]:
        """What the composer has against it."""
        named = {"algo": self.algo, "engine": self.engine, "optim": self.optim, "backend": self.backend}
        picks = {**self.base.picks, **{kind: (Pick(name),) for kind, name in named.items() if name}}
        picks |= {"mem": tuple(map(Pick, mem))} if mem else {}
        recipe = attrs.evolve(self.base, picks=picks, run={**self.base.run, "nproc": nproc})
        return judged(Ask(recipe, self.registry, self.machine, self.models))


def judged(ask: Ask) -> tuple[str, ...]:
    """What speaks against the best of the ways to fill in what a recipe leaves open; nothing where one is legal."""
    first: tuple[str, ...] = ()
    for choice in itertools.islice(choices(ask), 40):
        tried = draft(ask, choice)
        if tried.plan is not None and not tried.problems:
            return ()
        first = first or tuple(problem.what for problem in tried.problems)
        if tried.request:
            break
    return first or ("no component of some kind is installed",)


def base_recipe(entry: AlgorithmEntry, registry: Registry, machine: Machine) -> Recipe:
    """A recipe of the algorithm that lacks neither model nor data nor reward: the built-in example's where it has one,
    else whatever there is, since nothing is read but config.json."""
    named = Recipe(picks={"algo": (Pick(entry.name),)})
    if not judged(Ask(named, registry, machine)) or not registry.starters:
        return Recipe()
    starter = registry.starters[0]
    model = resource(starter.model)
    config, problems = structure(entry.config, {}, "--algo.")
    roles = () if problems else roles_of(Component(entry, config))
    given = Recipe(
        model=model,
        data=(resource(starter.data),),
        roles={role.name: RoleRecipe(model=model) for role in roles if role.start == "given"},
    )
    if "rollouts" not in entry.requires or not entry.rewards:
        return given
    for reward in registry.entries("reward"):
        tried = attrs.evolve(given, picks={"reward": (Pick(reward.name),)})
        full = attrs.evolve(tried, picks={**tried.picks, **named.picks})
        if not judged(Ask(full, registry, machine)):
            return tried
    return given
