"""Errors planted by rule in the modules that are pure arithmetic: operators, comparisons, constants, calls, branches.

A rule changes the source's text at one place, found through its syntax tree, so that lines and comments stay. Left
alone are messages of errors, annotations, decorators and text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

import attrs
from equivalent import EQUIVALENT
from mutants import ROOT, Mutant, TableError

P = "plugins/rlhf_plugins"
T = "tests/plugins"

MODULES: dict[str, tuple[str, ...]] = {
    f"{P}/functional/advantages.py": (f"{T}/functional/test_functional_advantages.py",),
    f"{P}/functional/kl.py": (f"{T}/functional/test_functional_kl.py",),
    f"{P}/functional/packing.py": (f"{T}/functional/test_functional_packing.py",),
    f"{P}/functional/ppo.py": (f"{T}/functional/test_functional_ppo.py",),
    f"{P}/functional/preference.py": (f"{T}/functional/test_functional_preference.py",),
    f"{P}/functional/ragged.py": (f"{T}/functional/test_functional_ragged.py",),
    f"{P}/functional/scores.py": (f"{T}/functional/test_functional_scores.py",),
    f"{P}/policies/heads.py": (f"{T}/policies/test_policies_heads.py",),
    f"{P}/policies/layout.py": (f"{T}/policies/test_policies_layout.py",),
    f"{P}/engines/sampling.py": (f"{T}/engines/test_engines_sampling.py",),
    f"{P}/engines/slots.py": (f"{T}/engines/test_engines_slots.py",),
    f"{P}/optimizers/adamw.py": (f"{T}/test_optimizers.py",),
    "core/rlhf/schedules.py": (f"{T}/test_optimizers.py",),
    "core/rlhf/floor.py": ("tests/core/test_core_floor.py",),
    "core/rlhf/sequences.py": ("tests/core/test_core_sequences.py",),
    "core/rlhf/experience.py": ("tests/core/test_core_sequences.py",),
    "core/rlhf/scores.py": ("tests/core/test_core_sequences.py",),
}
"""Module -> the tests that must notice any error in it."""

_OPERATORS: dict[type[ast.AST], dict[str, str]] = {
    ast.Add: {"+": "-"}, ast.Sub: {"-": "+"}, ast.Mult: {"*": "/"}, ast.Div: {"/": "*"}, ast.FloorDiv: {"//": "*"},
    ast.Mod: {"%": "*"}, ast.Pow: {"**": "*"}, ast.LShift: {"<<": ">>"}, ast.BitAnd: {"&": "|"}, ast.BitOr: {"|": "&"},
    ast.MatMult: {"@": "*"},
}  # fmt: skip
_COMPARISONS: dict[type[ast.AST], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")), ast.LtE: ("<=", ("<", ">=")), ast.Gt: (">", (">=", "<")), ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)), ast.Is: ("is", ("is not",)), ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)), ast.NotIn: ("not in", ("in",)),
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any",
    "sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "zeros": "ones", "zeros_like": "ones_like",
    "ones": "zeros", "new_zeros": "new_ones", "no_grad": "enable_grad", "detach": "clone", "double": "float",
    "float": "double", "square": "abs", "argmax": "argmin", "argmin": "argmax", "logsigmoid": "sigmoid",
    "relu": "abs", "sqrt": "exp", "rsqrt": "exp", "cos": "sin", "ceil": "floor", "log_softmax": "softmax",
    "cumsum": "cumprod", "logsumexp": "amax", "heappop": "nlargest", "tril": "triu", "sorted": "list",
}  # fmt: skip
"""Methods and functions of modules that are called -> what a tired programmer might call instead."""
_BUILTINS = ("min", "max", "any", "all", "sorted")
"""Those that are called by their bare name too."""


@attrs.frozen
class Edit:
    """A change of the source's text."""

    start: int
    end: int
    new: str
    within: str
    """The function or class."""


def edits(source: str) -> list[Edit]:
    """Every edit that a rule makes, in the order of the text."""
    return sorted(_Finder(source).found, key=lambda edit: (edit.start, edit.end, edit.new))


