"""A user's Python function: how it is found, and what it can be given by name. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from rlhf.api import Interrupted, Problem, RequestError


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
    except (Exception, SystemExit) as error:  # a script without a guard may end itself
        raise RequestError(f"{flag}: importing {place} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = f"is not a function, but {function!r}" if hasattr(module, name) else "is not there"
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RequestError(Problem(f"{flag}: {name!r} {what}", f"{place} has {', '.join(known) or 'no functions'}"))
    found: Callable[..., Any] = function
    return found


def source_digest(path: str) -> str:
    """Of FILE.py as it is on disk; empty where there is none, and for a module, which may be of many files."""
    file = Path(path.rpartition(":")[0]).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" and file.is_file() else ""


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
