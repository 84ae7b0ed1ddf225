"""The answer reward: what is read as an answer, and when two answers are the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from rlhf.errors import RunError
from rlhf.interfaces import Context
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards import AnswerConfig, rlhf_rewards
from rlhf_plugins.rewards.answer import Answer, is_correct, last_boxed, last_number, whole_number

LAST_NUMBERS = [
    ("so it is 72", "72"),
    ("72.", "72"),
    ("72.50 in all", "72.5"),
    ("-5", "-5"),
    ("\u22125", "-5"),  # the typographic minus
    ("it was -5 degrees", "-5"),
    ("5-3", "3"),  # a subtraction, no negative number
    ("f(x)-3", "3"),
    ("10 - 3 = 7", "7"),
    ("(-4)", "-4"),
    ("1,234", "1234"),
    ("1,234,567.80", "1234567.8"),
    ("1, 2, 3", "3"),
    ("1,2", "2"),  # a list: thousands come in threes
    ("12,3456", "3456"),
    ("$18", "18"),
    ("\\$18", "18"),
    ("-$18", "-18"),
    ("$-18", "-18"),
    ("$72$", "72"),
    ("50%", "50"),
    (".5", "1/2"),
    ("007", "7"),
    ("3/4", "3/4"),
    ("3 1/2 apples", "7/2"),
    ("\\frac{1}{2}", "1/2"),
    ("-\\frac{1}{2}", "-1/2"),
    ("5 - \\frac{1}{2}", "1/2"),
    ("\\dfrac{-3}{4}", "-3/4"),
    ("\\frac12", "1/2"),
    ("3\\frac{1}{2}", "7/2"),
    ("1.5e3", "1500"),
    ("1.5e-3", "3/2000"),
    ("1e99999999", "99999999"),  # an exponent of more than three digits isn't read as one
    ("10{,}000", "10000"),
    ("#### 72\n", "72"),
    ("x2", "2"),
    ("2024-05-03", "3"),
    ("1/0", None),
    ("none at all", None),
    ("", None),
    ("-", None),
]


@pytest.mark.parametrize(("text", "value"), LAST_NUMBERS)
def test_last_number(text: str, value: str | None) -> None:
    assert last_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", "72"),
        (" $1,000.00. ", "1000"),
        ("$\\frac{1}{2}$", "1/2"),
        ("72 apples", None),
        ("5, 7", None),
        ("x", None),
    ],
)
def test_whole_number(text: str, value: str | None) -> None:
    assert whole_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{6} and \boxed{7", "6"),  # cut off by the length limit
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{]0, \}[}", r"]0, \}["),  # an escaped brace pairs with none
        (r"} \boxed{a{b}c} {", "a{b}c"),
        (r"\boxed{}", ""),
        (r"boxed{3}", None),
        ("none", None),
    ],
)
def test_last_boxed(text: str, held: str | None) -> None:
    assert last_boxed(text) == held


VERDICTS = [
    # response, reference, extract, correct
    ("She pays $72.00.", "72", "auto", True),
    ("She pays 72 and 3 more", "72", "auto", False),
    (r"first 3, so \boxed{72}", "72", "auto", True),
    (r"\boxed{5, 72}", "72", "auto", False),
    (r"\boxed{\frac{2}{4}}", "0.5", "auto", True),
    ("Paris", "Paris", "auto", True),
    (" Paris.\n", "Paris", "auto", True),
    ("It is Paris", "Paris", "auto", False),
    ("paris", "Paris", "auto", False),
    ("", "Paris", "auto", False),
    ("no number", "72", "auto", False),
    (r"\boxed{x+1}", r"... so \boxed{x+1}", "auto", True),
    (r"\boxed{1+x}", r"\boxed{x+1}", "auto", False),
    (r"\boxed{\left( 1,\, 2\right)}", r"\boxed{( 1, 2)}", "auto", True),
    ("72", "72", "boxed", False),
    (r"\boxed{72}", "72.0", "boxed", True),
    ("one 71 two 72", "72", "number", True),
    ("71", "72", "number", False),
    ("1,234.0", "1234", "number", True),
    ("-72", "72", "number", False),
    ("0.1", "1/10", "number", True),
    (" 72\n", "72", "exact", True),
    ("72.0", "72", "exact", False),
    ("It is 72", "72", "exact", False),
]


@pytest.mark.parametrize(("response", "reference", "extract", "correct"), VERDICTS)
def test_verdicts(response: str, reference: str, extract: str, correct: bool) -> None:
    assert is_correct(response, reference, extract) is correct


def test_numbers_are_not_compared_as_floats() -> None:
    """2^53 and 2^53 + 1 are the same double; 0.1 + 0.2 is not 0.3 in doubles."""
    assert not is_correct("9007199254740993", "9007199254740992", "auto")
    assert is_correct("0.3", str(Fraction(3, 10)), "auto")


@pytest.mark.parametrize("unit", ["9", "1,", "\\boxed{", "\\frac{1}{", "- ", "1 "])
def test_degenerate_responses_are_judged_fast(unit: str) -> None:
    """A collapsed policy repeats itself to the length limit: 40,000 characters must not take quadratic time, and a
    number of 40,000 digits, past the limit of int(), must not raise. 2 s is far above linear, far below quadratic."""
    start = time.perf_counter()
    assert not is_correct(unit * (40_000 // len(unit)), "72", "auto")
    assert time.perf_counter() - start < 2.0


def test_scores_and_reference_column(rollouts: Callable[..., Rollouts], context: Context) -> None:
    rows = [{"solution": "adds up\n#### 1,000"}, {"solution": 7}, {"solution": 0.5}]
    given = rollouts(["1000", "8", "1/2"], rows)
    reward = Answer(AnswerConfig(answer_column="solution", correct=2.0, wrong=-1.0), context)
    assert reward.judge(given, None) == [2.0, -1.0, 2.0]  # type: ignore[arg-type]


def test_rows_are_asked_for_the_column_that_is_read() -> None:
    columns: Any = next(entry for entry in rlhf_rewards() if entry.name == "answer").columns
    assert columns(AnswerConfig()) == ("answer",)
    assert columns(AnswerConfig(answer_column="solution")) == ("solution",)


@pytest.mark.parametrize(
    ("row", "extract", "says"),
    [
        ({"target": "72"}, "auto", "no column 'answer'; its columns: target"),
        ({}, "auto", "its columns: none"),
        ({"answer": None}, "auto", "must hold text or a number, not None"),
        ({"answer": True}, "auto", "not True"),
        ({"answer": " "}, "auto", "not an answer"),
        ({"answer": "Paris"}, "number", "'Paris', in which there is not a number"),
    ],
)
def test_unusable_reference_is_refused_by_name(
    rollouts: Callable[..., Rollouts], context: Context, row: dict[str, Any], extract: str, says: str
) -> None:
    given = rollouts(["72", "72"], [{"answer": "72"}, row])
    with pytest.raises(RunError) as error:
        Answer(AnswerConfig(extract=extract), context).judge(given, None)  # type: ignore[arg-type]
    assert says in str(error.value)
    assert "reward 'mine', sample 1 (prompt '<s>question 1')" in str(error.value)
