from __future__ import annotations

import pytest

from rlhf.api import RowError
from rlhf_plugins.formats.template import columns_of, fill


def test_columns_are_named_once_in_order() -> None:
    assert columns_of("{b} and {a}, {b} again") == ("b", "a")
    assert columns_of("{some column}") == ("some column",)


def test_values_are_text_whatever_they_hold() -> None:
    row = {"code": '{"a": {x}} {{y}}', "n": 3}
    assert fill("{code} x{n}", row) == '{"a": {x}} {{y}} x3'


def test_a_doubled_brace_is_a_brace() -> None:
    assert fill('Answer as {{"value": "{q}"}} in \\boxed{{}}', {"q": "2"}) == 'Answer as {"value": "2"} in \\boxed{}'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{question", "can't be read"),
        ("question}", "can't be read"),
        ("{}", "no column's name"),
        ('{"a": 1}', "no column's name"),
        ("{q.__class__}", "no column's name"),
        ("{q[0]}", "no column's name"),
        ("{q:>9}", "no column's name"),
        ("{q!r}", "no column's name"),
        ("always this", "names no column"),
    ],
)
def test_templates_that_are_refused(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        columns_of(template)


@pytest.mark.parametrize(
    ("row", "reason"),
    [({}, "is missing"), ({"q": None}, "is missing"), ({"q": ["a"]}, "holds a list"), ({"q": True}, "holds a bool")],
)
def test_rows_that_are_refused(row: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=f"'q' {reason}"):
        fill("{q}?", row)
