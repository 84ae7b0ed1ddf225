"""Edits by rule that are no errors: the program they make does the same, or differs in what nobody can see.

Each needs its reason, and each must still be an edit that a rule makes.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Equivalent:
    file: str
    line: str
    """The line of code, as a pattern of fnmatch."""
    change: str
    """As the program prints it."""
    reason: str


EQUIVALENT: tuple[Equivalent, ...] = ()
