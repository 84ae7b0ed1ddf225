"""Writes docs/reference/ from the code: what is installed with this distribution, the command line, the recipe, the run
directory, and the public interface. Imports no torch.

    python docs/generate.py            writes the pages
    python docs/generate.py --check    exit code 1, with their names, where they are not what the code says
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import click
from api_page import api_page, constant
from sizes_page import sizes_page

from rlhf import cli, hooks, options, registry
from rlhf.cli.recipes import _KIND_HELP
from rlhf.entries import (
    KINDS,
    MANY,
    AlgorithmEntry,
    Entry,
    FormatEntry,
    MemoryEntry,
    RewardEntry,
    Role,
    StarterEntry,
    address,
)
from rlhf.recipe import RunOptions

FOLDER = Path(__file__).parent / "reference"
CORE = Path(cli.__file__).parents[2]
DISTRIBUTION = "rlhf-kit"
COMMAND = "python docs/generate.py"
NOTE = f"<!-- Written by `{COMMAND}` from the code. Edit the code. -->\n"
TITLES = {
    "algo": "Algorithms",
    "policy": "Policies",
    "engine": "Engines",
    "reward": "Rewards",
    "mem": "Memory strategies",
    "optim": "Optimisers",
    "backend": "Backends",
    "format": "Formats",
    "track": "Trackers",
    "launch": "Launchers",
}
ABOUT = {
    "algo": "An algorithm says which models it needs, what to sample, what to learn from it, and the loss.",
    "policy": "A policy loads models, turns text into tokens and back, and scores sequences.",
    "engine": "A rollout engine samples responses. Offline algorithms need none.",
    "reward": "A reward judges responses, a number each. Several are added up with their weights.",
    "mem": "A memory strategy says how a model is loaded, adapted, wrapped, sharded. They are joined by commas, "
    "whatever the order; `--mem ROLE=NAME` is for one role.",
    "optim": "An optimiser strategy makes the parameter groups, the optimiser and its schedule.",
    "backend": "A backend makes the processes of a run act as one.",
    "format": "A format reads data. Where none is named, the file's name tells.",
    "track": "A tracker hears of the run's events: it logs, reports, calls back. `--track none` silences those that "
    "listen unasked.",
    "launch": "A launcher starts the processes of a run.",
}
MACHINE = {
    "cuda": "the machine has an NVIDIA GPU",
    "bf16": "the GPUs, or else the CPU, compute in bfloat16",
    "fast-bf16": "they do so faster than in float32",
}
"""What `rlhf.facts.Machine` can provide."""


def pages() -> dict[str, str]:
    """File name -> content."""
    found = registry.load()
    entries = [offer.entry for offer in found.offers if offer.distribution == DISTRIBUTION and offer.entry is not None]
    starters = [entry for entry in found.starters if entry.model.startswith("rlhf_plugins.")]
    of_kind = {kind: sorted((e for e in entries if e.kind == kind), key=lambda e: e.name) for kind in KINDS}
    written = {f"{kind}.md": _kind_page(kind, members) for kind, members in of_kind.items()}
    written["starters.md"] = _starters_page(starters)
    written["capabilities.md"] = _capabilities_page(entries)
    written["command-line.md"] = _command_line_page()
    written["recipe.md"] = _recipe_page()
    written["run-directory.md"] = _run_directory_page()
    written["api.md"] = api_page(CORE)
    algorithms = [entry for entry in of_kind["algo"] if isinstance(entry, AlgorithmEntry)]
    roots = FOLDER.parents[1]
    written["algorithm-sizes.md"] = sizes_page(algorithms, roots / "plugins", roots / "tests", table, cell, code)
    return {name: NOTE + "\n" + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in written.items()}


# Markdown


def cell(text: object) -> str:
    """Plain text as a cell of a table: one line, nothing in it taken for markup but code in backticks."""
    parts = " ".join(str(text).split()).replace("|", "\\|").split("`")
    for i in range(0, len(parts), 2):  # outside the backticks
        parts[i] = re.sub(r"[*]|<(?=[a-zA-Z/!?])|(?<!\w)_|_(?!\w)", r"\\\g<0>", parts[i])
    return "`".join(parts)


def code(text: object) -> str:
    """Text as code in a cell; nothing for nothing."""
    return f"`{str(text).replace('|', chr(92) + '|')}`" if str(text) else ""


def codes(names: Iterable[str]) -> str:
    return ", ".join(code(name) for name in names)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""] if len(lines) > 2 else []


# Components


def _kind_page(kind: str, entries: list[Entry]) -> str:
    several = " A run can have several." if kind in MANY else ""
    lines = [f"# {TITLES[kind]}: `--{kind}`", "", ABOUT[kind] + several, ""]
    lines += table(["name", ""], [[f"[`{e.name}`](#{_anchor(e.name)})", cell(e.summary)] for e in entries])
    shared = _shared_config(entries)
    for entry in entries:
        lines += [f"## `{entry.name}`", "", _sentence(entry.summary), "", *_facts(entry)]
        if entry.config is not None and entry.config is not shared:
            lines += _option_table(entry.config, f"--{address(kind, entry.name)}.")
        elif shared is None:
            lines += ["It has no options.", ""]
    if shared is not None:
        lines += ["## Options", "", "All of them have the same.", "", *_option_table(shared, f"--{kind}.")]
    return "\n".join(lines)


def _shared_config(entries: list[Entry]) -> type | None:
    """The one config class of a kind whose components all share it."""
    configs = {entry.config for entry in entries}
    return next(iter(configs)) if len(entries) > 1 and len(configs) == 1 else None


def _anchor(name: str) -> str:
    return name.lower().replace(".", "").replace("+", "")


def _sentence(text: str) -> str:
    text = cell(text)
    first = text.split(" ")[0]
    return (text[:1].upper() + text[1:] if first.strip(",;:").isalpha() else text).rstrip(".") + "."


def _facts(entry: Entry) -> list[str]:
    """What composition knows of it, a line each."""
    told: list[tuple[str, str]] = []
    if isinstance(entry, AlgorithmEntry):
        rows = entry.data.needs if entry.data is not None and hasattr(entry.data, "needs") else "prompts"
        told.append(("reads", cell(rows)))
        told.append(("samples", "yes (online)" if "rollouts" in entry.requires else "no (offline)"))
        better = entry.objective or (("reward/mean", "max") if "rollouts" in entry.requires else ("loss", "min"))
        told.append(("best checkpoint", f"{'highest' if better[1] == 'max' else 'lowest'} held-out {code(better[0])}"))
    roles = entry.roles(entry.config() if entry.config else None) if callable(entry.roles) else entry.roles
    if roles:
        told.append(("roles", "; ".join(_role(role) for role in roles)))
    if isinstance(entry, RewardEntry) and not callable(entry.columns) and entry.columns:
        told.append(("needs the columns", codes(entry.columns)))
    if isinstance(entry, MemoryEntry):
        told.append(("acts", f"in the phase {code(entry.phase)}, on {entry.applies} roles where none is named"))
        if entry.slot:
            told.append(("one of its sort a role", code(entry.slot)))
    if isinstance(entry, FormatEntry) and entry.suffixes:
        told.append(("taken for", codes(entry.suffixes)))
    for title, names in (("provides", entry.provides), ("requires", entry.requires), ("excludes", entry.conflicts)):
        if names:
            told.append((title, codes(sorted(names))))
    if entry.modules:
        told.append(("needs the module", "; ".join(f"{code(m)}: {code(how)}" for m, how in entry.modules.items())))
    if entry.defaults:
        told.append(("sets where you don't", codes(f"{key}: {value}" for key, value in entry.defaults.items())))
    if entry.rank:
        where = f"legal and the machine provides {codes(sorted(entry.worthwhile))}" if entry.worthwhile else "legal"
        told.append(("taken unasked", f"yes, where it is {where} (rank {entry.rank})"))
    return [f"- {title}: {text}" for title, text in told] + [""] * bool(told)


def _role(role: Role) -> str:
    place = {"model": "from `--model`", "given": f"from `--model {role.name}=PATH`, which must be given"}
    trained = "trained" if role.trainable else "frozen"
    start = place.get(role.start, f"starts as {code(role.start)}")
    return f"{code(role.name)} ({trained}, {role.head} head, {start})"


def _option_table(config: type, prefix: str) -> list[str]:
    rows = []
    for name, field in options.fields(config).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        rows.append([code(flag), cell(options.type_name(field.type)), _default(field), _meaning(field)])
    return table(["option", "type", "default", "meaning"], rows)


def _default(field: attrs.Attribute[object]) -> str:
    value = options.default_of(field)
    return "required" if value is attrs.NOTHING else code(options.typed(value) or "none")


def _meaning(field: attrs.Attribute[object]) -> str:
    about = options.info(field)
    parts = [_sentence(about.help)]
    if about.choices:
        parts.append(f"One of {codes(about.choices)}.")
    if about.unit:
        parts.append(f"Unit: {cell(about.unit)}.")
    if about.bounds:
        parts.append(f"Range: {about.bounds}.")
    if about.source:
        parts.append(f"Source: {cell(about.source)}.")
    return " ".join(parts)


def _starters_page(starters: list[StarterEntry]) -> str:
    lines = ["# The built-in example", ""]
    lines += ["What a run uses where you name no model or no data. What you type goes before.", ""]
    for entry in starters:
        whose = f"for {codes(sorted(entry.algorithms))}" if entry.algorithms else "for any other that reads such rows"
        lines += [f"## {entry.name}, {whose}", "", _sentence(entry.summary), ""]
        lines += [f"- rows: {cell(getattr(entry.data_type, 'needs', entry.data_type.__name__))}"]
        for title, settings in (
            ("with its model", entry.with_model),
            ("with its data", entry.with_data),
            ("with both", entry.with_both),
        ):
            if settings:
                lines.append(f"- {title}: " + codes(f"{key}: {options.typed(v)}" for key, v in settings.items()))
        lines.append("")
    return "\n".join(lines)


def _capabilities_page(entries: list[Entry]) -> str:
    names = sorted({*MACHINE, *(name for e in entries for name in (*e.provides, *e.requires, *e.conflicts))})
    names += sorted({name for e in entries for name in e.worthwhile} - {*names})
    rows = []
    for name in names:
        given = [f"{_link(e)}" for e in entries if name in e.provides]
        given += [MACHINE[name]] if name in MACHINE else []
        needed = [_link(e) for e in entries if name in e.requires]
        excluded = [_link(e) for e in entries if name in e.conflicts]
        rows.append([code(name), ", ".join(given), ", ".join(needed), ", ".join(excluded)])
    lines = [
        "# Capabilities",
        "",
        "A plan is legal when everything that a component requires is provided by another one or by the machine,",
        "nothing that it excludes is, and every component's own constraints hold. `rlhf plan` tells of each that",
        "doesn't.",
        "",
    ]
    return "\n".join(lines + table(["capability", "provided by", "required by", "excluded by"], rows))


def _link(entry: Entry) -> str:
    return f"[`--{entry.kind} {entry.name}`]({entry.kind}.md#{_anchor(entry.name)})"


# The command line


def _command_line_page() -> str:
    context = click.Context(cli.cli, info_name="rlhf")
    lines = ["# The command line", "", "`python -m rlhf` is the same program.", ""]
    lines += table(
        ["command", ""], [[f"[`rlhf {n}`](#rlhf-{n})", cell(text)] for n, (_, text) in cli._COMMANDS.items()]
    )
    lines += ["## Exit codes", "", *table(["code", "meaning"], [[str(c), text] for c, text in EXIT_CODES.items()])]
    for name in cli._COMMANDS:
        command = cli.cli.get_command(context, name)
        assert command is not None
        lines += list(_command(command, f"rlhf {name}"))
    return "\n".join(lines)


EXIT_CODES = {
    0: "done; a plan was accepted",
    1: "the run failed: a reward that raises, a loss that isn't finite. What was checkpointed can be resumed",
    2: "the request was wrong; nothing was loaded or written. Every problem is told, with what to type instead",
    130: "interrupted by Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved",
}


def _command(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    arguments = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
    more = " COMMAND" if isinstance(command, click.Group) else ""
    yield from (f"## {name}", "", "```text", f"{name}{' ' + arguments if arguments else ''} [OPTIONS]{more}", "```", "")
    for paragraph in (command.help or "").split("\n\n"):
        yield from (cell(paragraph), "")
    kinds = [p.name for p in command.params if p.name in KINDS]
    if kinds:
        yield from ("Components, each with options of its own, `--KIND.FIELD`:", "")
        rows = [[code(f"--{kind} NAME"), cell(_KIND_HELP[kind]), f"[{TITLES[kind]}]({kind}.md)"] for kind in kinds]
        yield from table(["option", "meaning", "which"], rows)
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in KINDS:
            metavar = "" if parameter.is_flag else " " + parameter.make_metavar(context)
            rows.append([code(", ".join(parameter.opts) + metavar), cell(parameter.help or "")])
    yield from table(["option", "meaning"], rows)
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            yield from _command(sub, f"{name} {sub.name}")


# Files


def _recipe_page() -> str:
    lines = [
        "# The recipe",
        "",
        "A YAML file for `rlhf run` and `rlhf plan`; `recipe.yaml` in a run directory is one. Flags go before the",
        "file, the file before a component's and the built-in example's defaults. An unknown key, and a key given",
        "twice, is an error.",
        "",
        "```yaml",
        "algo: {name: ppo, clip_range: 0.1}   # a component with options; without any: algo: ppo",
        "model: MODEL",
        "data: [prompts.jsonl]",
        "mem: [lora, bf16]                     # of these there may be several",
        "reward: [{name: length, target: 100, weight: 0.5}, model]",
        "roles: {reward: {model: PATH, mem: [bf16]}}",
        "optim: {learning_rate: 0.0001}        # options alone: whichever is taken",
        "max_steps: 100",
        "```",
        "",
        "## Keys",
        "",
    ]
    rows = [[code(kind), f"{cell(_KIND_HELP[kind].split(';')[0])}: [{TITLES[kind]}]({kind}.md)"] for kind in KINDS]
    rows += [
        ["`model`", "folder, run directory or hub id that the roles start from"],
        ["`data`", "a data file, folder or hub id, or a list of them"],
        ["`eval_data`", "held-out data, likewise; left out, a share of `data`"],
        ["`ptx_data`", "completions that an algorithm which samples learns beside, by `ptx_coef`"],
        ["`roles`", "for one role: `model`, and `mem` in place of that for all"],
    ]
    lines += [
        *table(["key", "meaning"], rows),
        "## Run options",
        "",
        "Keys of a recipe, and flags of the same names.",
        "",
    ]
    rows = [
        [code(name), code("--" + name.replace("_", "-")), cell(options.type_name(f.type)), _default(f), _meaning(f)]
        for name, f in options.fields(RunOptions).items()
    ]
    lines += table(["key", "flag", "type", "default", "meaning"], rows)
    lines += [
        "## Pipelines",
        "",
        "A file with a key `stages` is for `rlhf pipeline`: a recipe a stage, in order; keys beside `stages` hold for",
        "every stage that doesn't say otherwise. `@STAGE` stands for the model that a stage before it wrote. See",
        "[stages in a row](../how-to/pipeline.md).",
        "",
    ]
    return "\n".join(lines)


def _run_directory_page() -> str:
    files = constant(CORE, "rundir", "FILES")  # read, not imported: `rlhf.rundir` brings torch
    free = constant(CORE, "rundir", "_FREE_TO_CHANGE")
    lines = [
        "# The run directory",
        "",
        "`--output DIR`; left out, `runs/ALGO-DATE-TIME`. Made when the first step is about to start: a request that",
        "is refused leaves nothing behind. The keys of `metrics.jsonl` are in the [glossary](../glossary.md#metrics).",
        "",
        *table(["in it", "what it is"], [[code(name), cell(text)] for name, text in files.items()]),
        "A pipeline's directory holds a run directory a stage, `pipeline.yaml` (the stages), `recipes/` (each stage's,",
        "as it was run) and `pipeline.json` (each stage's name with its summary).",
        "",
        "`--resume` must find the recipe that the directory was made with. Free to change:",
        f"{codes(sorted(free))}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    check = parser.parse_args(arguments).check
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")} if FOLDER.is_dir() else {}
    stale = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
    if check:
        for name in stale:
            print(f"docs/reference/{name} is not what the code says; write it anew: {COMMAND}", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
        print(f"docs/reference/{name}")
    return 0


if __name__ == "__main__":
    assert hooks.HOOK_OF_KIND.keys() == TITLES.keys()
    sys.exit(main())