def mutants(modules: Iterable[str] | None = None) -> Iterator[Mutant]:
    """A mutant for each edit, but for those that are listed as no error.

    Raises:
        TableError: the list names an edit that there is not.
    """
    unused = dict.fromkeys(EQUIVALENT, 0)
    for file, tests in MODULES.items():
        if modules is not None and file not in modules:
            continue
        source = (ROOT / file).read_text(encoding="utf-8")
        names: dict[str, int] = {}
        for edit in edits(source):
            line = source.count("\n", 0, edit.start) + 1
            code = source.splitlines()[line - 1].strip()
            change = f"{_short(source[edit.start : edit.end])} -> {_short(edit.new)}"
            here = (file, edit.within, change)
            accepted = [e for e in EQUIVALENT if (e.file, e.within, e.change) == here and e.line in code]
            for entry in accepted:
                unused[entry] += 1
            if accepted:
                continue
            base = f"{file.removeprefix(P + '/')}:{line} {change}"
            names[base] = names.get(base, 0) + 1
            name = base if names[base] == 1 else f"{base} ({names[base]})"
            mutated = source[: edit.start] + edit.new + source[edit.end :]
            ast.parse(mutated)  # a rule that makes no Python is a mistake here
            yield Mutant(name, file, mutated, code, tests, named=False)
    if modules is None and (rotten := [entry for entry, count in unused.items() if not count]):
        raise TableError(
            "\n".join(f"no such edit is made any more: {e.file}, {e.within}: {e.line}: {e.change}" for e in rotten)
        )


def _short(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return repr(text) if not text.strip() else text if len(text) <= 40 else text[:37] + "..."


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.source = source
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts
        self._lines = source.splitlines()
        self._within: list[str] = []
        self.found: list[Edit] = []
        self.visit(ast.parse(source))

    def at(self, line: int, column: int) -> int:
        """Columns of a syntax tree count bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt) and node.end_lineno is not None and node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def put(self, start: int, end: int, new: str) -> None:
        self.found.append(Edit(start, end, new, ".".join(self._within)))

    def between(self, left: ast.AST, right: ast.AST, text: str, new: Iterable[str]) -> None:
        """Replace an operator that stands between two expressions."""
        start, end = self.span(left)[1], self.span(right)[0]
        words = r"\b" if text[0].isalpha() else ""
        for match in re.finditer(words + re.escape(text).replace(r"\ ", r"\s+") + words, self.source[start:end]):
            if "#" not in self.source[start : start + match.start()]:
                for one in new:
                    self.put(start + match.start(), start + match.end(), one)
                return

    # What is left alone

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Text."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within.append(node.name)
        for default in [*node.args.defaults, *[d for d in node.args.kw_defaults if d is not None]]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._within.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._within.pop()

    # Rules

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        self.put(*self.span(node), "pass")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        for text, new in _OPERATORS.get(type(node.op), {}).items():
            self.between(node.left, node.right, text, [new])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        for text, new in _OPERATORS.get(type(node.op), {}).items():
            self.between(node.target, node.value, text + "=", [new + "="])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and type(node.operand.value) is int:
            self.put(*self.span(node), str(1 - node.operand.value))  # -1 -> 0: of two dimensions, 1 is the last one too
            return
        if isinstance(node.op, ast.USub | ast.Not):
            start, end = self.span(node)[0], self.span(node.operand)[0]
            text = self.source[start:end]
            kept = text.replace("-", "", 1) if isinstance(node.op, ast.USub) else text.replace("not", "", 1).lstrip()
            self.put(start, self.span(node)[1], kept + self.source[end : self.span(node)[1]])
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            text, new = _COMPARISONS[type(operator)]
            self.between(left, right, text, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        text, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, text, [new])
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        body, test, other = (self.source[slice(*self.span(part))] for part in (node.body, node.test, node.orelse))
        self.put(*self.span(node), f"({other}) if ({test}) else ({body})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.put(*self.span(node), str(not value))
        elif isinstance(value, int):
            self.put(*self.span(node), str(value + 1))
        elif isinstance(value, float):
            self.put(*self.span(node), repr(value * 1.01) if value else "1.0")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = getattr(function, "id", "") or getattr(function, "attr", "")  # of `f(...)` or `x.f(...)`
        if name in _NAMES and (isinstance(function, ast.Attribute) or name in _BUILTINS):
            end = self.span(function)[1]
            self.put(end - len(name), end, _NAMES[name])
        if name == "where" and len(node.args) == 3:  # the two branches swapped
            (a, b), (c, d) = self.span(node.args[1]), self.span(node.args[2])
            self.put(a, d, self.source[c:d] + self.source[b:c] + self.source[a:b])
        for keyword in node.keywords:  # clamp(min=0) -> clamp(max=0)
            if keyword.arg in ("min", "max") and name == "clamp":
                start = self.at(keyword.lineno, keyword.col_offset)
                self.put(start, start + 3, _NAMES[keyword.arg])
        self.generic_visit(node)
