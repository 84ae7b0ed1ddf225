"""`rlhf run --resume`: what a line means in a folder that holds a run, and what a run that was stopped leaves there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from rlhf import options
from rlhf.entries import MemoryEntry
from rlhf.errors import Problem, RequestError
from rlhf.place import here
from rlhf.recipe import Recipe, from_mapping
from rlhf.registry import loaded

if TYPE_CHECKING:
    from rlhf.rundir import RunDirectory


def repeated(recipe: Recipe, output: Path | None) -> Recipe:
    """The recipe that the run directory holds, with what was typed on top: what isn't typed is as it was. Where there
    is nothing to go on from yet, a line that names an algorithm stands for itself."""
    if output is None:
        raise RequestError(Problem("--resume needs the run to go on with", "--output DIR"))
    whole = bool(recipe.picks.get("algo"))
    if not (output / "recipe.yaml").is_file():
        if whole:
            return recipe
        runs = sorted(place.parent.name for place in output.parent.glob("*/recipe.yaml"))
        near = options.nearest(output.name, runs)
        fix = f"did you mean --output {output.parent / near}?" if near else "name an --algo to begin one"
        raise RequestError(Problem(f"--resume: {output} holds no run to go on with", fix))
    from rlhf.rundir import RunDirectory

    directory = RunDirectory(output)
    if whole and not directory.begun:
        return recipe
    stored = directory.recipe()
    if "backend" not in recipe.picks and _alone(recipe, stored) != _was_alone(directory):
        stored.pop("backend", None)  # one that fits the ranks there are now is chosen anew
    before = from_mapping(stored, str(output / "recipe.yaml"))
    there, now = (found.picks["algo"][0].name for found in (before, recipe if whole else before))
    if there != now:
        directory.refuse([f"algo: {there} there, {now} now"])
    return _laid_over(before, recipe, directory)


def _alone(recipe: Recipe, stored: Mapping[str, Any]) -> bool:
    """The run that goes on is to be of one process."""
    return here().size == 1 and str(recipe.run.get("nproc", stored.get("nproc", 1))) == "1"


def _was_alone(directory: RunDirectory) -> bool:
    plan = directory.plan_json()
    return max(int(plan["run"]["nproc"]), int(plan["machine"]["world_size"])) == 1


def _laid_over(before: Recipe, typed: Recipe, directory: RunDirectory) -> Recipe:
    """A stored recipe, which says everything of each role, with what was typed on top."""
    roles, run, options = dict(before.roles), dict(before.run), dict(typed.options)
    plan = directory.plan_json() if typed.model else {"roles": []}
    for role in plan["roles"]:  # stored for each of them, and now typed for all
        name = role["role"]["name"]
        if name in roles and role["role"]["start"] == "model":
            roles[name] = attrs.evolve(roles[name], model=None)
    if "epochs" in typed.run and str(typed.run["epochs"]) not in (str(run.get("epochs")), f"{run.get('epochs'):g}"):
        run["max_steps"] = None  # else they would say nothing
    named, picks = typed.picks.get("mem", ()), dict(typed.picks)
    of_roles = [pick for role in roles.values() for pick in role.mem or ()]
    if of_roles and {pick.name for pick in named} <= {pick.name for pick in of_roles}:
        picks.pop("mem", None)  # who has which is stored; options are for all who have it
        options.update({f"mem.{p.key}": {**p.options, **options.get(f"mem.{p.key}", {})} for p in named if p.options})
    elif named:
        roles = {name: attrs.evolve(role, mem=None) for name, role in roles.items()}
        slots = {entry.slot for pick in named if isinstance(entry := loaded().find("mem", pick.name), MemoryEntry)}
        kept = [pick for pick in before.picks.get("mem", ()) if pick.name not in {one.name for one in named}]
        stored = ((pick, loaded().find("mem", pick.name)) for pick in kept)
        others = (
            p for p, entry in stored if not (isinstance(entry, MemoryEntry) and entry.slot and entry.slot in slots)
        )
        picks["mem"] = (*named, *others)
    typed = attrs.evolve(typed, picks=picks, options=options)
    return attrs.evolve(before, roles=roles, run=run).merged(typed)


def what_stands(place: Path | None, home: Path) -> str:
    """What a run that was stopped at once leaves to go on from.

    Args:
        home: the working folder that it was started in, and may have left.
    """
    found = sorted((home / place).glob("checkpoints/step-*/manifest.json")) if place else []
    if found:
        return f"interrupted; {found[-1].parent.name} stands: rlhf run --resume --output {place}"
    log = home / place / "metrics.jsonl" if place else None
    first = "step" if log is None or not log.is_file() or not log.stat().st_size else "checkpoint"
    return f"interrupted before the first {first}; no checkpoint was written"
