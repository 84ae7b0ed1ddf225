"""Typed rows of data. A format hands over records (canonical keys, see below); a row type takes what it needs.

Canonical keys of a record: `prompt` (text or chat messages), `completion` (text), `chosen`, `rejected` (texts),
`messages` (a whole chat), `text` (no prompt), `label` (bool), `margin` (number), `answer` (text), `steps` (texts) with
`labels` (bools or numbers); others keep their names.
An algorithm with data of its own brings its own class with a `from_record`, raising `RowError` for what doesn't fit.
"""

from __future__ import annotations

import contextlib
import math
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

    # Optional: `split(record)`, the records of a record that holds several rows of this type, else None.


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        raise RowError(f"no {key!r}; it has {', '.join(sorted(record)) or 'nothing'}")
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be text, not {type(value).__name__}")
    return value


def _chat(value: Any, key: str) -> tuple[Message, ...]:
    """A chat's messages, each checked."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        wanted = "text or a list of messages" if key == "prompt" else "a list of messages"
        raise RowError(f"{key!r} must be {wanted}, not {type(value).__name__}")
    if not value:
        raise RowError(f"{key!r} is an empty chat")
    for message in value:
        if not isinstance(message, Mapping):
            raise RowError(f"{key!r} must hold messages with role and content, not {type(message).__name__}")
        if message.get("role") not in _ROLES:
            raise RowError(f"{key!r}: a message's role must be one of {', '.join(_ROLES)}, not {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise RowError(f"{key!r}: a message's content must be text, not {type(message.get('content')).__name__}")
    return tuple(value)


def _prompt(record: Mapping[str, Any]) -> Prompt:
    value = record.get("prompt")
    if value is not None and not isinstance(value, str):
        return _open_ended(_chat(value, "prompt"), "prompt")
    text = _text(record, "prompt")
    if not text:
        raise RowError("'prompt' is empty")
    return text


def _open_ended(messages: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    """A chat to be answered."""
    if not messages:
        raise RowError(f"{key!r} holds nothing before the assistant's turn")
    if messages[-1]["role"] == "assistant":
        raise RowError(f"{key!r} ends with the assistant's turn, so there is nothing to answer")
    return messages


def _before_last_reply(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """(the chat before its last assistant turn, what that turn says)."""
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise RowError("'messages' holds no assistant turn to learn")
    return _open_ended(messages[: spoken[-1]], "messages"), messages[spoken[-1]]["content"]


def _extra(record: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in used}


@attrs.frozen
class PromptRow:
    """A prompt to sample from; `extra` holds the row's other columns, which rewards see."""

    prompt: Prompt
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "a prompt: a column 'prompt' (text or chat), or 'question', 'instruction', 'messages'"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PromptRow:
        extra = _extra(record, ("prompt", "messages"))
        if record.get("prompt") is None and record.get("messages"):
            messages = _chat(record["messages"], "messages")
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return cls(_open_ended(messages, "messages"), extra)
        return cls(_prompt(record), extra)


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
        extra = _extra(record, ("prompt", "completion", "messages", "text"))
        if record.get("messages") and record.get("completion") is None:
            messages = _chat(record["messages"], "messages")
            spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            last, reply = _before_last_reply(messages)
            if len(spoken) == 1:
                return cls(last, reply, (), extra)
            # Turns after the last reply teach nothing, so the chat ends with it.
            return cls(messages[: spoken[0]] or last, reply, messages[: spoken[-1] + 1], extra)
        if record.get("prompt") is None and record.get("completion") is None and isinstance(record.get("text"), str):
            return cls("", _text(record, "text"), (), extra)
        return cls(_prompt(record), _text(record, "completion"), (), extra)


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
        if margin is not None:
            margin = _finite("margin", margin)
        chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
        if chosen == rejected:
            raise RowError("'chosen' and 'rejected' are the same")
        extra = _extra(record, ("prompt", "chosen", "rejected", "margin"))
        return cls(_prompt(record), chosen, rejected, margin, extra)


