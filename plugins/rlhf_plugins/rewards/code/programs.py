"""The program in a response."""

from __future__ import annotations

import re
import textwrap

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)(.*)")
_PYTHON = frozenset({"python", "py", "python3"})


def blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, content) of each fenced block, in order; one that nothing closes goes to the end."""
    found: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        match = _FENCE.fullmatch(line)
        if fence:
            if match and match[1].startswith(fence) and not (match[2] or match[3].strip()):
                fence = ""
            else:
                found[-1][1].append(line)
        elif match:
            fence = match[1]
            found.append((match[2].lower(), []))
    return [(language, "".join(f"{line}\n" for line in lines)) for language, lines in found]


def program(response: str, extract: str) -> str | None:
    """The last block that is marked as Python, else the last that is marked as nothing; None where there is none.

    Args:
        extract: "fenced", or "auto": where there is no block at all, the whole response.
    """
    found = blocks(response)
    if not found and extract == "auto":
        found = [("", response)]
    for wanted in (_PYTHON, frozenset({""})):
        of_sort = [content for language, content in found if language in wanted and content.strip()]
        if of_sort:
            return textwrap.dedent(of_sort[-1])  # a block in a list is indented
    return None
