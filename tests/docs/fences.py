"""Fenced blocks of a Markdown page."""

from __future__ import annotations


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


def shell_lines(text: str) -> list[str]:
    """Commands of the blocks that a reader pastes into a shell; lines that end in a backslash go on."""
    pasted = "".join(content for language, content in blocks(text) if language in ("", "sh", "bash"))
    return [line.strip() for line in pasted.replace("\\\n", " ").splitlines()]
