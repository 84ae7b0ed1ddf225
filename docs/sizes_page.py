"""The page of algorithms side by side: paper, lines, models, passes, tests. Reads files; imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from rlhf.entries import AlgorithmEntry

PACKAGE = "rlhf_plugins"


def lines_of(path: Path) -> int:
    """All of a file's lines: docstring, blank lines and imports too."""
    return path.read_text(encoding="utf-8").count("\n")


@cache
def imported(path: Path, root: Path) -> frozenset[Path]:
    """The first-party modules that a module imports, at once or through others; package files left out, which hold
    the entries."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}.")):
            continue
        base = root.joinpath(*node.module.split("."))
        # `from package import module` names a file below, `from module import name` the module's own
        for file in (base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)):
            if file.is_file() and file != path:
                found |= {file} | imported(file, root)
    return frozenset(found)


def paper(path: Path, name: str) -> str:
    """What the file's docstring names in its first paragraph: everything in brackets that has a year in it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    cited = [
        found for found in re.findall(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", first) if re.search(r"\b\d{4}\b", found)
    ]
    if not cited:
        raise ValueError(f"{path}: the first paragraph of its docstring names no source with a year, for {name}")
    return "; ".join(cited)


def tests_of(entry: AlgorithmEntry, path: Path, helpers: Iterable[Path], tests: Path) -> list[Path]:
    """The file of tests of the algorithm's own file; where there is none, those that name or import it; and those
    of the helpers that only it uses."""
    folder = tests / "plugins" / "algorithms"
    own = {folder / f"test_algorithms_{path.stem}.py"}
    named = (f'"{entry.name}"', f"{PACKAGE}.algorithms.{path.stem} ")
    found = {file for file in own if file.is_file()} or {
        file for file in folder.glob("test_*.py") if any(x in file.read_text(encoding="utf-8") for x in named)
    }
    for helper in helpers:
        found |= set((tests / "plugins" / helper.parent.name).glob(f"test_*_{helper.stem}.py"))
    return sorted(found)


def rows(entries: Sequence[AlgorithmEntry], root: Path, tests: Path) -> list[dict[str, Any]]:
    """One for each algorithm, by name."""
    paths = {
        entry.name: root.joinpath(*str(entry.impl).partition(":")[0].split(".")).with_suffix(".py") for entry in entries
    }
    needs: Mapping[Path, frozenset[Path]] = {path: imported(path, root) for path in paths.values()}
    found = []
    for entry in entries:
        path = paths[entry.name]
        others = frozenset().union(*(modules for other, modules in needs.items() if other != path), paths.values())
        helpers = sorted(needs[path] - others)
        config = entry.config() if entry.config else None
        roles = entry.roles(config) if callable(entry.roles) else entry.roles
        passes = entry.footprint(config) if entry.footprint is not None else None
        found.append(
            {
                "name": entry.name,
                "paper": paper(path, entry.name),
                "file": path,
                "lines": lines_of(path),
                "helpers": helpers,
                "own": sum(map(lines_of, helpers)),
                "roles": [role.name for role in roles],
                "trained": [role.name for role in roles if role.trainable],
                "passes": passes,
                "online": "rollouts" in entry.requires,
                "tests": tests_of(entry, path, helpers, tests),
            }
        )
    return sorted(found, key=lambda row: row["name"])


def passes_told(row: Mapping[str, Any]) -> str:
    """What a step computes, for people."""
    passes = row["passes"]
    if passes is None:
        return ""
    frozen = [name for name in row["roles"] if name not in row["trained"]]
    scored = passes.scored if passes.scored is not None else (row["roles"] if row["online"] else frozen)
    sampled = f"{passes.responses} sampled a prompt; " if row["online"] else ""
    several = f" x {passes.epochs}" if passes.epochs > 1 else ""
    forward = f"scores {', '.join(scored)}{' once' if passes.once else ''}; " if scored else ""
    return f"{sampled}{forward}trains {', '.join(row['trained'])}{several}"


def sizes_page(entries: Sequence[AlgorithmEntry], root: Path, tests: Path, table: Any, cell: Any, code: Any) -> str:
    """The whole page."""
    found = rows(entries, root, tests)
    sizes = [row["lines"] + row["own"] for row in found]
    shown = [
        [
            f"[`{row['name']}`](algo.md#{row['name'].lower().replace('.', '').replace('+', '')})",
            cell(row["paper"]),
            f"{code(row['file'].name)} {row['lines']}",
            ", ".join(f"{code(helper.name)} {lines_of(helper)}" for helper in row["helpers"]),
            cell(passes_told(row)),
            ", ".join(code(file.name) for file in row["tests"]),
        ]
        for row in found
    ]
    lines = [
        "# Algorithms side by side",
        "",
        f"{len(found)} algorithms. An algorithm's own lines, its file and what only it uses, docstrings and blank",
        f"lines counted: {median(sizes):.0f} at the median, {max(sizes)} at the most.",
        "",
        "Roles and passes are those of the defaults: an option can ask for more, such as a reference for a KL. The",
        "options are told in [algorithms](algo.md). Tests hold each against numbers worked out by hand; those named",
        "lie in `tests/plugins/algorithms` and `tests/plugins/functional`. Variants of one file share its lines.",
        "",
    ]  # fmt: skip
    head = ["algorithm", "paper", "file, lines", "only it uses, lines", "a step", "tests"]
    return "\n".join(lines + table(head, shown))
