"""Typed rows of data. A format hands over records (canonical keys, see below); a row type takes what it needs.

Canonical keys of a record: `prompt` (text or chat messages), `completion` (text), `chosen`, `rejected` (texts),
`messages` (a whole chat), `label` (bool), `margin` (number), `answer` (text); other columns keep their names.
An algorithm with data of its own brings its own class with a `from_record`, raising `RowError` for what doesn't fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import attrs

from rlhf.errors import RowError


class Message(TypedDict):
    """One turn of a chat; `role` is system, user, assistant or tool."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text, or a chat that ends before the assistant speaks."""


class RowType(Protocol):
    """What a class of rows must have."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Any:
        """Take the fields needed from a record.

        Raises:
            RowError: the record doesn't fit; the message says what was found and what is needed.
        """


_USED = ("prompt", "completion", "messages", "chosen", "rejected", "label", "margin")


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        raise RowError(f"no {key!r}; it has {', '.join(sorted(record)) or 'nothing'}")
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be text, not {type(value).__name__}")
    return value


def _prompt(record: Mapping[str, Any]) -> Prompt:
    value = record.get("prompt")
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise RowError("'prompt' is an empty chat")
        return tuple(value)
    text = _text(record, "prompt")
    if not text:
        raise RowError("'prompt' is empty")
    return text


def _extra(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _USED}


@attrs.frozen
class PromptRow:
    """A prompt to sample from; `extra` holds the row's other columns, which rewards see."""

    prompt: Prompt
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "a prompt: a column 'prompt' (text or chat), or 'question', 'instruction', 'messages'"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PromptRow:
        if "prompt" not in record and record.get("messages"):
            return cls(_before_reply(record["messages"]), _extra(record))
        return cls(_prompt(record), _extra(record))


@attrs.frozen
class CompletionRow:
    """A prompt with the completion to learn, or a whole chat whose assistant turns are to be learnt."""

    prompt: Prompt
    completion: str
    messages: tuple[Message, ...] = ()
    """The whole chat, where it has several assistant turns; then `prompt` and `completion` are its parts around the
    first and last of them."""
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "a prompt with a completion: columns 'prompt' and 'completion', 'instruction' and 'output', or 'messages'"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CompletionRow:
        messages = record.get("messages")
        if messages and "completion" not in record:
            spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if not spoken:
                raise RowError("'messages' holds no assistant turn to learn")
            kept = tuple(messages[: spoken[-1] + 1])
            first: Prompt = kept[: spoken[0]]
            return cls(first, kept[-1]["content"], kept if len(spoken) > 1 else (), _extra(record))
        if "completion" not in record and isinstance(record.get("text"), str):
            return cls("", _text(record, "text"), (), _extra(record))
        return cls(_prompt(record), _text(record, "completion"), (), _extra(record))


@attrs.frozen
class PreferenceRow:
    """Two completions of one prompt, the better one first."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    """By how much the chosen one is better, in reward units, where the data says."""
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "preference pairs: columns 'prompt', 'chosen' and 'rejected'"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PreferenceRow:
        margin = record.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
            raise RowError(f"'margin' must be a number, not {margin!r}")
        chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
        if chosen == rejected:
            raise RowError("'chosen' and 'rejected' are the same")
        return cls(_prompt(record), chosen, rejected, None if margin is None else float(margin), _extra(record))


@attrs.frozen
class LabelledRow:
    """A completion that is good or bad."""

    prompt: Prompt
    completion: str
    label: bool
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "labelled completions: columns 'prompt', 'completion' and a boolean 'label'"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LabelledRow:
        label = record.get("label")
        if not isinstance(label, bool):
            raise RowError(f"'label' must be true or false, not {label!r}")
        row = CompletionRow.from_record(record)
        return cls(row.prompt, row.completion, label, row.extra)


def _before_reply(messages: Sequence[Message]) -> Prompt:
    """The chat up to its last assistant turn, left out."""
    kept = list(messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept:
        raise RowError("'messages' holds nothing before the assistant's turn")
    return tuple(kept)


def row_needs(row_type: type) -> str:
    """What a row type asks of the data, for messages; a class says it in an attribute `needs` or its docstring."""
    text = getattr(row_type, "needs", None) or (row_type.__doc__ or row_type.__name__).strip().splitlines()[0]
    return f"it reads {text}"
