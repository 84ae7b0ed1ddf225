"""Right or wrong against a reference answer.

    score = correct if the response's answer equals the row's, else wrong

Numbers are equal when their values are: 1,234 = 1234.00, $18 = 18, 50% = 50, 72. = 72, \\frac{1}{2} = 1/2 = 0.5,
3\\frac{1}{2} = 3.5. They are read in English notation (comma for thousands) and compared as fractions, never as floats.
Other texts are equal when their characters are, but for runs of spaces, a final full stop and TeX's spacing. Formulas
are not simplified: for x+1 = 1+x use `--reward python` with a checker of your own.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlhf.api import Reward, Rollouts, RunError, Score
from rlhf_plugins.rewards import samples

# Digits with or without thousands' commas, then decimals and an exponent (bounded, so that 1e999999999 costs nothing).
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
_NUMBER = re.compile(
    # A minus right after a word or a bracket subtracts: 5-3 ends in 3.
    r"(?P<sign>(?:(?<![\w.)\]}])[-+])?)(?:[$€£](?P<sign2>-?))?"
    rf"(?:(?P<whole>\d+)\s+(?=\d+/\d))?(?P<number>{_DIGITS})(?:/(?P<denominator>{_DIGITS}))?%?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)(\d))")
_BRACE = re.compile(r"\\boxed\{|(?<!\\)[{}]")  # one after a backslash is a character of the answer: \{1, 2\}
_SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]")


class Answer(Reward):
    """See the module. Raises RunError where a row has no usable reference."""

    def judge(self, rollouts: Rollouts, score: Score) -> list[float]:
        """B scores, each `correct` or `wrong`."""
        config = self.config
        right = [
            is_correct(text, self._reference(rollouts, i), config.extract) for i, text in enumerate(rollouts.texts)
        ]
        return [config.correct if verdict else config.wrong for verdict in right]

    def _reference(self, rollouts: Rollouts, i: int) -> str:
        column, found = self.config.answer_column, samples.columns(rollouts, i)
        who = f"reward {self.context.label or 'answer'!r}, {samples.name(rollouts, i)}"
        if column not in found:
            raise RunError(f"{who}: no column {column!r}; its columns: {', '.join(found) or 'none'}")
        value: Any = found[column]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RunError(f"{who}: column {column!r} must hold text or a number, not {value!r}")
        reference = str(value).rpartition("####")[2].strip()
        if not reference or (self.config.extract == "number" and last_number(reference) is None):
            wanted = "a number" if self.config.extract == "number" else "an answer"
            raise RunError(f"{who}: column {column!r} holds {value!r}, in which there is not {wanted}")
        return reference


def is_correct(response: str, reference: str, extract: str) -> bool:
    """Whether the response's answer is the reference. extract: auto, number, boxed or exact; see the module."""
    if extract == "exact":
        return response.strip() == reference.strip()
    if extract == "number":
        return (given := last_number(response)) is not None and given == last_number(reference)
    boxed = last_boxed(reference)
    expected = reference if boxed is None else boxed
    answer = last_boxed(response)
    if answer is None and extract == "boxed":
        return False
    number = whole_number(expected)
    if answer is None:
        return last_number(response) == number if number is not None else tidy(response) == tidy(expected)
    return whole_number(answer) == number if number is not None else tidy(answer) == tidy(expected)


def last_boxed(text: str) -> str | None:
    r"""What the last closed \boxed{...} holds, braces inside it paired; None where there is none."""
    open_braces: list[tuple[int, bool]] = []  # (where what it holds begins, whether it is a box)
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{"):
            open_braces.append((brace.end(), brace[0] != "{"))
        elif open_braces:
            begin, is_box = open_braces.pop()
            if is_box and (last is None or begin > last[0]):
                last = begin, brace.start()
    return text[slice(*last)] if last else None


def last_number(text: str) -> Fraction | None:
    """The last number in a text; None where there is none."""
    matches = list(_NUMBER.finditer(tidy(text)))
    return _value(matches[-1]) if matches else None


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, as a whole; None where it is anything else."""
    match = _NUMBER.fullmatch(tidy(text).strip("$ "))
    return _value(match) if match else None


def tidy(text: str) -> str:
    """A text as it is compared: plain fractions, no TeX spacing, single spaces, no full stop at the end."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = _SPACING.sub("", _FRACTION.sub(_plain_fraction, text))
    return re.sub(r"\s+", " ", text).strip().removesuffix(".")


def _plain_fraction(match: re.Match[str]) -> str:
    before = match.string[max(match.start() - 1, 0) : match.start()]
    space = " " if before.isdigit() else ""  # a mixed number: 3\frac{1}{2} is 3 1/2
    return f"{space}{match[1] or match[3]}/{match[2] or match[4]}"


def _value(match: re.Match[str]) -> Fraction | None:
    def number(digits: str) -> Fraction:
        return Fraction(Decimal(digits.replace(",", "")))  # through Decimal: int() refuses over 4300 digits

    value, denominator = number(match["number"]), match["denominator"]
    if denominator is not None:
        if not number(denominator):
            return None
        value /= number(denominator)
    if match["whole"]:
        value += number(match["whole"])
    return -value if "-" in (match["sign"], match["sign2"]) else value
