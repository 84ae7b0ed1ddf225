"""Pipelines: stages that are runs, outputs feeding inputs.

    model: org/base                      # keys beside `stages` hold for every stage that doesn't say otherwise
    stages:
      sft:    {algo: sft, data: chats.json}
      reward: {algo: reward, data: pairs.json}
      ppo:    {algo: ppo, model: "@sft", reward: model, roles: {reward: {model: "@reward"}}, data: prompts.jsonl}

`@STAGE` stands for the model that a stage before it wrote.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import yaml

from rlhf import facts
from rlhf.compose import compose
from rlhf.errors import Interrupted, Problem, RequestError, RunError
from rlhf.facts import ModelFacts
from rlhf.files import cannot_be_written, write_atomic, writing
from rlhf.options import nearest
from rlhf.plan import plain
from rlhf.recipe import from_mapping, key_of, twice
from rlhf.registry import Registry

_RECIPES = "recipes"
_NAME = re.compile(r"\w[\w-]*")


@attrs.frozen
class Stage:
    """One run of a pipeline; `@STAGE` still stands in its recipe."""

    name: str
    recipe: Mapping[str, Any]


def stages_of(content: Mapping[str, Any], where: str) -> list[Stage]:
    """The stages of a parsed pipeline file, in order.

    Raises:
        RequestError: it is no pipeline, or a stage refers to one that doesn't come before it.
    """
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise RequestError(Problem(f"{where}: holds no stages", "stages: {sft: {algo: sft, ...}, ppo: {...}}"))
    common = {key: value for key, value in content.items() if key != "stages"}
    problems = [*twice(common, where)]
    found: list[Stage] = []
    for name, recipe in stages.items():
        if not isinstance(recipe, dict):
            problems.append(Problem(f"{where}: stage {name}: must be a recipe, not {recipe!r}"))
            continue
        if not _NAME.fullmatch(str(name)) or name == _RECIPES:
            fix = f"letters, digits, - and _, and not {_RECIPES!r}: it names a folder beside that of the recipes"
            problems.append(Problem(f"{where}: stage {name!r}: is no name for a stage", fix))
        before = [stage.name for stage in found]
        own = {key_of(key) for key in recipe}
        whole = {**{k: v for k, v in common.items() if k in recipe or key_of(k) not in own}, **recipe}
        for reference in _references(whole):
            if reference not in before:
                near = nearest(reference, before)
                fix = f"did you mean @{near}?" if near else f"stages before it: {', '.join(before) or 'none'}"
                problems.append(Problem(f"{where}: stage {name}: no stage {reference!r} comes before it", fix))
        found.append(Stage(str(name), whole))
    if problems:
        raise RequestError(problems)
    return found


def _references(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value[1:]] if value.startswith("@") else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [reference for item in items for reference in _references(item)]


def _replaced(value: Any, models: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return models.get(value[1:], value) if value.startswith("@") else value
    if isinstance(value, Mapping):
        return {key: _replaced(item, models) for key, item in value.items()}
    return [_replaced(item, models) for item in value] if isinstance(value, list) else value


def check(stages: list[Stage], where: str, registry: Registry) -> None:
    """Compose every stage before the first one runs. What a stage will write is known by the model it starts from,
    all but its architecture, which is the stage's own to choose.

    Raises:
        RequestError: every problem of every stage.
    """
    machine = facts.machine()
    models: dict[str, ModelFacts] = {}
    problems: list[Problem] = []
    for stage in stages:
        config: dict[str, Any] | None = None
        try:
            plan = compose(from_mapping(stage.recipe, where), registry, machine, models)
            config = {k: v for k, v in (plan.roles[0].model.config or {}).items() if k != "architectures"} or None
        except RequestError as error:
            problems += [Problem(f"stage {stage.name}: {problem.what}", problem.fix) for problem in error.problems]
        models["@" + stage.name] = ModelFacts("@" + stage.name, config)
    if problems:
        raise RequestError(problems)


def carry_out(stages: list[Stage], output: Path, resume: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the stages, each in a process of its own, so that its memory is given back. Done stages are not redone.

    Returns:
        Each stage's name with its summary.

    Raises:
        RequestError: `output` holds another pipeline, or an unfinished stage and no `resume`.
        RunError: a stage failed.
        Interrupted: a signal asked to stop; the stage saved a checkpoint.
    """
    from rlhf.rundir import RunDirectory

    content = yaml.safe_dump({"stages": {s.name: plain(s.recipe) for s in stages}}, sort_keys=False, allow_unicode=True)
    kept = output / "pipeline.yaml"
    try:
        if kept.is_file() and kept.read_text(encoding="utf-8") != content:
            raise RequestError(Problem(f"--output {output}: holds another pipeline", "give another folder"))
        begun = {kept.name + ".part"}  # what one killed at once can have left
        if (
            not kept.is_file()
            and output.exists()
            and not (output.is_dir() and {entry.name for entry in output.iterdir()} <= begun)
        ):
            raise RequestError(
                Problem(f"--output {output}: holds something that is no pipeline", "give another folder")
            )
        (output / _RECIPES).mkdir(parents=True, exist_ok=True)
        write_atomic(kept, content)
    except OSError as error:
        raise cannot_be_written(output, error) from error
    models = {stage.name: str(output / stage.name) for stage in stages}
    results = []
    for number, stage in enumerate(stages, 1):
        directory = RunDirectory(output / stage.name)
        summary = directory.summary()
        if summary and summary.get("status") == "done":
            say(f"stage {number}/{len(stages)} {stage.name}: done before, not redone")
        elif (directory.path / "plan.json").is_file() and not resume:
            raise RequestError(
                Problem(f"stage {stage.name} was begun and is not done", "add --resume to go on inside it")
            )
        else:
            say(f"stage {number}/{len(stages)} {stage.name}")
            recipe = output / _RECIPES / f"{stage.name}.yaml"
            text = yaml.safe_dump(plain(_replaced(stage.recipe, models)), sort_keys=False, allow_unicode=True)
            with writing(recipe):
                write_atomic(recipe, text)
            _run(stage.name, [str(recipe), "--output", str(directory.shown), *(["--resume"] if resume else [])])
            summary = directory.summary() or {}
        results.append({"stage": stage.name, **summary})
        with writing(output):
            write_atomic(output / "pipeline.json", json.dumps(results, indent=1) + "\n")
    return results


def _run(name: str, arguments: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "rlhf", "run", *arguments])

    def hand_on(number: int, frame: Any) -> None:
        # Ctrl-C in a terminal reaches the stage by itself, and a second SIGINT would end it without a checkpoint.
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == 130:
        raise Interrupted(f"stage {name} was interrupted; to go on, type the same pipeline line with --resume")
    if code == 2:
        raise RequestError(f"stage {name} was refused; its message is above")
    if code != 0:
        raise RunError(f"stage {name} failed with exit code {code}; mend it, then the same pipeline line with --resume")
