"""A reward that is the user's own Python function.

    def score(prompt, completion, answer): ...                  # a number
    def score(prompts, completions, answer, **columns): ...     # once a batch: lists in, a list of numbers out

Everything is passed by name, and only what the function has a parameter for: the prompt as the data has it (text, or
a list of chat messages), the completion's text, and columns of the row; `**columns` takes all the others. A function
may return `rlhf.api.Failed("why")` in a number's place: that rollout is left out and counted.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from rlhf.api import Context, Interrupted, Problem, RequestError, Reward, Rollouts, RunError, Score
from rlhf_plugins.rewards import samples


class PythonFunction(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where the function can't be had or called.
        RunError: in `judge`, where it raises, or where a row lacks a column that it needs; names the sample.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._who = f"reward {context.label or 'python'!r} ({config.path})"
        self._flag = f"--reward.{context.label or 'python'}.path {config.path}"
        self._function = load_function(config.path, self._flag)
        self._takes = parameters(self._function, self._flag)
        self._batched = "completions" in self._takes.names if config.batched is None else config.batched
        self._own = ("prompts", "completions") if self._batched else ("prompt", "completion")
        if not (self._own[1] in self._takes.names or self._takes.all_columns):
            what = f"{self._flag}: it takes ({', '.join(self._takes.names)}), and no {self._own[1]!r} to judge"
            raise RequestError(Problem(what, f"name its parameters {', '.join(self._own)}, and columns of the data"))

    def judge(self, rollouts: Rollouts, score: Score) -> Sequence[Any]:
        """What the function returns: B numbers."""
        if not self._batched:
            return [self._call(rollouts, [i], self._arguments(rollouts, i)) for i in range(len(rollouts))]
        given = [self._arguments(rollouts, i) for i in range(len(rollouts))]
        names = dict.fromkeys(name for one in given for name in one)
        # A column that only some rows have, and that the function can do without, is None in the others.
        everyone = list(range(len(rollouts)))
        result = self._call(rollouts, everyone, {name: [one.get(name) for one in given] for name in names})
        if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
            raise RunError(f"{self._who} returned {result!r} for a batch, not a list of {len(rollouts)} numbers")
        if len(result) != len(rollouts):
            raise RunError(f"{self._who} returned {len(result)} numbers for a batch of {len(rollouts)}")
        return list(result)

    def _arguments(self, rollouts: Rollouts, i: int) -> dict[str, Any]:
        """What the i-th sample gives for the function's parameters."""
        prompt, columns = samples.prompt(rollouts, i), samples.columns(rollouts, i)
        own = (list(prompt) if isinstance(prompt, tuple) else prompt, rollouts.texts[i])
        found = {**columns, **dict(zip(self._own, own, strict=True))}
        missing = [name for name in self._takes.required if name not in found]
        if missing:
            raise RunError(
                f"{self._who} needs {', '.join(map(repr, missing))}, which {samples.name(rollouts, i)} has not; "
                f"its columns: {', '.join(columns) or 'none'}"
            )
        return found if self._takes.all_columns else {name: found[name] for name in self._takes.names if name in found}

    def _call(self, rollouts: Rollouts, of: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        try:
            return self._function(**arguments)
        except (Interrupted, RunError):
            raise
        except Exception as error:
            where = ("" if len(of) == 1 else "a batch that begins with ") + samples.name(rollouts, of[0])
            raise RunError(f"{self._who} raised {type(error).__name__}: {error}, on {where}") from error


@attrs.frozen
class Parameters:
    """What a function can be given by name."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    """Those without a default."""
    all_columns: bool
    """It has a `**parameter`."""


def parameters(function: Callable[..., Any], flag: str) -> Parameters:
    """Read a function's signature.

    Raises:
        RequestError: it can't be called by name, or is asynchronous.
    """
    call = getattr(function, "__call__", function)  # noqa: B004 - of an object with __call__, its code
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        fix = "make it a plain function, with asyncio.run(...) inside"
        raise RequestError(Problem(f"{flag}: is asynchronous", fix))
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        fix = "wrap it: def score(prompt, completion): ..."
        raise RequestError(Problem(f"{flag}: its parameters can't be read: {error}", fix)) from error
    by_name = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unnamed = [p.name for p in found if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        what = f"{flag}: {', '.join(unnamed)} can't be given by name"
        raise RequestError(Problem(what, "take the `/` out of its parameters"))
    return Parameters(
        names=tuple(p.name for p in by_name),
        required=tuple(p.name for p in by_name if p.default is p.empty),
        all_columns=any(p.kind is p.VAR_KEYWORD for p in found),
    )


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """Import FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        RequestError: the file, module or function isn't there, or importing it fails.
    """
    place, _, name = path.rpartition(":")
    file = Path(place).expanduser().absolute()
    if place.endswith(".py") and not file.is_file():
        raise RequestError(Problem(f"{flag}: there is no such file", f"looked for {file}"))
    try:
        module = _from_file(file) if place.endswith(".py") else importlib.import_module(place)
    except Interrupted:
        raise
    except Exception as error:
        raise RequestError(f"{flag}: importing {place} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = f"is not a function, but {function!r}" if hasattr(module, name) else "is not there"
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RequestError(Problem(f"{flag}: {name!r} {what}", f"{place} has {', '.join(known) or 'no functions'}"))
    found: Callable[..., Any] = function
    return found


def _from_file(file: Path) -> ModuleType:
    """Import a file that need not be on sys.path; two rewards in one file share its module."""
    name = f"rlhf_reward_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    # Modules beside it can be imported, now or when it is called. Last on the path: none can hide an installed one.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
