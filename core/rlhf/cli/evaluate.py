"""`rlhf eval`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import click

from rlhf.cli import say
from rlhf.cli.run import planned, settle
from rlhf.errors import Problem, RequestError
from rlhf.recipe import from_mapping


@click.command("eval")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", multiple=True, help="held-out data; left out, the run's own")
@click.option("--rows", type=click.IntRange(min=1), help="at most so many rows; left out, the run's own limit")
@click.option("--checkpoint", help="a checkpoint's name, such as step-000100, or 'best'; left out, the last")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
def evaluate(run_dir: Path, data: tuple[str, ...], rows: int | None, checkpoint: str | None, as_json: bool) -> None:
    """Held-out scores of a run's model, by the run's own measure: rewards of samples online, loss offline."""
    settle()
    from rlhf import checkpoint as checkpoints
    from rlhf.assemble import assemble
    from rlhf.heldout import evaluate as measure
    from rlhf.parts import restore
    from rlhf.rundir import RunDirectory

    directory = RunDirectory(run_dir)
    recipe = directory.recipe()
    if data:
        recipe["eval_data"] = list(data)
    plan = planned(from_mapping(recipe, str(run_dir / "recipe.yaml")))
    saved = {found.path.name: found for found in checkpoints.whole(directory.checkpoints)}
    if not saved:
        raise RequestError(Problem(f"{run_dir}: holds no checkpoint to evaluate"))
    name = checkpoint or list(saved)[-1]
    if name == "best":
        best = (directory.summary() or {}).get("best")
        name = f"step-{best['step']:06d}" if best else list(saved)[-1]
    if name not in saved:
        raise RequestError(Problem(f"{run_dir}: there is no checkpoint {name!r}", f"it holds {', '.join(saved)}"))
    try:
        state = checkpoints.load(saved[name].path)
    except ValueError as error:
        raise RequestError(Problem(str(error), f"it holds {', '.join(saved)}")) from error
    parts = assemble(plan, say)
    with contextlib.closing(parts):
        restore(parts, state)
        parts.hold_out(rows)
        found = measure(parts)
    if as_json:
        click.echo(json.dumps({"checkpoint": name, **found}, indent=1))
        return
    click.echo(f"{run_dir} {name}")
    for key, value in found.items():
        click.echo(f"  {key:<24} {value:.6g}")
