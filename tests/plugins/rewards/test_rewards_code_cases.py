"""Which text of a response is its program, what tests a column holds, and what of them is decided outside."""

from __future__ import annotations

import ast
import json
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from rlhf_plugins.rewards.code import jail
from rlhf_plugins.rewards.code.cases import Opaque, Output, Statement, Value, decided, decode, read
from rlhf_plugins.rewards.code.programs import blocks, program

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    # response, extract, program
    ("print(1)", "auto", "print(1)"),
    (" print(1)", "auto", "print(1)"),
    ("print(1)", "fenced", None),
    ("", "auto", None),
    ("  \n", "auto", None),
    ("a\n```python\nx = 1\n```\nb", "auto", "x = 1\n"),
    ("```py\nfirst\n```\nor\n```Python3\nsecond\n```", "fenced", "second\n"),
    ("```\nplain\n```", "fenced", "plain\n"),
    ("```python\ncode\n```\nprints\n```\n3\n```", "auto", "code\n"),  # what is marked goes before
    ("```bash\nls\n```", "auto", None),
    ("```python\n```\n", "auto", None),
    ("```python\ncut off", "auto", "cut off\n"),
    ("~~~python\na = '''\n```\n'''\n~~~", "auto", "a = '''\n```\n'''\n"),
    ("````python\n```\n````", "auto", "```\n"),
    ("1. so\n   ```python\n   if a:\n       b\n   ```", "auto", "if a:\n    b\n"),
    ("```python title=x\na\n```", "auto", "a\n"),
    ("Use `x = 1` inline", "fenced", None),
]


@pytest.mark.parametrize(("response", "extract", "expected"), PROGRAMS)
def test_the_program_of_a_response(response: str, extract: str, expected: str | None) -> None:
    assert program(response, extract) == expected


def test_blocks_in_order() -> None:
    assert blocks("```A\n1\n```\n```\n2") == [("a", "1\n"), ("", "2\n")]


def test_inputs_and_outputs_in_every_shape() -> None:
    expected = (Output("1\n", "2\n"), Output("3\n", "4\n"))
    pairs = [{"input": "1\n", "output": "2\n"}, {"input": "3\n", "output": "4\n"}]
    table = {"inputs": ["1\n", "3\n"], "outputs": ["2\n", "4\n"]}
    for shape in (pairs, tuple(pairs), table, json.dumps(pairs), json.dumps(table)):
        assert read(shape) == expected
    assert read({"input": ["1", "2"], "output": ["3"]}) == (Output("1\n2", "3"),)


def test_each_assert_is_a_test_with_what_stands_before_it() -> None:
    first, second = read("import math\nassert f(1) == 2, 'why'\nx = 3\nassert f(x) == 4")
    assert isinstance(first, Value) and isinstance(second, Value)
    assert (first.setup, first.expression) == ("import math", "f(1)")
    assert (second.setup, second.expression) == ("import math\nx = 3", "f(x)")
    assert read(["assert f(1) == 2", "assert f(2) == 3"]) == read("assert f(1) == 2\nassert f(2) == 3")
    whole = "def check(f):\n    assert f(1) == 2\ncheck(g)\n"
    assert read(whole) == (Statement(whole),)
    assert read("for i in range(3):\n    assert f(i)") == (Statement("for i in range(3):\n    assert f(i)"),)


REFUSED = [
    (None, "not a NoneType"),
    (3, "not a int"),
    ([], "no tests"),
    ("[]", "no tests"),
    ([3], "not a int"),
    ({"input": "1"}, "must be texts"),
    ({"inputs": ["1"], "outputs": []}, "no lists of one length"),
    ({"inputs": "1", "outputs": None}, "no lists of one length"),
    ("", "assert nothing and call nothing"),
    ("x = 1", "assert nothing and call nothing"),
    ("def check(f):\n    assert f(1)", "assert nothing and call nothing"),  # nobody calls it: all would pass
    ("assert f(1) ==", "no Python, line 1"),
    ("(" * 5000, "no Python"),
]


