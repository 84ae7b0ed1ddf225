"""The shapes that rows come in, each turned into the canonical record of `rlhf.rows`.

| shape | columns |
|---|---|
| TRL standard | `prompt` with `completion`, or with `chosen` and `rejected`; or `text` |
| TRL conversational | the same as messages; `messages`; `chosen` and `rejected` as whole chats, without `prompt` |
| ShareGPT | `conversations` of `from` and `value`; `chosen` and `rejected` one such turn each; `system` |
| Alpaca | `instruction`, `input`, `output`, `system`, `history`: a chat whose last turn is the instruction |
| question and answer | `question`, `answer`, `system`: the answer, whole, is the completion too |

To any of them may come `label`, `margin`, or two scores, whose difference is the margin. Other columns stay as they
are, those that were read included: rewards ask for them by name. A null is a column that isn't there.

Sources: https://huggingface.co/docs/trl/dataset_formats and LLaMA-Factory's data/README.md.
Left out: tool calls as objects and messages of several parts (refused, with the reason).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, cast

from rlhf.api import Message, RowError

Chat = tuple[Message, ...]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # the assistant says the call, so it is learnt
    "tool": "tool",
    "observation": "tool",  # what a tool answers
}
"""How a turn's speaker may be written -> the canonical role."""

CHAT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations", "history")
"""Columns that may hold a list of objects and be part of a row."""

_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
_NUMBERS = ("margin", "reward", *(name for pair in _SCORES for name in pair))
_READ = frozenset({*CHAT_COLUMNS, *_NUMBERS, "text", "label", "answer", "question", "instruction", "input", "output"})


def to_record(
    row: Mapping[str, Any], *, shape: str = "auto", system: str | None = None, prompt: str | None = None
) -> dict[str, Any]:
    """The canonical record of a row.

    Args:
        row: column to value.
        shape: auto, plain, chat, alpaca or sharegpt; see `FormatConfig`.
        system: a system message for chats without one.
        prompt: takes the place of the row's own prompt.

    Raises:
        RowError: the shape is clear, but broken. A mere value of a wrong type is handed over: the row type judges it.
    """
    record = {key: value for key, value in row.items() if value is not None or key not in _READ}
    _read_columns(record, shape)
    if prompt is not None:
        record["prompt"] = prompt
        record.pop("messages", None)
    if isinstance(record.get("prompt"), list | tuple):
        record["prompt"] = _chat(record, "prompt")
    _read_pair(record)
    _read_completion(record)
    if "messages" in record:
        _read_messages(record)
    _read_margin(record)
    if shape == "chat" or system:
        _make_chat(record, system)
    found = record.get("prompt")
    if isinstance(found, tuple) and found and found[-1]["role"] == "assistant":
        raise RowError("'prompt' ends with the assistant's turn; it must end before the reply")
    return record


def typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a file that knows only text, its labels and scores as what they say; an empty one isn't there."""
    out = dict(row)
    for key in ("label", *_NUMBERS):
        text = out.get(key)
        if not isinstance(text, str):
            continue
        if not text:
            del out[key]
        elif key == "label":
            out[key] = {"true": True, "false": False}.get(text.lower(), text)
        else:
            with contextlib.suppress(ValueError):  # the row type says what it must be
                out[key] = float(text)
    return out


# What the columns are


def _read_columns(record: dict[str, Any], shape: str) -> None:
    """Columns of a shape's own names -> `prompt`, `completion`, `messages`. The canonical names, if there, win."""
    if shape == "alpaca" or shape == "sharegpt":
        needed = "instruction" if shape == "alpaca" else "conversations"
        if needed not in record:
            raise RowError(f"no {needed!r}, which the shape {shape} needs; it has {', '.join(sorted(record))}")
        record.pop("prompt", None)
        record.pop("messages", None)
        (_read_alpaca if shape == "alpaca" else _read_sharegpt)(record)
    elif "prompt" in record or "messages" in record:
        return
    elif shape != "plain" and "conversations" in record:
        _read_sharegpt(record)
    elif shape != "plain" and "instruction" in record:
        _read_alpaca(record)
    elif "question" in record:
        record["prompt"] = record["question"]
        if system := _text(record, "system"):
            _make_chat(record, system)
        if "answer" in record:
            record.setdefault("completion", record["answer"])


def _read_sharegpt(record: dict[str, Any]) -> None:
    chat, system = _chat(record, "conversations"), _text(record, "system")
    record["messages"] = _with_system(chat, system) if system else chat


def _read_alpaca(record: dict[str, Any]) -> None:
    asked = "\n\n".join(text for text in (_text(record, "instruction"), _text(record, "input")) if text)
    if not asked:
        raise RowError("'instruction' is empty")
    turns = [_turn("user", asked)]
    history = record.get("history") or ()
    for pair in reversed(history if isinstance(history, list | tuple) else (history,)):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("'history' must be a list of [instruction, response] texts")
        turns[:0] = [_turn("user", pair[0]), _turn("assistant", pair[1])]
    system = _text(record, "system")
    chat = _with_system(tuple(turns), system) if system else tuple(turns)
    record["prompt"] = chat
    output = record.get("output")
    if history and isinstance(output, str) and not isinstance(record.get("label"), bool):
        # As LLaMA-Factory has it, the responses of the history are learnt too.
        record["messages"] = (*chat, _turn("assistant", output))
    elif output is not None:
        record.setdefault("completion", output)


