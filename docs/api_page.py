"""The reference page of `rlhf.api`, read from the source without importing it (griffe): so comments that give shapes
and docstrings of fields are there too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

GROUPS = {
    "rlhf.hooks": ("Making a plugin", "The entry module of a plugin yields entries from hooks."),
    "rlhf.options": ("Options", "Fields of a config class."),
    "rlhf.entries": ("Entries", "What a plugin offers. Importing these imports no torch."),
    "rlhf.rows": ("Rows of data", "What an algorithm's `data` can be."),
    "rlhf.plan": ("The plan", "What a constraint looks at."),
    "rlhf.errors": ("Errors", ""),
    "rlhf.component": ("Components", "What all implementations have, and what they are given."),
    "rlhf.interfaces.algorithm": ("Implementing algorithms", "What the class behind an entry derives from."),
    "rlhf.interfaces.policy": ("Implementing policies", ""),
    "rlhf.interfaces.rollout": ("Implementing engines and rewards", ""),
    "rlhf.interfaces.training": ("Implementing memory strategies, optimisers and backends", ""),
    "rlhf.interfaces.run": ("Implementing formats and trackers", ""),
    "rlhf.sequences": ("Sequences and rollouts", "B counts sequences, N their response tokens; `[N]` is flat."),
    "rlhf.experience": ("Experience and batches", "What is learnt from, and the means that a loss is made of."),
    "rlhf.scores": ("Scores of sequences", "What a model says of sequences, and how it is asked."),
    "rlhf.mixture": ("Completions", "For algorithms that learn them."),
    "rlhf.planning.footprint": (
        "What a component takes",
        "For the resource planner: each entry's `footprint`. See [reading a plan](../planning.md).",
    ),
    "rlhf.planning.architecture": ("What a model is made of", "Counted from its config.json."),
    "rlhf.planning.activations": ("What a forward takes", ""),
    "rlhf.metrics": ("Metrics", "What a component reports beside the loss, as `context.metrics`."),
    "rlhf.schedules": ("Schedules", "What `OptimizerStrategy.factor` may return."),
    "rlhf.scaling": ("Loss scaling", "What a backend does where products are of float16."),
    "rlhf.floor": ("What a model costs", "Counted by a policy, for the floor of a step."),
    "rlhf.world": ("Ranks", "What the processes of a run are to each other. A single one has a world of its own."),
    "rlhf.place": ("Where a process stands", "For parallel backends and launchers."),
    "rlhf.rank": ("How a rank ends", "For launchers."),
    "rlhf.checkpoint": ("State that is spread over ranks", "For parallel backends."),
    "rlhf": ("The version", ""),
}
_SHOWN_DUNDERS = {"__init__", "__call__", "__getitem__"}


def api_page(core: Path) -> str:
    """The page, from the sources below `core`."""
    package = griffe.load("rlhf", search_paths=[core], resolve_aliases=True, allow_inspection=False)
    api = package["api"]
    exported = [str(name).strip("'\"") for name in api.exports]
    lines = [
        "# The public interface: `rlhf.api`",
        "",
        "Everything a plugin needs, and nothing else. What isn't here may change with any release.",
        "",
    ]
    found: dict[str, list[tuple[str, Any]]] = {}
    for name in exported:
        target = api.members[name].final_target if api.members[name].is_alias else api.members[name]
        found.setdefault(target.path.rpartition(".")[0], []).append((name, target))
    for module, (title, about) in GROUPS.items():
        members = found.pop(module)
        lines += [f"## {title}", "", *([about, ""] if about else [])]
        lines += [", ".join(f"[`{name}`](#{name.lower()})" for name, _ in members), ""] if len(members) > 3 else []
        if module == "rlhf.hooks":
            lines += list(_hooks(package["hooks"]["Hooks"]))
        for name, target in members:
            lines += list(_member(name, target))
    if found:
        raise ValueError(f"GROUPS lacks the modules {', '.join(found)}")
    return "\n".join(lines)


def constant(core: Path, module: str, name: str) -> Any:
    """The value of a module's constant, read from the source."""
    package = griffe.load("rlhf", search_paths=[core], allow_inspection=False)
    return ast.literal_eval(str(package[module][name].value))


