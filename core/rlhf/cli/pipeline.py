"""`rlhf pipeline`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import yaml

from rlhf import library
from rlhf.cli import Command, say
from rlhf.cli.run import settle
from rlhf.errors import Problem, RequestError
from rlhf.place import here
from rlhf.recipe import key_of, parse_yaml, read_yaml
from rlhf.registry import loaded


def _list(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        for name, file in library.shipped().items():
            click.echo(f"{name:<16} {library.about(file)}\n{'':<16} {file}")
        ctx.exit()


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE.yaml|NAME")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="list the shipped recipes"
)
@click.option(
    "--set",
    "settings",
    metavar="PATH=VALUE",
    multiple=True,
    help="set a key, such as model=PATH or sft.data=FILE",
)
@click.option("--output", metavar="DIR", help="left out, runs/NAME-DATE-TIME")
@click.option("--resume", is_flag=True, help="go on inside a stage that was interrupted")
@click.option("--dry-run", is_flag=True, help="check every stage, print the pipeline as YAML, and do nothing")
def pipeline(recipe_file: str, settings: tuple[str, ...], output: str | None, resume: bool, dry_run: bool) -> int:
    """Run the stages of a recipe, a file or one that is shipped, each a run of its own in DIR/STAGE, outputs feeding
    inputs.

    All stages are checked before the first one starts. A stage that is done is not redone.
    """  # fmt: skip
    from rlhf.pipeline import carry_out, check, stages_of

    found = here()
    if found.joined:
        what = f"{found.source} started this as rank {found.rank} of {found.size}, and each would run it all"
        fix = f"start it once, by itself: stages start their own ranks where the recipe says nproc: {found.size}"
        raise RequestError(Problem(f"rlhf pipeline: {what}", fix))
    content = read_yaml(library.find(recipe_file))
    for setting in settings:
        _set(content, setting)
    stages = stages_of(content, recipe_file)
    registry = loaded()
    for warning in registry.warnings:
        say(f"warning: {warning}")
    check(stages, recipe_file, registry)
    if dry_run:
        click.echo(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), nl=False)
        return 0
    settle()
    place = Path(output) if output else Path("runs") / f"{Path(recipe_file).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    results = carry_out(stages, place, resume, say)
    for result in results:
        click.echo(_line(result))
    return 0


def _set(content: dict[str, Any], setting: str) -> None:
    path, sign, value = setting.partition("=")
    keys = path.split(".")
    if not (sign and value and all(keys)):
        raise RequestError(Problem(f"--set {setting}: must read PATH=VALUE", "--set sft.data=FILE"))
    stages = content.get("stages")
    place: Any = content
    if isinstance(stages, dict) and keys[0] in stages:
        place = stages
    for key in keys[:-1]:
        inner = place.get(key)
        if isinstance(inner, str):  # `algo: ppo` becomes `algo: {name: ppo}`
            inner = {"name": inner}
        place[key] = inner if isinstance(inner, dict) else {}
        place = place[key]
    for key in [key for key in place if key_of(key) == key_of(keys[-1])]:  # what it takes the place of, however spelt
        keys[-1] = key
    try:  # @STAGE is no YAML by itself
        place[keys[-1]] = value if value.startswith("@") else parse_yaml(value)
    except ValueError as error:
        what = f"--set {setting}: the value is no YAML: {error}"
        raise RequestError(Problem(what, f"put it in quotes: --set '{path}=\"...\"'")) from error


def _line(result: dict[str, Any]) -> str:
    before, after = result.get("heldout_before") or {}, result.get("heldout_after") or {}
    scores = ", ".join(f"{k} {before[k]:.4g} -> {after[k]:.4g}" for k in before if k in after)
    memory = result.get("peak_rss_bytes", 0) / 1e9
    return (
        f"{result['stage']}: {result.get('status')}, {result.get('steps')} steps, "
        f"{result.get('wall_seconds', 0):.0f} s, {memory:.2f} GB; held out: {scores or 'nothing'}"
    )