# What chats are


def _read_pair(record: dict[str, Any]) -> None:
    """`chosen` and `rejected` -> texts; whole chats give the prompt, what they begin with in common."""
    given = {key: _chat(record, key) for key in ("chosen", "rejected") if _is_chat(record.get(key))}
    chosen, rejected = given.get("chosen"), given.get("rejected")
    if chosen and rejected and chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
        if not prompt:
            raise RowError("'chosen' and 'rejected' are chats that begin with no prompt in common")
        stated = record.get("prompt", prompt)
        same = stated.strip() == prompt[-1]["content"].strip() if isinstance(stated, str) else stated == prompt
        if not same:
            raise RowError("'prompt' isn't what the chats 'chosen' and 'rejected' begin with")
        record["prompt"] = prompt
        given = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    record.update({key: _reply(chat) for key, chat in given.items()})


def _read_completion(record: dict[str, Any]) -> None:
    """A completion of messages -> its text; of several turns -> `messages`, the whole chat, or what `label` judges."""
    if not _is_chat(record.get("completion")):
        return
    turns = _chat(record, "completion")
    if not turns or turns[0]["role"] != "assistant":
        raise RowError("'completion' must begin with the assistant's turn")
    prompt = record.get("prompt")
    if len(turns) > 1 and isinstance(prompt, str | tuple):
        before = (_turn("user", prompt),) if isinstance(prompt, str) else prompt
        del record["completion"]
        record["messages"] = (*before, *turns)
        _judge_last(record)
    else:
        record["completion"] = _reply(turns)


def _read_messages(record: dict[str, Any]) -> None:
    """A chat with its reply in another column is the prompt."""
    record["messages"] = _chat(record, "messages")
    if "prompt" in record:
        return
    if record.keys() & {"completion", "chosen"}:
        record["prompt"] = record.pop("messages")
    else:
        _judge_last(record)


def _judge_last(record: dict[str, Any]) -> None:
    """A label judges the last reply of a chat: that is the completion, and what comes before it the prompt."""
    if not isinstance(record.get("label"), bool):
        return
    messages = record.pop("messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError("'label' judges the assistant's last reply, but the chat doesn't end with one")
    record["prompt"], record["completion"] = messages[:-1], messages[-1]["content"]


def _read_margin(record: dict[str, Any]) -> None:
    for better, worse in _SCORES:
        if "margin" not in record and _is_number(record.get(better)) and _is_number(record.get(worse)):
            try:
                record["margin"] = record[better] - record[worse]
            except OverflowError as error:  # a whole number that no float can hold, beside a float
                raise RowError(f"{better!r} and {worse!r} must be finite numbers") from error
    if isinstance(record.get("margin"), float) and not math.isfinite(record["margin"]):
        raise RowError(f"'margin' must be a finite number, not {record['margin']}")


def _make_chat(record: dict[str, Any], system: str | None) -> None:
    """A text prompt -> a user's turn; chats without a system message get the one asked for."""
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt:
        record["prompt"] = (_turn("user", prompt),)
    for key in ("prompt", "messages"):
        chat = record.get(key)
        if system and chat and isinstance(chat, tuple):
            record[key] = _with_system(chat, system)


# Small pieces


def _chat(record: Mapping[str, Any], key: str) -> Chat:
    """The messages in a column, written as {role, content} or {from, value}; what else they carry is kept."""
    value = record[key]
    if isinstance(value, Mapping):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise RowError(f"{key!r} must be a list of messages, not {type(value).__name__}")
    return tuple(_message(message, key) for message in value)


def _message(message: Any, key: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"a message of {key!r} must be an object with a role and a content, not {message!r:.40}")
    fields = {name: value for name, value in message.items() if value is not None}
    speaker = fields.pop("from", None)
    speaker = fields.pop("role", speaker)
    content = fields.pop("value", None)
    content = fields.pop("content", content)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        said = f"the role {speaker!r:.40}" if speaker is not None else "no role"
        raise RowError(f"a message of {key!r} has {said}; known: {', '.join(ROLES)}")
    if fields.get("tool_calls"):
        raise RowError(f"a message of {key!r} has 'tool_calls', which aren't read; write the call as its content")
    if not isinstance(content, str):
        said = f"a content that is no text but {type(content).__name__}" if content is not None else "no content"
        raise RowError(f"a message of {key!r} has {said}")
    return cast(Message, {"role": role, "content": content, **fields})


def _reply(chat: Chat) -> str | Chat:
    """The text of a lone assistant turn; anything else is handed over, for the row type to judge."""
    return chat[0]["content"] if len(chat) == 1 and chat[0]["role"] == "assistant" else chat


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(chat: Chat, system: str) -> Chat:
    return chat if chat and chat[0]["role"] == "system" else (_turn("system", system), *chat)


def _text(record: Mapping[str, Any], key: str) -> str:
    """A text column that may be missing, which is empty text."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{key!r} must be text, not {type(value).__name__}")
    return value or ""


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
