"""What `run`, `plan` and their kin share: flags made from the run options and kinds, `--KIND.FIELD` options, and a
help that shows the options of the components chosen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import click

from rlhf import options, recipe
from rlhf.cli import Command
from rlhf.compose import Chosen, chosen_by
from rlhf.entries import KINDS, MANY, Entry, Times, address
from rlhf.errors import Problem, RequestError
from rlhf.recipe import Recipe, RunOptions
from rlhf.registry import loaded

_KIND_HELP = {
    "algo": "algorithm",
    "policy": "how models are loaded and scored",
    "engine": "rollout engine",
    "reward": "reward source; may be repeated, NAME:LABEL tells two of a sort apart",
    "mem": "memory strategy; may be repeated or joined by commas; ROLE=NAME is for one role",
    "optim": "optimiser strategy",
    "backend": "parallel backend",
    "format": "format of the data; left out, by file name",
    "track": "tracker, beside those that listen unasked (none: not even those); may be repeated",
    "launch": "what starts the processes",
}


class RecipeCommand(Command):
    """A command whose `--KIND.FIELD` options depend on the components chosen."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        field_options, rest = split_fields(args)
        ctx.meta["rlhf.fields"] = field_options
        if any(word in ("-h", "--help") for word in rest):
            kept = [word for word in rest if word not in ("-h", "--help")]
            click.echo(self._help(ctx, _scan(kept)))
            ctx.exit(0)
        return super().parse_args(ctx, rest)

    def _help(self, ctx: click.Context, asked: Recipe) -> str:
        formatter = click.HelpFormatter(width=min(shutil.get_terminal_size().columns, 110))
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        registry = loaded()
        with formatter.section("Components"):
            rows = []
            for kind in KINDS:
                names = ", ".join(entry.name for entry in registry.entries(kind))
                rows.append((f"--{kind} NAME", f"{_KIND_HELP[kind]}: {names or 'none installed'}"))
            formatter.write_dl(rows)
        chosen = chosen_by(asked, registry) if asked.picks.get("algo") else None
        own = [p for p in self.params if isinstance(p, click.Option) and p.name not in KINDS]
        with formatter.section("Options"):
            formatter.write_dl([record for p in own if (record := _record(p, ctx, chosen))])
        if chosen is None:
            formatter.write_paragraph()
            formatter.write_text("Add --algo NAME, or any other component, to see its options: --KIND.FIELD VALUE.")
        else:
            _component_help(formatter, chosen)
        return formatter.getvalue().rstrip()


def _record(option: click.Option, ctx: click.Context, chosen: Chosen | None) -> tuple[str, str] | None:
    """An option's help, with the default that holds for the components chosen."""
    record = option.get_help_record(ctx)
    if record is None or chosen is None or option.name not in chosen.setters:
        return record
    field = options.fields(RunOptions)[option.name]
    return record[0], f"{options.info(field).text()}  {_default(field, option.name, chosen)}"


def _default(field: attrs.Attribute[Any], key: str, chosen: Chosen | None) -> str:
    """The value where the user says nothing, and who set it where it isn't the option's own."""
    value = options.default_of(field)
    if chosen is not None and key in chosen.setters:
        other = chosen.settings[key]
        other = other.of(value) if isinstance(other, Times) else other
        return f"[default: {options.typed(other)}, set by {chosen.setters[key]}]"
    return "[required]" if value is attrs.NOTHING else f"[default: {options.typed(value) or 'none'}]"


def _component_help(formatter: click.HelpFormatter, chosen: Chosen) -> None:
    for kind, entries in chosen.entries.items():
        for key, entry in entries.items():
            if entry.config is None:
                continue
            title = f"{kind} {entry.name}: {entry.summary}"
            with formatter.section(title):
                formatter.write_dl(option_rows(entry, f"--{address(kind, key)}.", chosen))


