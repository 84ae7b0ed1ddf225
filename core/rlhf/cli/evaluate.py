"""`rlhf eval`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlhf.cli import Command, say
from rlhf.cli.plan import planned
from rlhf.cli.run import settle
from rlhf.errors import Problem, RequestError
from rlhf.recipe import from_mapping

if TYPE_CHECKING:
    from rlhf.rundir import RunDirectory


@click.command("eval", cls=Command)
@click.argument("source", metavar="RUN_DIR")
@click.option("--data", metavar="PATH", multiple=True, help="held-out data; left out, the run's own")
@click.option("--rows", type=click.IntRange(min=1), help="at most so many rows; left out, the run's own limit")
@click.option("--checkpoint", help="a checkpoint's name, such as step-000100, or 'best'; left out, the last")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
def evaluate(source: str, data: tuple[str, ...], rows: int | None, checkpoint: str | None, as_json: bool) -> None:
    """Held-out scores of a run's model, by the run's own measure: rewards of samples online, loss offline."""
    settle()
    run_dir = Path(source)
    from rlhf.assemble import assemble
    from rlhf.heldout import evaluate as measure
    from rlhf.models import weight_stream
    from rlhf.parts import restore
    from rlhf.rundir import RunDirectory

    directory = RunDirectory(run_dir)
    recipe = directory.recipe()
    if data:
        recipe["eval_data"] = list(data)
    plan = planned(from_mapping(recipe, str(run_dir / "recipe.yaml")))
    name, state = saved_state(directory, checkpoint)
    parts = assemble(plan, say)
    with contextlib.closing(parts):
        restore(parts, state)
        if parts.sampler is not None:
            parts.sampler.engine.sync(weight_stream(parts.models, "policy"), state["loop"]["step"])
        parts.hold_out(rows)
        found = measure(parts)
    if as_json:
        click.echo(json.dumps({"checkpoint": name, **found}, indent=1))
        return
    click.echo(f"{run_dir} {name}")
    for key, value in found.items():
        click.echo(f"  {key:<24} {value:.6g}")


def saved_state(directory: RunDirectory, name: str | None) -> tuple[str, dict[str, Any]]:
    """A checkpoint's name and what it holds.

    Args:
        name: a checkpoint's own, or "best"; None is the last.

    Raises:
        RequestError: there is no such one, or it isn't whole.
    """
    from rlhf.checkpoint import load
    from rlhf.saved import whole

    saved = {found.path.name: found for found in whole(directory.checkpoints)}
    if not saved:
        raise RequestError(Problem(f"{directory.shown}: holds no checkpoint"))
    chosen = name or list(saved)[-1]
    if chosen == "best":
        best = (directory.summary() or {}).get("best")
        chosen = f"step-{best['step']:06d}" if best else list(saved)[-1]
    fix = f"it holds {', '.join(saved)}"
    if chosen not in saved:
        raise RequestError(Problem(f"{directory.shown}: there is no checkpoint {chosen!r}", fix))
    try:
        return chosen, load(saved[chosen].path)
    except ValueError as error:
        raise RequestError(Problem(str(error), fix)) from error
