"""What a response can be told to do, and whether it did: pure functions of its text.

Names, arguments and definitions are those of IFEval (Zhou et al. 2023, arXiv:2311.07911, table 1), so that its data can
be read as it is. Two are counted without a language model of English, and may differ by a few: sentences end at a full
stop, question or exclamation mark before a space, and words are runs of letters, digits and underscores.

Left out: `language:response_language`, and that texts in one case are English; both would need a detector of languages.

Arguments are keyword-only parameters; their annotations are what a row is checked against.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

Relation = Literal["less than", "at least"]
Check = Callable[..., bool]
INSTRUCTIONS: dict[str, Check] = {}
"""IFEval's name -> f(text, **arguments), which is whether it was followed."""


def instruction(name: str) -> Callable[[Check], Check]:
    """Enter a function under its name."""

    def enter(check: Check) -> Check:
        INSTRUCTIONS[name] = check
        return check

    return enter


def problem_with(name: str, given: Mapping[str, Any]) -> str:
    """What is wrong with an instruction's arguments; "" where nothing is."""
    check = INSTRUCTIONS[name]
    wanted = {n: typing.get_type_hints(check)[n] for n, p in inspect.signature(check).parameters.items() if n != "text"}
    if set(given) != set(wanted):
        return f"{name} takes {', '.join(wanted) or 'no arguments'}, not {', '.join(given) or 'none'}"
    for key, kind in wanted.items():
        value, choices = given[key], typing.get_args(kind)
        if kind == Relation:
            right, what = value in choices, " or ".join(map(repr, choices))
        elif kind is int:
            right, what = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number"
        elif kind is str:
            right, what = isinstance(value, str) and bool(value.strip()), "text"
        else:
            right, what = (
                bool(value) and isinstance(value, list) and all(isinstance(x, str) and x for x in value),
                ("a list of texts"),
            )
        if not right:
            return f"{name}: {key} must be {what}, not {value!r}"
    return ""


def followed(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a response did as it was told; an empty one never did."""
    return bool(text.strip()) and INSTRUCTIONS[name](text, **arguments)


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# Keywords


@instruction("keywords:existence")
def _existence(text: str, *, keywords: list[str]) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


@instruction("keywords:frequency")
def _frequency(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


@instruction("keywords:forbidden_words")
def _forbidden(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def _letter(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# Lengths


@instruction("length_constraints:number_words")
def _words(text: str, *, num_words: int, relation: Relation) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


@instruction("length_constraints:number_sentences")
def _sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
    return _holds(len(re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())), relation, num_sentences)


@instruction("length_constraints:number_paragraphs")
def _paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Divided by ***."""
    return _parts_between(text, "***") == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by an empty line."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    begins = re.match(r"[\"']*([^\s.,?!\"']*)", paragraphs[nth_paragraph - 1])
    return begins is not None and begins[1].lower() == first_word.lower()


# Content


@instruction("detectable_content:number_placeholders")
def _placeholders(text: str, *, num_placeholders: int) -> bool:
    """[such as these]"""
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


@instruction("detectable_content:postscript")
def _postscript(text: str, *, postscript_marker: str) -> bool:
    """The letters of P.S. and P.P.S may stand apart."""
    marker = r"\s?".join(re.escape(part) for part in re.findall(r"[^.]+\.?|\.", postscript_marker))
    return re.search(marker, text, re.IGNORECASE) is not None


# Format


@instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, *, num_bullets: int) -> bool:
    """Lines that begin with * or -; ** begins bold text."""
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-)[^\n]", text, re.MULTILINE)) == num_bullets


@instruction("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


@instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, *, num_highlights: int) -> bool:
    """*such* or **such**, each counted once."""
    marked = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool(bold.strip() or plain.strip()) for bold, plain in marked) >= num_highlights


@instruction("detectable_format:multiple_sections")
def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """Each begins with the word and a number. The argument is spelt as the data set does."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@instruction("detectable_format:json_format")
def _json(text: str) -> bool:
    """The whole of it, in a fence or not."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.removeprefix("```").removesuffix("```")
        text = text[4:] if text[:4].lower() == "json" else text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def _title(text: str) -> bool:
    """<<such a one>>"""
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


# The rest


@instruction("combination:two_responses")
def _two(text: str) -> bool:
    """Different ones, divided by ******."""
    parts = [part.strip() for part in text.split("******")]
    return _parts_between(text, "******") == 2 and len(set(filter(None, parts))) == 2


@instruction("combination:repeat_prompt")
def _repeats(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def _ends(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction("change_case:capital_word_frequency")
def _capital_words(text: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    return _holds(sum(word.isupper() for word in re.findall(r"\w+", text)), capital_relation, capital_frequency)


@instruction("change_case:english_capital")
def _upper(text: str) -> bool:
    return text.isupper()


@instruction("change_case:english_lowercase")
def _lower(text: str) -> bool:
    return text.islower()


@instruction("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


def _parts_between(text: str, divider: str) -> int:
    """How many parts a divider makes, empty ones at the ends not counted; -1 where one inside is empty."""
    parts = [part.strip() for part in text.split(divider)]
    inner = parts[1 if not parts[0] else 0 : -1 if not parts[-1] else None]
    return len(inner) if all(inner) else -1