def _broken(signature: str) -> list[str]:
    """A signature, a line a parameter where it is long."""
    if len(signature) <= 88:
        return [signature]
    start, depth, lines = signature.index("(") + 1, 0, [signature[: signature.index("(") + 1]]
    for place, sign in enumerate(signature[start:], start):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 0) or depth < 0:
            lines.append("    " + signature[start:place].strip() + ",")
            start = place + 1
        if depth < 0:
            return [*lines, signature[place:]]
    raise ValueError(f"{signature!r}: its parentheses don't match")


def _hooks(hooks: Any) -> Iterator[str]:
    yield from ("| hook | what it yields |", "| --- | --- |")
    for name, hook in hooks.functions.items():
        yield f"| `{name}` | {_cell(hook.docstring.value)} |"
    yield ""


def _member(name: str, target: Any) -> Iterator[str]:
    yield from (f"### {name}", "")
    if target.is_attribute:
        value = "" if target.value is None else str(target.value)
        if value:
            yield from ("```python", f"{name} = {value}", "```", "")
        yield from _docstring(target)
        return
    if target.is_function:
        yield from ("```python", *_broken(f"def {target.signature()}: ..."), "```", "")
        yield from _docstring(target)
        return
    bases = ", ".join(str(base).split("[")[0].rpartition(".")[2] for base in target.bases)
    yield from ("```python", f"class {name}{f'({bases})' if bases else ''}: ...", "```", "")
    yield from _docstring(target)
    yield from _fields(target)
    for method in target.members.values():
        shown = not method.name.startswith("_") or method.name in _SHOWN_DUNDERS
        if shown and (method.is_function or "property" in method.labels):
            yield from _method(method)


def _fields(target: Any) -> Iterator[str]:
    rows = []
    for field in target.members.values():
        if not field.is_attribute or "property" in field.labels or field.name.startswith("_") or not field.annotation:
            continue
        meaning = field.docstring.value if field.docstring else ""
        comment = re.search(r"  # (?!type:|noqa)(.*)$", field.lines[0]) if field.lines else None
        meaning = " ".join(part for part in (comment.group(1) if comment else "", meaning) if part)
        default = _default(str(field.value)) if "class-attribute" in field.labels and field.value is not None else ""
        kind = re.sub(r"^ClassVar\[(.*)\]$", r"\1", str(field.annotation or ""))
        rows.append(f"| `{field.name}` | {_code(kind)} | {_code(default)} | {_cell(meaning)} |")
    if rows:
        yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows, "")


def _method(method: Any) -> Iterator[str]:
    if method.is_function:
        signature = re.sub(r"\((self|cls)(, )?", "(", str(method.signature()), count=1)
    else:
        signature = f"{method.name}: {method.annotation}"
    yield f"- `{signature}`"
    for line in _docstring(method):
        yield f"  {line}".rstrip()


def _docstring(target: Any) -> Iterator[str]:
    """Text, then arguments, results and errors as lists."""
    if not target.docstring:
        yield ""
        return
    for section in target.docstring.parse("google", warnings=False):
        kind = section.kind.value
        if kind == "text":
            yield from ("", *section.value.split("\n"), "")
        elif kind in ("parameters", "other parameters"):
            yield from ("", *(f"- `{item.name}`: {_line(item.description)}" for item in section.value), "")
        elif kind == "returns":
            yield from ("", *(f"Returns {_line(item.description)}." for item in section.value), "")
        elif kind == "raises":
            yield from ("", *(f"Raises `{item.annotation}`: {_line(item.description)}" for item in section.value), "")
        else:
            raise ValueError(f"{target.path}: its docstring has a section of a kind not known here: {kind}")


def _default(value: str) -> str:
    """What a field is when left out: attrs' own wrapping taken off."""
    call = ast.parse(value, mode="eval").body
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) in ("attrs.field", "attrs.Factory")):
        return value
    if ast.unparse(call.func) == "attrs.Factory":
        factory = call.args[0]
        return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return given.get("default", "")


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""
