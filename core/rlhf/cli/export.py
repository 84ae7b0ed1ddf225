"""`rlhf export`."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from rlhf import facts
from rlhf.cli import Command, say
from rlhf.cli.evaluate import saved_state
from rlhf.cli.plan import planned
from rlhf.cli.run import settle
from rlhf.entries import Head
from rlhf.errors import Problem, RequestError
from rlhf.files import check_free, new_folder, writing
from rlhf.plan import Component, Plan, plan_from_json
from rlhf.recipe import from_mapping
from rlhf.registry import loaded, resolve

if TYPE_CHECKING:
    from rlhf.interfaces import LoadSpec
    from rlhf.rundir import RunDirectory

_TYPES = ("float32", "bfloat16", "float16")


@click.command(cls=Command)
@click.argument("source", metavar="RUN_DIR|MODEL")
@click.option("--output", metavar="FOLDER", required=True, help="where to; must not be there yet")
@click.option("--role", metavar="ROLE", help="of a run, which trained model; left out, the policy")
@click.option(
    "--checkpoint", help="of a run, a checkpoint such as step-000100, or 'best'; left out, the finished model"
)
@click.option("--dtype", type=click.Choice(_TYPES), help="of the weights written; left out, as the base is stored")
@click.option("--trust-remote-code", is_flag=True, help="of a model folder or hub id: run the code it brings")
def export(
    source: str, output: str, role: str | None, checkpoint: str | None, dtype: str | None, trust_remote_code: bool
) -> None:
    """Write a trained model as a plain folder that needs nothing else: adapters merged into their base, quantised
    weights unpacked, in one precision.

    Takes a run directory, or a model: a PEFT folder, a Hugging Face folder or a hub id. What a run trained on
    quantised weights is merged into those weights, so that the folder computes what the run did.
    """
    target = Path(output)
    check_free(target)
    path, role = _run_of(Path(source).expanduser().absolute(), role)
    is_run = (path / "plan.json").is_file()
    if not is_run and (role or checkpoint):
        raise RequestError(Problem(f"{source}: is no run, so it has no --role and no --checkpoint", "leave them out"))
    settle()
    import torch

    with contextlib.ExitStack() as held:
        policy, spec = (
            held.enter_context(_of_run(path, role, checkpoint)) if is_run else _of_model(source, trust_remote_code)
        )
        partial = held.enter_context(new_folder(target))
        with writing(target):
            found = resolve(policy).export(spec, partial, getattr(torch, dtype) if dtype else None)
    did = [word for word, done in (("adapters merged", found["merged"]), ("unpacked", found["unpacked"])) if done]
    size = f"{found['weights']:,} weights, {found['dtype']}, {found['bytes'] / 1e6:,.1f} MB"
    say(", ".join([f"{found['architecture']}: {size}", *did]))
    click.echo(output)


def _run_of(path: Path, role: str | None) -> tuple[Path, str | None]:
    """The run whose model a folder is, and that model's role: the run knows what its adapters were trained on."""
    for run, name in ((path.parent, "policy"), (path.parent.parent, path.name)):
        inside = path == run / "model" or path.parent == run / "model"
        if inside and (run / "plan.json").is_file() and role is None:
            return run, name
    return path, role


@contextlib.contextmanager
def _of_run(path: Path, role: str | None, checkpoint: str | None) -> Iterator[tuple[Component, LoadSpec]]:
    """The policy component of a run, and one of its models as its role was loaded."""
    from rlhf.interfaces import Context
    from rlhf.models import spec_of
    from rlhf.rundir import RunDirectory

    directory = RunDirectory(path)
    plan = plan_from_json(directory.plan_json(), loaded())
    trained = [one.name for one in plan.roles if one.role.trainable and one.chooses]
    name = role or ("policy" if "policy" in trained else trained[0])
    if name not in trained:
        raise RequestError(Problem(f"--role {name}: the run has trained no such model", f"it has {', '.join(trained)}"))
    with contextlib.ExitStack() as held:
        if checkpoint is not None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            _save(directory, checkpoint, folder)
        elif directory.model.is_dir():
            folder = directory.model
        else:
            fix = f"finish it: rlhf run --resume --output {path}; or take what is there: --checkpoint best"
            raise RequestError(Problem(f"{path}: isn't finished, so it holds no model", fix))
        context = Context(plan=plan, seed=plan.run.seed)
        spec, _ = spec_of(plan.role(name), context, "cpu")
        folder = folder if name == "policy" else folder / name
        yield plan.policy, attrs.evolve(spec, model=str(folder), trainable=False, head_init="keep")


def _save(directory: RunDirectory, checkpoint: str, folder: Path) -> None:
    """Write the models of a checkpoint as a finished run would."""
    from rlhf.assemble import assemble
    from rlhf.parts import restore

    name, state = saved_state(directory, checkpoint)
    plan: Plan = planned(from_mapping(directory.recipe(), str(directory.path / "recipe.yaml")))
    with contextlib.closing(assemble(plan, say)) as parts:
        restore(parts, state)
        with writing(folder):
            parts.models.save(folder)
    say(f"{directory.path} {name}")


def _of_model(source: str, trust_remote_code: bool) -> tuple[Component, LoadSpec]:
    """The first policy there is, and the model as it lies there."""
    from rlhf.interfaces import LoadSpec

    found = facts.model(source)
    if isinstance(found, Problem):
        raise RequestError(found)
    entries = loaded().entries("policy")
    if not entries:
        raise RequestError("no --policy is installed")
    spec = LoadSpec(
        role="policy", model=found.path, head=_head(found), trainable=False, head_init="keep", device="cpu",
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return Component(entries[0]), spec


def _head(found: facts.ModelFacts) -> Head:
    """Which head a model was saved with: an adapter says for what task it is, a whole model of what class."""
    adapter = Path(found.path) / "adapter_config.json"
    if adapter.is_file():
        task: Any = json.loads(adapter.read_text(encoding="utf-8")).get("task_type")
        return "scalar" if task == "SEQ_CLS" else "lm"
    return "scalar" if found.architecture.endswith("ForSequenceClassification") else "lm"
