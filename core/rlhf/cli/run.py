"""`rlhf run` and `rlhf plan`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import click
import yaml

from rlhf import facts, options
from rlhf.cli import say
from rlhf.cli.recipes import RecipeCommand, recipe_of, recipe_options
from rlhf.compose import compose
from rlhf.errors import Problem, RequestError
from rlhf.plan import Plan
from rlhf.recipe import Recipe, from_mapping
from rlhf.registry import loaded


@click.command(cls=RecipeCommand)
@recipe_options
@click.option("--output", metavar="DIR", help="run directory; left out, runs/ALGO-DATE-TIME")
@click.option(
    "--resume", is_flag=True, help="go on from the newest whole checkpoint in --output; from 0 if there is none"
)
@click.option("--dry-run", is_flag=True, help="print the resolved recipe as YAML, and do nothing")
@click.pass_context
def run(
    ctx: click.Context, /, recipe_file: str | None, output: str | None, resume: bool, dry_run: bool, **flags: Any
) -> int:
    """Train: compose a run from a recipe and flags, check it, and carry it out.

    With nothing named, an example that ships with the plugins is used: a tiny model, data and, online, a reward.
    """
    recipe = recipe_of(ctx, recipe_file, flags)
    if resume and output is None:
        raise RequestError(Problem("--resume needs the run to go on with", "--output DIR"))
    if resume and output is not None:
        recipe = _repeat(recipe, Path(output))
    plan = planned(recipe)
    if dry_run:
        click.echo(yaml.safe_dump(plan.to_recipe(), sort_keys=False, allow_unicode=True), nl=False)
        return 0
    return carry_out(plan, Path(output) if output else None, resume)


@click.command(cls=RecipeCommand)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="print the plan as JSON")
@click.pass_context
def plan(ctx: click.Context, /, recipe_file: str | None, as_json: bool, **flags: Any) -> int:
    """Show the plan that `rlhf run` with the same arguments would carry out, or every reason why it can't.

    Loads no weights. Exit code 0 when the plan is accepted, 2 when not.
    """
    accepted = planned(recipe_of(ctx, recipe_file, flags))
    click.echo(json.dumps(accepted.to_json(), indent=1) if as_json else describe(accepted))
    return 0


def planned(recipe: Recipe) -> Plan:
    """Compose, after saying what is wrong with any plugin."""
    registry = loaded()
    for warning in registry.warnings:
        say(f"warning: {warning}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return compose(recipe, registry, facts.machine(world))


def _repeat(recipe: Recipe, output: Path) -> Recipe:
    """Where nothing was said of what is computed, the recipe that the run directory holds, with the rest on top."""
    picks = {kind: chosen for kind, chosen in recipe.picks.items() if kind not in ("track", "launch")}
    computed = attrs.evolve(recipe, run={}, picks=picks)
    if computed != Recipe():
        return recipe
    if not (output / "recipe.yaml").is_file():
        runs = sorted(place.parent.name for place in output.parent.glob("*/recipe.yaml"))
        near = options.nearest(output.name, runs)
        fix = f"did you mean --output {output.parent / near}?" if near else "name an --algo to begin one"
        raise RequestError(Problem(f"--resume: {output} holds no run to go on with", fix))
    from rlhf.rundir import RunDirectory

    return from_mapping(RunDirectory(output).recipe(), str(output / "recipe.yaml")).merged(recipe)


def carry_out(plan: Plan, output: Path | None, resume: bool) -> int:
    """Run a plan in its directory. Returns 0; failures are raised."""
    settle()
    from rlhf.assemble import assemble, make
    from rlhf.interfaces import Context, Launcher
    from rlhf.loop import Loop, resume_from
    from rlhf.parts import check_data
    from rlhf.rundir import RunDirectory, default_path

    directory = RunDirectory(output or default_path(plan.algo.name))
    directory.check(plan, resume)
    before = directory.summary() if resume else None
    if before and before.get("status") == "done" and _as_long(directory.recipe(), plan):
        say(f"{directory.path}: already finished after {before['steps']} steps; nothing to do")
        return 0

    def rank() -> int:
        with contextlib.ExitStack() as held:
            parts = assemble(plan, say)
            held.callback(parts.close)
            directory.open(plan)
            held.callback(directory.close)
            found = resume_from(directory, say) if resume else None
            if found:
                check_data(parts, found[1])
            if resume:
                fresh = f"{directory.path} holds no checkpoint yet: starting from 0"
                directory.cut_back(found[1]["loop"]["step"] if found else 0)
                say(f"resuming from {found[0]}" if found else fresh)
            Loop(parts, directory, say).run(found[1] if found else None)
        return 0

    launcher: Launcher = make(plan.launch, Context(plan=plan))
    return launcher.launch(rank)


def settle() -> None:
    """Environment that libraries read when they are imported; what the user has set stays."""
    # These speak to a programmer who loads one model, not to the user of a run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait soon sleep. On an idle machine this costs nothing; where anything else wants a core, threads
    # that spin for long (the default) make a run several times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _as_long(stored: Mapping[str, Any], plan: Plan) -> bool:
    """The plan goes on no longer than the run that was made of the stored recipe."""
    return (stored.get("max_steps"), stored.get("epochs")) == (plan.run.max_steps, plan.run.epochs)


def describe(plan: Plan) -> str:
    """A plan as text."""
    lines = [f"algorithm  {plan.algo.name}: {plan.algo.entry.summary}"]
    lines.append(f"policy     {plan.policy.name}")
    if plan.engine:
        lines.append(f"engine     {plan.engine.name}: {plan.engine.entry.summary}")
    lines += [
        f"reward     {c.key}, weight {getattr(c.config, 'weight', 1.0):g}: {c.entry.summary}" for c in plan.rewards
    ]
    lines.append(f"optimiser  {plan.optim.name}")
    lines.append(f"backend    {plan.backend.name}: {plan.backend.entry.summary}")
    lines += [f"data       {source.path} ({source.format.name})" for source in plan.data]
    lines += [f"held out   {source.path} ({source.format.name})" for source in plan.eval_data]
    lines.append("roles")
    for role in plan.roles:
        kind = "trained" if role.role.trainable else "frozen"
        where = {
            "own": f"{role.model.path}  [{', '.join(c.name for c in role.mem)}]",
            "adapters-off": f"{role.module} with its adapters off",
            "trunk": f"a head on {role.module}'s trunk",
        }[role.view]
        lines.append(f"  {role.name:<10} {kind:<8} {role.role.head:<7} {where}")
    run = plan.run
    steps = f"{run.max_steps} steps" if run.max_steps else f"{run.epochs:g} passes over the data"
    lines.append(f"length     {steps}, {run.batch_size} {'prompts' if plan.online else 'rows'} a step, seed {run.seed}")
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)