@attrs.frozen
class LabelledRow:
    """A completion that is good or bad."""

    prompt: Prompt
    completion: str
    label: bool
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "labelled completions: columns 'prompt', 'completion' and a boolean 'label'; or preference pairs"

    @classmethod
    def split(cls, record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """A preference pair is a good and a bad completion."""
        if record.get("label") is not None or record.get("completion") is not None:
            return None
        if record.get("chosen") is None or record.get("rejected") is None:
            return None
        PreferenceRow.from_record(record)  # refuses a broken pair whole
        rest = _extra(record, ("chosen", "rejected", "margin", "messages"))
        return [{**rest, "completion": record[key], "label": key == "chosen"} for key in ("chosen", "rejected")]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LabelledRow:
        label = record.get("label")
        if not isinstance(label, bool):
            raise RowError(f"'label' must be true or false, not {label!r}")
        extra = _extra(record, ("prompt", "completion", "messages", "label"))
        if record.get("messages") and record.get("completion") is None:
            prompt, reply = _before_last_reply(_chat(record["messages"], "messages"))
            return cls(prompt, reply, label, extra)
        return cls(_prompt(record), _text(record, "completion"), label, extra)


@attrs.frozen
class RewardedRow:
    """A completion with what it is worth."""

    prompt: Prompt
    completion: str
    reward: float
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "completions with a number 'reward', or a boolean 'label' (1 and 0); or preference pairs (1 and 0)"

    @classmethod
    def split(cls, record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """A preference pair is a completion of 1 and one of 0."""
        return None if record.get("reward") is not None else LabelledRow.split(record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RewardedRow:
        reward = record.get("reward")
        if reward is None and isinstance(record.get("label"), bool):
            reward = float(record["label"])
        reward = _finite("reward", reward)
        extra = _extra(record, ("prompt", "completion", "messages", "label", "reward"))
        if record.get("messages") and record.get("completion") is None:
            prompt, reply = _before_last_reply(_chat(record["messages"], "messages"))
            return cls(prompt, reply, reward, extra)
        return cls(_prompt(record), _text(record, "completion"), reward, extra)


@attrs.frozen
class StepRow:
    """A completion in steps, each judged."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    """Of each step, from 0, wrong, to 1, right; between them how likely it is that it is right."""
    extra: dict[str, Any] = attrs.Factory(dict)

    needs = "judged steps: columns 'prompt', 'steps' (or 'completions', a list of texts) and 'labels' (booleans, or "
    needs += "numbers from 0 to 1)"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StepRow:
        key = "completions" if record.get("steps") is None and record.get("completions") is not None else "steps"
        steps, labels = record.get(key), record.get("labels")
        for name, value in ((key, steps), ("labels", labels)):
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                raise RowError(f"{name!r} must be a list, one item a step, not {type(value).__name__}")
        assert steps is not None and labels is not None
        if not steps or not all(isinstance(step, str) and step for step in steps):
            raise RowError(f"{key!r} must hold a text for each step, and one at least")
        if len(steps) != len(labels):
            raise RowError(f"{len(steps)} {key} and {len(labels)} labels")
        if not all(isinstance(label, bool | int | float) and 0 <= label <= 1 for label in labels):
            raise RowError("'labels' must hold true, false, or a number from 0 to 1 for each step")
        extra = _extra(record, ("prompt", "messages", key, "labels"))
        return cls(_prompt(record), tuple(steps), tuple(float(label) for label in labels), extra)


def _finite(name: str, value: Any) -> float:
    """A column's number.

    Raises:
        RowError: it is none, infinite, or larger than a float can be.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise RowError(f"{name!r} must be a finite number, not {value!r:.40}")


def row_needs(row_type: type) -> str:
    """What a row type asks of the data, for messages; a class says it in an attribute `needs` or its docstring."""
    text = getattr(row_type, "needs", None) or (row_type.__doc__ or row_type.__name__).strip().splitlines()[0]
    return f"it reads {text}"
