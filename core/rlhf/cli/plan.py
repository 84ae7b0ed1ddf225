"""`rlhf plan`: what a run would be, what it takes, and whether that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rlhf import facts
from rlhf.cli import say
from rlhf.cli.recipes import RecipeCommand, recipe_of, recipe_options
from rlhf.compose import compose
from rlhf.draft import Ask
from rlhf.errors import Problem, RequestError
from rlhf.facts import Machine
from rlhf.floor import Peaks
from rlhf.place import here
from rlhf.plan import Plan
from rlhf.planning.architecture import Uncountable
from rlhf.planning.devices import memory_size, planned_machine
from rlhf.planning.fit import Fit, nearest_fit
from rlhf.planning.memory import Lengths, assumed_lengths
from rlhf.planning.prediction import Prediction, prediction
from rlhf.planning.text import describe, resources, size, verdict
from rlhf.recipe import Recipe
from rlhf.registry import Registry, loaded


@click.command(cls=RecipeCommand)
@recipe_options
@click.option("--device-memory", metavar="SIZE", help="plan for devices of this memory, such as 80GiB; exit 2 where it "
              "doesn't fit")  # fmt: skip
@click.option("--device", metavar="NAME", help="plan for such devices, one a process: a100, h100, v100, rtx4090, ...; "
              "cpu")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="INT", help="of a prompt; left out, 512 or what the "
              "context leaves")  # fmt: skip
@click.option("--response-tokens", type=click.IntRange(1), metavar="INT", help="of a response; left out, the engine's "
              "limit, or 512")  # fmt: skip
@click.option("--peaks", metavar="RUN", help="a run's directory, whose measured peaks the times are predicted from; "
              "left out, nominal ones")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print the plan as JSON")
@click.pass_context
def plan(
    ctx: click.Context, /, recipe_file: str | None, device_memory: str | None, device: str | None,
    prompt_tokens: int | None, response_tokens: int | None, peaks: str | None, as_json: bool, **flags: Any,
) -> int:  # fmt: skip
    """Show the plan that `rlhf run` with the same arguments would carry out, and the memory and time that it takes; or
    every reason why it can't.

    Loads no weights: sizes come from config.json. Exit code 0 when the plan is accepted, 2 when not, or when it doesn't
    fit the device that was given.
    """
    recipe = recipe_of(ctx, recipe_file, flags)
    asked = device is not None or device_memory is not None
    registry = warned().elsewhere() if asked else warned()
    machine = _machine(recipe, device, device_memory)
    accepted = compose(recipe, registry, machine)
    for component in accepted.components():
        offer = registry.offer(component.kind, component.name)
        if offer is not None and offer.status == "missing":
            say(f"note: --{component.kind} {component.name} can't run here: {offer.reason}")
    assumed = assumed_lengths(accepted)
    lengths = Lengths(prompt=prompt_tokens or assumed.prompt, response=response_tokens or assumed.response)
    try:
        found = prediction(accepted, lengths, _measured(peaks))
    except Uncountable as error:
        raise RequestError(Problem(str(error), "leave it out, and tell its author")) from error
    fit = nearest_fit(Ask(recipe, registry, machine), accepted, lengths) if asked and not found.fits else None
    if as_json:
        content = {**accepted.to_json(), "prediction": {**found.to_json(), **_fit_json(fit)}}
        click.echo(json.dumps(content, indent=1))
    else:
        click.echo(describe(accepted))
        click.echo(resources(accepted, found))
    if asked and not found.fits:
        raise RequestError(_too_large(found, fit))
    if not found.fits and not found.memory.missing:
        say(f"warning: {verdict(found)}")
    return 0


def warned() -> Registry:
    """What is installed, after saying what is wrong with any plugin."""
    registry = loaded()
    for warning in registry.warnings if here().rank == 0 else ():
        say(f"warning: {warning}")
    return registry


def planned(recipe: Recipe) -> Plan:
    """Compose for this machine."""
    return compose(recipe, warned(), facts.machine(_ranks(recipe)))


def _ranks(recipe: Recipe) -> int:
    """Processes that were started already.

    Raises:
        RequestError: the recipe wants another number of them.
    """
    place, asked = here(), recipe.run.get("nproc")
    if place.joined and asked is not None and str(asked) not in (str(place.size), "1"):
        what = f"--nproc {asked}: {place.source} has started {place.size} processes, of which this is one"
        raise RequestError(Problem(what, "leave --nproc out"))
    return place.size


def _machine(recipe: Recipe, device: str | None, device_memory: str | None) -> Machine:
    memory = memory_size(device_memory) if device_memory is not None else None
    if isinstance(memory, Problem):
        raise RequestError(memory)
    world = _ranks(recipe)
    try:
        ranks = max(world, int(recipe.run.get("nproc") or 1))
    except (TypeError, ValueError):
        ranks = world  # composing tells what is wrong with it
    machine = planned_machine(facts.machine(world), device, memory, ranks)
    if isinstance(machine, Problem):
        raise RequestError(machine)
    return machine


def _measured(run: str | None) -> tuple[Peaks, str] | None:
    """Peaks that a run has measured."""
    if run is None:
        return None
    try:
        content = json.loads((Path(run) / "summary.json").read_text(encoding="utf-8"))["peaks"]
        found = Peaks(
            {str(name): float(value) for name, value in content["flops"].items()}, float(content["bandwidth"])
        )
        if not found.flops or min(*found.flops.values(), found.bandwidth) <= 0:
            raise ValueError("it measured none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"--peaks {run}: holds no peaks of a run: {type(error).__name__}: {error}"
        raise RequestError(Problem(what, "give the directory of a run that ended")) from error
    best = max(found.flops.values())
    whole = {name: found.flops.get(name, best) for name in ("float32", "bfloat16", "float16")}
    return Peaks(whole, found.bandwidth), f"peaks measured by {run}"


def _fit_json(fit: Fit | None) -> dict[str, Any]:
    if fit is None:
        return {}
    return {"nearest": {"change": fit.words, "needed_bytes": round(fit.prediction.memory.needed)}}


def _too_large(found: Prediction, fit: Fit | None) -> Problem:
    if found.memory.missing:
        return Problem(f"{verdict(found)}", "; ".join(found.memory.notes))
    needed = size(found.memory.needed)
    what = f"the plan takes {needed} in {found.memory.peak.phase}: {verdict(found)}"
    if fit is None:
        return Problem(what, "no three changes of batches, memory strategies and optimiser would do: take a "
                             "smaller model, shorter sequences, or more devices")  # fmt: skip
    return Problem(what, f"the nearest that fits takes {size(fit.prediction.memory.needed)}: add {fit.words}")
