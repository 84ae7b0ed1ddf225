"""Each instruction by examples of both verdicts; rows that can't be read; scores."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.api import Context, Plan, PromptRow, Rollouts, RowError, Score
from rlhf_ifeval import IFEvalConfig, rlhf_rewards
from rlhf_ifeval.instructions import INSTRUCTIONS, followed, problem_with
from rlhf_ifeval.reward import IFEval

ONE_TWO = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}
CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "A dog chased the CAT.", True),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A dog barked.", False),
    ("keywords:existence", {"keywords": ["a.b"]}, "aXb", False),  # a keyword is no pattern
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea, then tea.", True),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, "Tea, then tea.", False),
    ("keywords:frequency", {"keyword": "tea", "frequency": 3, "relation": "at least"}, "Tea, then tea.", False),
    ("keywords:forbidden_words", {"forbidden_words": ["can't", "no"]}, "It is not known.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "Oh No!", False),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": "at least"}, "Eel eel", True),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 4, "let_relation": "less than"}, "Eel eel", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two-three", True),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", True),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two three", False),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, 'A. "B!" C? ', True),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Pi is 3.14.", True),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One. Two.", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n\nb", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** *** b", False),
    ("length_constraints:nth_paragraph_first_word", ONE_TWO, "First.\n\n\n\"then, it went", True),
    ("length_constraints:nth_paragraph_first_word", ONE_TWO, "Then.\n\nFirst", False),
    ("length_constraints:nth_paragraph_first_word", ONE_TWO, "First.\n\nThen\n\nlast", False),
    ("length_constraints:nth_paragraph_first_word", {**ONE_TWO, "nth_paragraph": 3}, "a\n\nThen", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], at [place]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], at [place", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. one more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.S. one more", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S one more", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n  - b\n**bold** text - c", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b\n* c", False),
    ("detectable_format:constrained_response", {}, "Well: My answer is maybe.", True),
    ("detectable_format:constrained_response", {}, "My answer is perhaps.", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**one** and * *", False),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1\na\nDay 2\nb", True),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1\nDay two", False),
    ("detectable_format:json_format", {}, '```JSON\n{"a": [1]}\n```', True),
    ("detectable_format:json_format", {}, '[{"a": 1}]', True),
    ("detectable_format:json_format", {}, 'Here: {"a": 1}', False),
    ("detectable_format:title", {}, "<<a song>>\nla", True),
    ("detectable_format:title", {}, "<< >> and <no>", False),
    ("combination:two_responses", {}, "one\n******\ntwo", True),
    ("combination:two_responses", {}, "one\n******\none", False),
    ("combination:two_responses", {}, "one\n******\ntwo\n******\nthree", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, " say HI. Hi!", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Hi! Say hi.", False),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Well. "THAT is all."', True),
    ("startend:end_checker", {"end_phrase": "That is all."}, "That is all. Bye", False),
    ("startend:quotation", {}, ' "all of it" ', True),
    ("startend:quotation", {}, '"', False),
    ("startend:quotation", {}, '"a" b', False),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "GO ON now", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "GO ON", False),
    ("change_case:english_capital", {}, "ALL 3!", True),
    ("change_case:english_capital", {}, "ALL three", False),
    ("change_case:english_lowercase", {}, "all 3!", True),
    ("change_case:english_lowercase", {}, "All", False),
    ("punctuation:no_comma", {}, "no; none", True),
    ("punctuation:no_comma", {}, "one, two", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "text", "verdict"), CASES)
def test_verdicts(name: str, arguments: dict[str, Any], text: str, verdict: bool) -> None:
    assert problem_with(name, arguments) == ""
    assert followed(name, text, arguments) is verdict


def test_each_instruction_has_both_verdicts_here() -> None:
    for verdict in (True, False):
        assert {name for name, _, _, found in CASES if found is verdict} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 24  # of IFEval's 25 all but the language


def test_an_empty_response_has_followed_nothing() -> None:
    assert not followed("punctuation:no_comma", " \n", {})
    assert not followed("length_constraints:number_words", "", {"num_words": 3, "relation": "less than"})


@pytest.mark.parametrize("unit", ["[", "<<", "*", "* ", "- ", "``` ", '."', "a ", "\n\n", "***", "{", "["])
def test_degenerate_responses_are_judged_fast(unit: str) -> None:
    """A collapsed policy repeats itself to the length limit: 40,000 characters must not take quadratic time."""
    text, start = "x" + unit * (40_000 // len(unit)), time.perf_counter()
    for name, arguments, _, _ in CASES:
        followed(name, text, arguments)
    assert time.perf_counter() - start < 2.0  # 60 checks: far above linear, far below quadratic


# Rows


def reward(**options: Any) -> IFEval:
    return IFEval(IFEvalConfig(**options), Context(plan=cast(Plan, None), label="mine"))


def row(names: Any, arguments: Any) -> PromptRow:
    return PromptRow("a prompt", {"instruction_id_list": names, "kwargs": arguments})


def test_a_row_of_a_data_set_in_columns_has_nulls() -> None:
    given = row(["length_constraints:number_words"], [{"num_words": 3, "relation": "at least", "letter": None}])
    assert reward().instructions(given) == [
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"})
    ]
    as_json = row(json.dumps(["punctuation:no_comma", "startend:quotation"]), "[null, {}]")
    assert reward().instructions(as_json) == [("punctuation:no_comma", {}), ("startend:quotation", {})]


@pytest.mark.parametrize(
    ("names", "arguments", "says"),
    [
        (["punctuation:no_coma"], [{}], "no instruction 'punctuation:no_coma'; did you mean 'punctuation:no_comma'?"),
        (["no_comma"], [{}], "did you mean 'punctuation:no_comma'?"),
        (["zzz"], [{}], "no instruction 'zzz'; known: keywords:existence, "),
        ([7], [{}], "no instruction 7; known: "),
        ([["no_comma"]], [{}], "no instruction ['no_comma']; did you mean 'punctuation:no_comma'?"),
        (["language:response_language"], [{"language": "de"}], "no instruction 'language:response_language'"),
        (["punctuation:no_comma"], [], "must be as long, and not empty; they hold 1 and 0"),
        ([], [], "they hold 0 and 0"),
        (None, [], "column 'instruction_id_list' must hold a list, not None"),
        ("no_comma", [{}], "column 'instruction_id_list' must hold a list, or one in JSON: "),
        (["punctuation:no_comma"], ["x"], "the arguments of punctuation:no_comma must be a mapping, not 'x'"),
        (["punctuation:no_comma"], [{"n": 1}], "punctuation:no_comma takes no arguments, not n"),
        (["length_constraints:number_words"], [{"num_words": 3}], "takes num_words, relation, not num_words"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3, "relation": "exactly"}],
            "relation must be 'less than' or 'at least', not 'exactly'",
        ),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3.5, "relation": "at least"}],
            "num_words must be a whole number, not 3.5",
        ),
        (["startend:end_checker"], [{"end_phrase": " "}], "end_phrase must be text, not ' '"),
        (["keywords:existence"], [{"keywords": "cat"}], "keywords must be a list of texts, not 'cat'"),
        (["keywords:existence"], [{"keywords": []}], "keywords must be a list of texts, not []"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_with_its_reason(names: Any, arguments: Any, says: str) -> None:
    with pytest.raises(RowError) as error:
        reward().check(row(names, arguments))
    assert says in str(error.value)


def test_the_columns_are_asked_for_by_the_manifest() -> None:
    (entry,) = rlhf_rewards()
    columns: Any = entry.columns
    assert columns(IFEvalConfig()) == ("instruction_id_list", "kwargs")
    assert columns(IFEvalConfig(names_column="rules", arguments_column="values")) == ("rules", "values")


# Scores


@pytest.mark.parametrize(("partial", "expected"), [(False, [1.0, 0.0, 0.0]), (True, [1.0, 2 / 3, 0.0])])
def test_all_or_the_share_of_them(partial: bool, expected: list[float]) -> None:
    names = ["punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"]
    texts = ('"fine"', "fine", "Not, this")
    given = SimpleNamespace(texts=texts, rows=(row(names, [{}, {}, {}]),) * 3)
    found = reward(partial=partial).judge(cast(Rollouts, given), cast(Score, None))
    assert found == pytest.approx(expected)
