"""What to type instead: the recipes that are one or two changes away, and a recipe as a command line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import attrs

from rlhf.entries import KINDS, NONE, SINGLE, address
from rlhf.options import typed
from rlhf.recipe import Pick, Picks, Recipe
from rlhf.registry import Registry


def nearby(recipe: Recipe, registry: Registry) -> Iterator[Recipe]:
    """The recipes with the fewest changes to what was named first. Options of what goes away go with it."""
    single = list(_edits(recipe.picks, registry))
    for picks in single:
        yield _with(recipe, picks)
    yield from _of_roles(recipe, registry)
    for first in single:
        for picks in _edits(first, registry):
            yield _with(recipe, picks)


def _with(recipe: Recipe, picks: Picks) -> Recipe:
    gone = {
        address(kind, pick.key)
        for kind, named in recipe.picks.items()
        for pick in named
        if pick not in picks.get(kind, ())
    }
    kept = {prefix: options for prefix, options in recipe.options.items() if prefix not in gone}
    return attrs.evolve(recipe, picks=picks, options=kept)


def _of_roles(recipe: Recipe, registry: Registry) -> Iterator[Recipe]:
    """One memory strategy more, or less, of those that were chosen for a role alone."""
    for role, asked in recipe.roles.items():
        mem = asked.mem or ()
        more = [(*mem, Pick(strategy.name)) for strategy in registry.entries("mem")] if mem else []
        for changed in (*more, *(mem[:i] + mem[i + 1 :] for i in range(len(mem)))):
            roles = {**recipe.roles, role: attrs.evolve(asked, mem=changed or None)}
            gone = {address("mem", pick.key) for pick in mem if pick not in changed}
            kept = {prefix: options for prefix, options in recipe.options.items() if prefix not in gone}
            yield attrs.evolve(recipe, roles=roles, options=kept)


def _edits(named: Picks, registry: Registry) -> Iterator[Picks]:
    """One component less, one memory strategy more, or another component of a kind."""
    for kind in ("mem", "reward"):
        for i in range(len(named.get(kind, ()))):
            yield {**named, kind: (*named[kind][:i], *named[kind][i + 1 :])}
    memory = named.get("mem", ())
    present = {pick.name for pick in memory}
    for strategy in registry.entries("mem"):
        if strategy.name not in present:
            yield {**named, "mem": (*memory, Pick(strategy.name))}
    for kind in SINGLE:
        if named.get(kind):
            yield {other: picks for other, picks in named.items() if other != kind}
            for entry in registry.entries(kind):
                if entry.name != named[kind][0].name:
                    yield {**named, kind: (Pick(entry.name),)}


def command(recipe: Recipe) -> str:
    """A recipe as a command line, to be pasted."""

    def name(pick: Pick) -> str:
        return f"{pick.name}:{pick.label}" if pick.label else pick.name

    words = ["rlhf", "run"]
    options = dict(recipe.options)
    for kind in KINDS:
        if kind == "track" and recipe.picks.get(kind) == ():
            words += [f"--{kind}", NONE]
        for pick in recipe.picks.get(kind, ()):
            words += [f"--{kind}", name(pick)]
            prefix = address(kind, pick.key)
            options[prefix] = {**pick.options, **options.get(prefix, {})}
    for role, asked in recipe.roles.items():
        words += ["--model", f"{role}={asked.model}"] if asked.model else []
        words += ["--mem", f"{role}={','.join(map(name, asked.mem))}"] if asked.mem else []
    words += ["--model", recipe.model] if recipe.model else []
    data = (("--data", recipe.data), ("--eval-data", recipe.eval_data), ("--ptx-data", recipe.ptx_data))
    for flag, paths in data:
        words += [word for path in paths for word in (flag, path)]
    for prefix, given in options.items():
        words += [f"--{prefix}.{option.replace('_', '-')}={typed(value)}" for option, value in given.items()]
    for option, value in recipe.run.items():
        flag = f"--{option.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)] if value not in (None, False) else []
    return shlex.join(words)
