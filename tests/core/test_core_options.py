"""Options: strict conversion, and messages that say what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from rlhf.errors import Problem
from rlhf.options import convert, fields, info, nearest, option, structure, type_name, typed


@attrs.frozen(kw_only=True)
class FakeConfig:
    size: int = option(8, help="how many", unit="tokens", source="a paper", ge=2, lt=100)
    rate: float | None = option(0.5, help="how fast; none: not at all", gt=0, le=1)
    style: str = option("plain", help="how", choices=("plain", "fancy"))
    parts: tuple[str, ...] = option((), help="which", choices=("head", "tail"))
    path: str = option(help="where")


# Conversion


@pytest.mark.parametrize(
    ("value", "kind", "meant"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        ("1e3", int, 1000),  # PyYAML reads 1e3 as text too
        (4.0, int, 4),
        ("0.1", float, 0.1),
        ("3e-6", float, 3e-6),
        (2, float, 2.0),
        ("true", bool, True),
        ("Off", bool, False),
        ("no", bool, False),
        (True, bool, True),
        ("text", str, "text"),
        (1.5, str, "1.5"),
        ("none", int | None, None),
        (None, float | None, None),
        ("7", int | None, 7),
        ("a, b", tuple[str, ...], ("a", "b")),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ("", tuple[str, ...], ()),
        ("0.9,0.95", tuple[float, float], (0.9, 0.95)),
        ("prompt=question, answer=solution", Mapping[str, str], {"prompt": "question", "answer": "solution"}),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ("x", Literal["x", "y"], "x"),
    ],
)
def test_values_as_typed_or_as_yaml_reads_them(value: Any, kind: Any, meant: Any) -> None:
    found = convert(value, kind)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("3.5", int, "int"),
        (3.5, int, "int"),
        (True, int, "int"),  # a bare --mem.lora.rank
        ("three", int, "int"),
        (None, int, "int"),
        ("inf", int, "int"),
        ("fast", float, "number"),
        (False, float, "number"),
        ("nan", float, "number"),
        (float("nan"), float, "number"),  # passes every bound: all comparisons are false
        (float("inf"), float, "number"),
        (10**400, float, "number"),
        ("maybe", bool, "true/false"),
        (1, bool, "true/false"),
        (True, str, "text"),
        (["a"], str, "text"),
        ({"a": 1}, tuple[str, ...], "list of text"),
        ("0.9", tuple[float, float], "number,number"),
        ("a,b", Mapping[str, str], "key=value list"),
        ("z", Literal["x", "y"], "Literal"),
    ],
)
def test_a_wrong_type_is_refused_and_says_what_was_expected(value: Any, kind: Any, expected: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        convert(value, kind)
    assert f"must be {expected}" in str(caught.value)


def test_line_breaks_and_the_blanks_of_yaml_lists_are_meant() -> None:
    assert convert("\n", tuple[str, ...]) == ("\n",)
    assert convert([" ", "\n\n"], tuple[str, ...]) == (" ", "\n\n")


def test_types_that_cattrs_knows_are_converted_and_fail_as_the_others() -> None:
    assert convert("/tmp", Path) == Path("/tmp")
    with pytest.raises(ValueError, match="must be Path, not 3"):
        convert(3, Path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (int | None, "int"),
        (tuple[str, ...], "list of text"),
        (tuple[int, float], "int,number"),
        (bool, "true/false"),
        (Mapping[str, str], "key=value list"),
        (int | str, "int or text"),
    ],
)
def test_types_are_named_as_the_help_shows_them(kind: Any, name: str) -> None:
    assert type_name(kind) == name


# Configs


def problems_of(given: dict[str, Any]) -> list[str]:
    config, problems = structure(FakeConfig, given, "--algo.")
    assert config is None
    return [problem.what for problem in problems]


@attrs.frozen(kw_only=True)
class TwoWords:
    two_words: int = option(1, help="two")


def test_dashes_and_underscores_are_one() -> None:
    for name in ("two-words", "two_words"):
        assert structure(TwoWords, {name: "2"}, "--algo.") == (TwoWords(two_words=2), [])


def test_every_problem_is_told_at_once() -> None:
    told = problems_of({"size": "many", "rate": 2, "styel": "plain"})
    assert len(told) == 4
    assert any("--algo.size must be int, not 'many'" in what for what in told)
    assert any("--algo.rate must be <= 1" in what for what in told)
    assert any("unknown option --algo.styel" in what for what in told)
    assert any("--algo.path is required" in what for what in told)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"size": 1}, "--algo.size must be >= 2, not 1"),
        ({"size": 100}, "--algo.size must be < 100, not 100"),
        ({"rate": 0}, "--algo.rate must be > 0, not 0.0"),
        ({"rate": 1.5}, "--algo.rate must be <= 1, not 1.5"),
        ({"style": "fancyy"}, "--algo.style must be one of plain, fancy, not 'fancyy'; did you mean 'fancy'?"),
        ({"parts": "head,tial"}, "--algo.parts must be one of head, tail, not 'tial'; did you mean 'tail'?"),
    ],
)
def test_bounds_and_choices(given: dict[str, Any], what: str) -> None:
    assert problems_of({"path": "p", **given}) == [what]


def test_bounds_hold_at_their_edges_and_none_passes_them() -> None:
    config, problems = structure(FakeConfig, {"size": 2, "rate": None, "parts": ["tail"], "path": "p"}, "--algo.")
    assert problems == []
    assert config == FakeConfig(size=2, rate=None, parts=("tail",), path="p")
    assert structure(FakeConfig, {"rate": 1, "path": "p"}, "--algo.")[1] == []


def test_an_unknown_option_names_the_nearest_or_all_there_are() -> None:
    near = structure(FakeConfig, {"siz": 1, "path": "p"}, "--mem.fake.")[1]
    assert near[0].fix == "did you mean --mem.fake.size?"
    far = structure(FakeConfig, {"qqqqqq": 1, "path": "p"}, "--mem.fake.")[1]
    assert far[0].fix == "its options: size, rate, style, parts, path"
    dashed = structure(TwoWords, {"tow_words": 1}, "--algo.")[1]
    assert dashed[0] == Problem("unknown option --algo.tow-words", "did you mean --algo.two-words?")
    none = structure(None, {"x": 1}, "--mem.fake.")[1]
    assert none[0].fix == "its options: none"


def test_a_wrong_value_of_a_required_option_is_one_problem_not_two() -> None:
    assert problems_of({"path": True}) == ["--algo.path must be text, not True"]


def whole_only(instance: Any, attribute: Any, value: Any) -> None:
    if value == 3:
        raise TypeError("not three")  # as attrs' own instance_of does


def test_a_check_across_fields_and_a_foreign_validator_are_problems_not_crashes() -> None:
    @attrs.frozen(kw_only=True)
    class Crossed:
        low: int = option(1, help="low")
        high: int = attrs.field(default=2, validator=whole_only)

        def __attrs_post_init__(self) -> None:
            if self.low > 5:
                raise ValueError("low must stay under 5")

    assert [p.what for p in structure(Crossed, {"low": 6}, "--algo.")[1]] == ["--algo: low must stay under 5"]
    assert [p.what for p in structure(Crossed, {"high": 3}, "--algo.")[1]] == ["--algo.high not three"]


def test_the_help_carries_choices_unit_and_source() -> None:
    known = fields(FakeConfig)
    assert info(known["size"]).text() == "how many [tokens] (a paper)"
    assert info(known["style"]).text() == "how: plain | fancy"


def test_nearest() -> None:
    assert nearest("GRPO", ["ppo", "grpo", "gspo"]) == "grpo"
    assert nearest("gpro", ["gspo", "grpo", "ppo"]) == "grpo"  # two letters changed places
    assert nearest("lr", ["learning_rate", "clip"]) == "learning_rate"  # by initials
    assert nearest("bs", ["batch-size", "beta-slope"]) is None  # of two
    assert nearest("max_step", ["max_steps"], 0.9) == "max_steps" and nearest("max", ["max_steps"], 0.9) is None
    assert nearest("xyz", ["ppo", "grpo"]) is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, float | None),
        (True, bool),
        (1e-06, float),
        ("a b", str),
        (("q_proj", "v_proj"), tuple[str, ...]),
        ({"prompt": "question", "answer": "solution"}, dict[str, str]),
    ],
)
def test_a_value_as_it_is_typed_reads_back(value: Any, kind: Any) -> None:
    assert convert(typed(value), kind) == value
