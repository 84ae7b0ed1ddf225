"""Pages, their fenced blocks, and the files among these."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_NAMED = re.compile(r"# ([\w./-]+\.(?:py|toml|yaml))\n")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, in order."""
    found: list[tuple[str, str]] = []
    language: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("```") and language is None:
            language, lines = line[3:].strip(), []
        elif line.startswith("```") and language is not None:
            found.append((language, "\n".join(lines) + "\n"))
            language = None
        else:
            lines.append(line)
    return found


def files(text: str) -> dict[str, str]:
    """The blocks whose first line is a comment with a file's name: name -> content."""
    found = {}
    for _, content in blocks(text):
        if named := _NAMED.match(content):
            found[named[1]] = content
    return found


def write_files(page: Path, folder: Path) -> None:
    """Make the files that a page shows."""
    for name, content in files(page.read_text(encoding="utf-8")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def inline(text: str) -> list[str]:
    """What stands in backticks outside the fenced blocks, its line breaks made blanks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def shell_lines(text: str) -> list[str]:
    """Commands of the blocks that a reader pastes into a shell; lines that end in a backslash go on."""
    pasted = "".join(content for language, content in blocks(text) if language in ("", "sh", "bash"))
    return [line.strip() for line in pasted.replace("\\\n", " ").splitlines()]
