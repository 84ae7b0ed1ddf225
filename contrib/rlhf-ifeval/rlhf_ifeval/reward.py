"""Whether a response followed its prompt's instructions, by rules (IFEval, Zhou et al. 2023, arXiv:2311.07911).

    score = 1 if all of the row's instructions are followed, else 0        IFEval's strict accuracy of prompts
    partial: score = instructions followed / instructions                  of a row; each weighs the same

The instructions are in two columns of the prompt row, as in IFEval's data:

    {"prompt": "...", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

Left out: loose accuracy, which tries again without the first and last line and asterisks, and so pays for preambles.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from rlhf.api import Reward, Rollouts, RowError, Score
from rlhf_ifeval import IFEvalConfig
from rlhf_ifeval.instructions import INSTRUCTIONS, followed, problem_with

Instruction = tuple[str, dict[str, Any]]
"""A name and its arguments."""


class IFEval(Reward):
    """See the module."""

    config: IFEvalConfig

    def check(self, row: Any) -> None:
        """Raises RowError where the row's instructions can't be read or carried out."""
        self.instructions(row)

    def judge(self, rollouts: Rollouts, score: Score) -> list[float]:
        """B scores, from 0 to 1."""
        return [
            self.score(text, self.instructions(row)) for text, row in zip(rollouts.texts, rollouts.rows, strict=True)
        ]

    def score(self, text: str, instructions: list[Instruction]) -> float:
        """A response's, of one instruction at least."""
        did = [followed(name, text, arguments) for name, arguments in instructions]
        return sum(did) / len(did) if self.config.partial else float(all(did))

    def instructions(self, row: Any) -> list[Instruction]:
        """A row's.

        Raises:
            RowError: a column holds something else, a name is unknown, or arguments don't fit.
        """
        names = _list(row, self.config.names_column)
        arguments = _list(row, self.config.arguments_column)
        where = f"columns {self.config.names_column!r} and {self.config.arguments_column!r}"
        if not names or len(names) != len(arguments):
            raise RowError(f"{where} must be as long, and not empty; they hold {len(names)} and {len(arguments)}")
        found = []
        for name, given in zip(names, arguments, strict=True):
            if not isinstance(name, str) or name not in INSTRUCTIONS:
                raise RowError(unknown(name))
            if not isinstance(given, dict | None):
                raise RowError(f"{where}: the arguments of {name} must be a mapping, not {given!r}")
            # A data set in columns has every argument of every instruction in each row, null where it isn't meant.
            kept = {key: value for key, value in (given or {}).items() if value is not None}
            if problem := problem_with(name, kept):
                raise RowError(problem)
            found.append((name, kept))
        return found


def unknown(name: Any) -> str:
    """What to say of a name that there is not."""
    without_group = [known for known in INSTRUCTIONS if known.partition(":")[2] == name]
    near = without_group or difflib.get_close_matches(str(name).lower(), INSTRUCTIONS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(INSTRUCTIONS)}"
    return f"there is no instruction {name!r}; {hint}"


def _list(row: Any, column: str) -> list[Any]:
    """What a column holds, as a list or the JSON of one."""
    value = getattr(row, "extra", {}).get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"column {column!r} must hold a list, or one in JSON: {error}") from None
    if not isinstance(value, list | tuple):
        raise RowError(f"column {column!r} must hold a list, not {value!r}")
    return list(value)
