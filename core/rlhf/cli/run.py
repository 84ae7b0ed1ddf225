"""`rlhf run`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs
import click
import yaml

from rlhf import rank
from rlhf.cli import say
from rlhf.cli.plan import planned
from rlhf.cli.recipes import RecipeCommand, recipe_of, recipe_options
from rlhf.cli.resume import repeated, what_stands
from rlhf.errors import Interrupted, Problem, RankLost, RequestError, RunError
from rlhf.place import Place, here
from rlhf.plan import Plan

_PACKAGE = "rlhf-kit"


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
    place, home = Path(output) if output else None, Path.cwd()
    try:
        recipe = recipe_of(ctx, recipe_file, flags)
        if resume:
            recipe = repeated(recipe, place)
        plan = planned(recipe)
        if dry_run and here().rank == 0:
            click.echo(yaml.safe_dump(plan.to_recipe(), sort_keys=False, allow_unicode=True), nl=False)
        if dry_run:
            return 0
        settle()
        from rlhf.rundir import default_path

        place = place or default_path(plan.algo.name)
        return carry_out(plan, place, resume)
    except KeyboardInterrupt as stopped:  # a stop after a step saves a checkpoint, and the loop tells of it
        raise Interrupted(what_stands(place, home)) from stopped


def carry_out(plan: Plan, output: Path, resume: bool) -> int:
    """Run a plan in its directory: every rank that is to be started, or the one that this process is. Returns 0;
    failures are raised."""
    settle()
    from rlhf.component import Context, Launcher
    from rlhf.registry import resolve

    job = rank.Job(plan, output, resume)
    place = here()
    if place.joined:
        return _joined(job, place)
    found = rank.look(job)  # here too, so that what is wrong is said before any process is started
    if found.get("problems"):
        raise RequestError([Problem(**problem) for problem in found["problems"]])
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        path = Path(folder) / "job.json"
        job.write(path)
        launcher: Launcher = resolve(plan.launch)(plan.launch.config, Context(plan=plan))
        return launcher.launch(lambda: rank.carry_out(job, say), [sys.executable, "-m", "rlhf.rank", str(path)])


def _joined(job: rank.Job, place: Place) -> int:
    """This process's rank. What fails in another than rank 0 alone says so: all of them share a terminal."""
    try:
        return rank.carry_out(job, say)
    except RequestError as error:
        if place.rank == 0:
            raise
        raise RequestError([attrs.evolve(p, what=f"rank {place.rank}: {p.what}") for p in error.problems]) from error
    except RankLost as error:
        raise RankLost(f"rank {place.rank}: {error}") from error
    except RunError as error:
        raise RunError(f"rank {place.rank}: {error}") from error


def settle() -> None:
    """What must be so before anything heavy is imported: it is there, and it finds the environment that it reads then.
    What the user has set stays.

    Raises:
        RequestError: torch isn't installed, which planning does without and running doesn't.
    """
    if importlib.util.find_spec("torch") is None:
        raise RequestError(Problem("torch isn't installed, and this command needs it", _install_line()))
    # These speak to a programmer who loads one model, not to the user of a run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait soon sleep. On an idle machine this costs nothing; where anything else wants a core, threads
    # that spin for long (the default) make a run several times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _install_line() -> str:
    """The command that installs what this package depends on and lacks."""
    try:
        wanted = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # imported from a folder
        wanted = []
    lacking = [f"'{need.partition(';')[0].strip()}'" for need in wanted if "extra ==" not in need and not _has(need)]
    return f"pip install {' '.join(lacking) or 'torch'}"


def _has(requirement: str) -> bool:
    found = re.match(r"[\w.-]+", requirement)
    try:
        return found is None or bool(importlib.metadata.version(found.group()))
    except importlib.metadata.PackageNotFoundError:
        return False