def option_rows(entry: Entry, prefix: str, chosen: Chosen | None = None) -> list[tuple[str, str]]:
    """(flag with its type, help with default, unit and source) of each option of an entry."""
    rows = []
    for name, field in options.fields(entry.config).items() if entry.config else ():
        flag, default = f"{prefix}{name.replace('_', '-')}", _default(field, f"{prefix[2:]}{name}", chosen)
        rows.append((f"{flag} {options.type_name(field.type)}", f"{options.info(field).text()}  {default}"))
    return rows


def split_fields(args: Sequence[str]) -> tuple[list[tuple[str, str | bool]], list[str]]:
    """Take `--KIND.FIELD VALUE`, `--KIND.FIELD=VALUE` and bare `--KIND.FIELD` (True) out of the arguments."""
    found: list[tuple[str, str | bool]] = []
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        name, sign, value = word.partition("=")
        kind, dot, _ = name[2:].partition(".")
        if not (word.startswith("--") and dot):
            rest.append(word)
            continue
        if kind not in KINDS:
            near = options.nearest(kind, KINDS)
            fix = f"did you mean --{near}.{name[3 + len(kind) :]}?" if near else f"kinds: {', '.join(KINDS)}"
            raise RequestError(Problem(f"unknown option {name}", fix))
        bare = not sign and (not words or words[0].startswith("--"))
        found.append((name[2:], True if bare else value if sign else words.pop(0)))
    return found, rest


def _scan(args: Sequence[str]) -> Recipe:
    """The components, model and data named in arguments that may be incomplete, for help."""
    named: dict[str, list[str]] = {}
    given_of: dict[str, list[str]] = {"model": [], "data": []}
    for i, word in enumerate(args):
        name, sign, value = word.partition("=")
        if name.startswith("--") and (name[2:] in KINDS or name[2:] in given_of):
            given = value if sign else args[i + 1] if i + 1 < len(args) else ""
            if given and not given.startswith("--"):
                (given_of if name[2:] in given_of else named).setdefault(name[2:], []).append(given)
    return recipe.from_flags(given_of, [], named)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with RECIPE, the kinds, the run options, and what goes with them."""
    decorators = [
        click.argument("recipe_file", metavar="[RECIPE.yaml]", required=False),
        click.option("--model", metavar="PATH", multiple=True, help="folder, run or hub id; ROLE=PATH is for one role"),
        click.option("--data", metavar="PATH", multiple=True, help="data file, folder or hub id; may be repeated"),
        click.option("--eval-data", metavar="PATH", multiple=True, help="held-out data; left out, a share of --data"),
        click.option("--ptx-data", metavar="PATH", multiple=True, help="completions to learn beside, by --ptx-coef"),
    ]  # fmt: skip
    decorators += [
        click.option(f"--{kind}", metavar="NAME", multiple=True, help=text) for kind, text in _KIND_HELP.items()
    ]
    for name, field in options.fields(RunOptions).items():
        flag = f"--{name.replace('_', '-')}"
        text = options.info(field).text()
        shown = "" if field.default is None else f"  [default: {options.typed(field.default)}]"
        if field.type is bool:
            decorators.append(click.option(flag, is_flag=True, default=None, help=text))
        else:
            decorators.append(click.option(flag, metavar=options.type_name(field.type).upper(), help=text + shown))
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def recipe_of(ctx: click.Context, recipe_file: str | None, flags: dict[str, Any]) -> Recipe:
    """The recipe a command line means: the file's, with the flags on top."""
    named = {kind: flags.pop(kind) for kind in KINDS}
    typed = recipe.from_flags(flags, ctx.meta["rlhf.fields"], named)
    for kind, picks in typed.picks.items():
        if len(picks) > 1 and kind not in MANY:
            raise RequestError(Problem(f"--{kind} takes one component, not {len(picks)}"))
    return recipe.from_file(recipe_file).merged(typed) if recipe_file else typed
