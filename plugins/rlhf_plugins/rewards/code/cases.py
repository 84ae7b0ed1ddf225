"""Tests of a program, as a row of data holds them, and what of them is decided outside the process that runs it.

    [{"input": "2 3\\n", "output": "5\\n"}, ...]          standard input, and the output that is expected
    {"inputs": ["2 3\\n", ...], "outputs": ["5\\n", ...]}  the same
    "assert add(2, 3) == 5\\nassert ..."                  Python; each assert at the top level is a test
    ["assert add(2, 3) == 5", ...]                        the same

or any of them as JSON in a text. Of `assert CALL == LITERAL` and its like (`LITERALS`) the process gets CALL alone, and
tells its value; what is expected never enters it. Imports no torch.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

Check = Callable[[Any], bool]


@attrs.frozen
class Output:
    """The program reads `stdin` and prints `expected`; blanks at ends of lines, and empty last lines, don't count."""

    stdin: str
    expected: str

    def holds(self, printed: str) -> bool:
        return _lines(printed) == _lines(self.expected)


@attrs.frozen
class Value:
    """After the program and `setup`, `expression` has a value for which `holds`."""

    setup: str
    expression: str
    holds: Check = attrs.field(eq=False)
    source: str
    """The whole test: two are equal when it is."""


@attrs.frozen
class Statement:
    """After the program, `source` raises nothing: it is judged by the process itself."""

    source: str


Case = Output | Value | Statement


class Opaque:
    """A value that is no plain data; all that is known of it is whether it is true."""

    def __init__(self, true: bool) -> None:
        self._true = true

    def __bool__(self) -> bool:
        return self._true


def read(value: Any) -> tuple[Case, ...]:
    """The tests that a column holds.

    Raises:
        ValueError: it holds none; says why.
    """
    found = tuple(_cases(value))
    if not found:
        raise ValueError("no tests")
    return found


def _cases(value: Any) -> Sequence[Case]:
    if isinstance(value, str):
        if value.lstrip()[:1] in ("[", "{"):  # as JSON does, and Python may
            with contextlib.suppress(json.JSONDecodeError):
                return _cases(json.loads(value))
        return _python(value)
    if isinstance(value, Mapping):
        if "inputs" in value or "outputs" in value:
            return _pairs(value.get("inputs"), value.get("outputs"))
        return [_pair(value.get("input"), value.get("output"))]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [case for item in value for case in _cases(item)]
    raise ValueError(f"tests are text, or a list of texts or of input and output, not a {type(value).__name__}")


def _pairs(inputs: Any, outputs: Any) -> list[Case]:
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs are no lists of one length")
    return [_pair(given, expected) for given, expected in zip(inputs, outputs, strict=True)]


def _pair(given: Any, expected: Any) -> Output:
    texts = ["\n".join(part) if isinstance(part, list) and part else part for part in (given, expected)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a test's input and output must be texts")
    return Output(texts[0], texts[1])


def _python(text: str) -> list[Case]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f", line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f": {error}"
        raise ValueError(f"its tests are no Python{where}") from None
    asserts = [node for node in tree.body if isinstance(node, ast.Assert)]
    if not asserts:
        if not any(_does_something(node) for node in tree.body):
            raise ValueError("its tests assert nothing and call nothing")
        return [Statement(text)]
    cases: list[Case] = []
    before: list[ast.stmt] = []
    for node in tree.body:
        if not isinstance(node, ast.Assert):
            before.append(node)
            continue
        setup = ast.unparse(ast.Module(before, [])) if before else ""
        expression, holds = decided(node.test)
        cases.append(Value(setup, ast.unparse(expression), holds, f"{setup}\n{ast.unparse(node)}"))
    return cases


def _does_something(node: ast.stmt) -> bool:
    """At the top level: definitions alone would pass with any program."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
        return False
    return any(isinstance(inner, ast.Call | ast.Assert) for inner in ast.walk(node))


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq, ast.NotEq: ast.NotEq, ast.Is: ast.Is, ast.IsNot: ast.IsNot,
    ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE,
}  # fmt: skip


def decided(test: ast.expr) -> tuple[ast.expr, Check]:
    """(what the process computes, what must hold of it): `E`, `not E`, E compared with a literal, `abs(E - LITERAL)`
    compared with one, `math.isclose(E, LITERAL)`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner, holds = decided(test.operand)
        return inner, lambda value: not holds(value)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, op, right = test.left, type(test.ops[0]), test.comparators[0]
        if not _is_literal(right) and _is_literal(left) and op in _TURNED:
            left, op, right = right, _TURNED[op], left
        if _is_literal(right) and not _is_literal(left):
            return _compared(left, _COMPARISONS[op], ast.literal_eval(right))
    if isinstance(test, ast.Call) and ast.unparse(test.func) in ("math.isclose", "isclose") and len(test.args) == 2:
        value, expected = test.args
        options = {word.arg: word.value for word in test.keywords}
        if _is_literal(expected) and set(options) <= {"rel_tol", "abs_tol"} and all(map(_is_literal, options.values())):
            near = ast.literal_eval(expected)
            allowed = {str(name): ast.literal_eval(option) for name, option in options.items()}
            return value, lambda found: math.isclose(found, near, **allowed)
    return test, bool


def _compared(left: ast.expr, compare: Callable[[Any, Any], Any], literal: Any) -> tuple[ast.expr, Check]:
    if isinstance(left, ast.Call) and isinstance(left.func, ast.Name) and left.func.id == "abs" and len(left.args) == 1:
        inner = left.args[0]
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub):
            for value, expected in ((inner.left, inner.right), (inner.right, inner.left)):
                if _is_literal(expected) and not _is_literal(value):
                    return value, partial(_near, ast.literal_eval(expected), compare, literal)
    return left, lambda found: bool(compare(found, literal))


def _near(expected: Any, compare: Callable[[Any, Any], Any], allowed: Any, found: Any) -> bool:
    return bool(compare(abs(found - expected), allowed))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().split("\n")


def decode(value: Any) -> Any:
    """Plain data, as the process wrote it in JSON (`jail.plain`).

    Raises:
        ValueError, TypeError, LookupError: it is something else.
    """
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "o":
        return Opaque(bool(content))
    if kind == "i":
        return int(content, 16)
    if kind == "b":
        return bytes.fromhex(content)
    if kind == "c":
        return complex(*content)
    if kind == "d":
        return {decode(key): decode(item) for key, item in content}
    return {"l": list, "t": tuple, "s": set, "f": frozenset}[kind](map(decode, content))