@pytest.mark.parametrize(("value", "why"), REFUSED)
def test_what_holds_no_tests_is_refused(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(value)


DECIDED = [
    # assert, what is computed, values for which it holds, values for which it doesn't
    ("f(1) == 2", "f(1)", [2, 2.0], [3, "2", None, Opaque(True)]),
    ("2 == f(1)", "f(1)", [2], [3]),
    ("f(1) != 2", "f(1)", [3, Opaque(False)], [2]),
    ("f(1) < 2", "f(1)", [1], [2, 3]),
    ("2 < f(1)", "f(1)", [3], [2, 1]),
    ("2 >= f(1)", "f(1)", [2, 1], [3]),
    ("f(1) is None", "f(1)", [None], [0, Opaque(False)]),
    ("f(1) is not None", "f(1)", [0, Opaque(False)], [None]),
    ("f(1) is True", "f(1)", [True], [1]),
    ("f(1) in (1, 2)", "f(1)", [1, 2], [3]),
    ("f(1)", "f(1)", [1, "a", Opaque(True)], [0, "", None, Opaque(False)]),
    ("not f(1)", "f(1)", [0, Opaque(False)], [1]),
    ("not f(1) == 2", "f(1)", [3], [2]),
    ("sorted(f(1)) == [1, 2]", "sorted(f(1))", [[1, 2]], [[2, 1], (1, 2)]),
    ("f(1) == {'a': [1, (2,)]}", "f(1)", [{"a": [1, (2,)]}], [{"a": [1, [2]]}]),
    ("f(1) == -1.5", "f(1)", [-1.5], [1.5]),
    ("abs(f(1) - 0.5) < 1e-3", "f(1)", [0.5, 0.5009], [0.502, 0.498]),
    ("abs(0.5 - f(1)) <= 1e-3", "f(1)", [0.5], [0.6]),
    ("math.isclose(f(1), 0.5)", "f(1)", [0.5], [0.6]),
    ("math.isclose(f(1), 0.5, rel_tol=0.5)", "f(1)", [0.6], [2.0]),
    ("f(1) == f(2)", "f(1) == f(2)", [True], [False]),
    ("1 < f(1) < 3", "1 < f(1) < 3", [True], [False]),
    ("f(1) and g(1)", "f(1) and g(1)", [1], [0]),
]


@pytest.mark.parametrize(("test", "computed", "good", "bad"), DECIDED)
def test_what_is_expected_is_decided_outside(test: str, computed: str, good: list[Any], bad: list[Any]) -> None:
    expression, holds = decided(ast.parse(test, mode="eval").body)
    assert ast.unparse(expression) == computed
    assert [holds(value) for value in good] == [True] * len(good)
    assert [holds(value) for value in bad] == [False] * len(bad)


class Colour(IntEnum):
    red = 3


Point = namedtuple("Point", "x y")
PLAIN = [
    None, True, 0, -3, 2**53, -(10**5000), 0.1, float("inf"), "a\ud800é", b"\0x", 1 + 2j, [1, [2]], (1, (2,)), {1, 2},
    frozenset({1}), {"a": {1: (2,)}}, {(1, 2): 3}, {frozenset({1}): 2}, [], {},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "number")
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    back = decode(json.loads(json.dumps(jail.plain(value))))
    assert back == value and type(back) is type(value)


def test_a_subclass_counts_as_what_it_derives_from_and_anything_else_as_true_or_false() -> None:
    def through(value: Any) -> Any:
        return decode(json.loads(json.dumps(jail.plain(value))))

    class AlwaysEqual:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Sly(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    assert through(Point(1, 2)) == (1, 2) and type(through(Point(1, 2))) is tuple
    assert through(OrderedDict(a=1)) == {"a": 1} and through(Counter("aa")) == {"a": 2} and through(Colour.red) == 3
    assert type(through(Colour.red)) is int and type(through(Sly("a"))) is str and through(Sly("a")) != "b"
    assert isinstance(through(AlwaysEqual()), Opaque) and through([AlwaysEqual()]) != [1]
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(ValueError):
        jail.plain(nested)


def test_output_is_compared_but_for_blanks_at_ends() -> None:
    case = Output("", "a b\nc\n")
    assert all(case.holds(text) for text in ("a b\nc", "a b  \nc\n\n", "a b\r\nc\r\n"))
    assert not any(case.holds(text) for text in ("a  b\nc", " a b\nc", "a b\n\nc", "a b", ""))


def test_the_shapes_of_the_page() -> None:
    (page,) = [block for kind, block in blocks((ROOT / "docs" / "how-to" / "rewards.md").read_text()) if kind == "json"]
    assert [len(read(row["tests"])) for row in json.loads(page)] == [2, 2, 2, 2]
