"""What Click finds wrong with a command line, said as all else is: what was given, and what to type instead."""

from __future__ import annotations

from collections.abc import Sequence

import click

from rlhf.entries import KINDS, address
from rlhf.errors import Problem
from rlhf.options import fields, nearest
from rlhf.registry import loaded


def problem_of(error: click.UsageError, arguments: Sequence[str]) -> Problem:
    """The problem that a usage error in a line of arguments tells of."""
    command = error.ctx.command_path if error.ctx else " ".join(["rlhf", *arguments[:1]])
    hint = f"{command} --help tells what it takes"
    if isinstance(error, click.NoSuchOption):
        near = _near(error.option_name.lstrip("-"), _options(error.ctx))
        return Problem(f"unknown option {error.option_name}", f"did you mean {near}?" if near else hint)
    said = error.format_message().rstrip(".")
    return Problem(said[:1].lower() + said[1:], hint)


def _options(ctx: click.Context | None) -> list[str]:
    return [name[2:] for parameter in ctx.command.params for name in parameter.opts if name[:2] == "--"] if ctx else []


def _near(given: str, own: list[str]) -> str | None:
    """The option that was meant: one of the command's own or, where it takes components, of a component, such as
    --optim.learning-rate by --lr. The surest first."""
    of_components = _of_components() if "algo" in own else {}
    for cutoff in (0.8, 0.6):
        for known in ({name: name for name in own}, of_components):
            found = nearest(given, known, cutoff)
            if found:
                return f"--{known[found]}"
    return None


def _of_components() -> dict[str, str]:
    """Field -> the option that sets it, of the component with the highest rank that has it."""
    found: dict[str, str] = {}
    for kind in KINDS:
        for entry in loaded().entries(kind):
            for field in fields(entry.config) if entry.config else ():
                name = field.replace("_", "-")
                found.setdefault(name, f"{address(kind, entry.name)}.{name}")
    return found
