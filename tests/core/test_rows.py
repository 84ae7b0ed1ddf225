"""Typed rows: what each takes from a record, and the reason it gives for what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.errors import RowError
from rlhf.rows import CompletionRow, LabelledRow, Message, PreferenceRow, PromptRow, RewardedRow, StepRow, row_needs

ROW_TYPES = (PromptRow, CompletionRow, PreferenceRow, LabelledRow, RewardedRow, StepRow)


def chat(roles: str) -> tuple[Message, ...]:
    """One message a letter: s, u, a, t for system, user, assistant, tool; each says its place."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple({"role": names[r], "content": f"{r}{i}"} for i, r in enumerate(roles))


# What is taken


def test_a_prompt_is_text_or_a_chat() -> None:
    assert PromptRow.from_record({"prompt": "p"}).prompt == "p"
    assert PromptRow.from_record({"prompt": list(chat("su"))}).prompt == chat("su")


@pytest.mark.parametrize(
    ("given", "kept"), [("ua", "u"), ("suaua", "suau"), ("u", "u"), ("uatu", "uatu"), ("uaa", "u")]
)
def test_a_chat_is_a_prompt_up_to_its_last_reply(given: str, kept: str) -> None:
    assert PromptRow.from_record({"messages": chat(given)}).prompt == chat(kept)


def test_rewards_see_the_other_columns() -> None:
    row = PromptRow.from_record({"prompt": "p", "answer": "4", "level": 3})
    assert row.extra == {"answer": "4", "level": 3}


def test_a_completion_with_its_prompt() -> None:
    row = CompletionRow.from_record({"prompt": "p", "completion": "c", "source": "s"})
    assert row == CompletionRow("p", "c", (), {"source": "s"})


def test_text_alone_is_a_completion_of_nothing() -> None:
    assert CompletionRow.from_record({"text": "t"}).completion == "t"
    assert CompletionRow.from_record({"text": "t"}).prompt == ""


def test_a_chat_of_one_reply_is_a_prompt_and_a_completion() -> None:
    assert CompletionRow.from_record({"messages": chat("sua")}) == CompletionRow(chat("su"), "a2")


def test_a_chat_of_several_replies_is_kept_whole() -> None:
    row = CompletionRow.from_record({"messages": chat("suaua")})
    assert (row.prompt, row.completion, row.messages) == (chat("su"), "a4", chat("suaua"))


def test_a_completion_wins_over_messages() -> None:
    row = CompletionRow.from_record({"prompt": "p", "completion": "c", "messages": chat("ua")})
    assert (row.prompt, row.completion, row.messages) == ("p", "c", ())


def test_a_pair() -> None:
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert PreferenceRow.from_record(record) == PreferenceRow("p", "a", "b")
    assert PreferenceRow.from_record({**record, "margin": 2, "id": 7}) == PreferenceRow("p", "a", "b", 2.0, {"id": 7})


def test_a_label() -> None:
    record = {"prompt": "p", "completion": "c", "label": False}
    assert LabelledRow.from_record(record) == LabelledRow("p", "c", False)
    assert LabelledRow.from_record({"messages": chat("ua"), "label": True}) == LabelledRow(chat("u"), "a1", True)


# What is refused


@pytest.mark.parametrize(
    ("row_type", "record", "reason"),
    [
        (PromptRow, {}, "no 'prompt'; it has nothing"),
        (PromptRow, {"text": "t", "id": 1}, "no 'prompt'; it has id, text"),
        (PromptRow, {"prompt": None}, "no 'prompt'"),
        (PromptRow, {"prompt": ""}, "'prompt' is empty"),
        (PromptRow, {"prompt": []}, "'prompt' is an empty chat"),
        (PromptRow, {"prompt": 7}, "'prompt' must be text or a list of messages, not int"),
        (PromptRow, {"prompt": {"role": "user"}}, "'prompt' must be text or a list of messages, not dict"),
        (PromptRow, {"messages": chat("a")}, "nothing before the assistant's turn"),
        (CompletionRow, {"prompt": "p"}, "no 'completion'; it has prompt"),
        (CompletionRow, {"completion": "c"}, "no 'prompt'; it has completion"),
        (CompletionRow, {"prompt": "p", "completion": 4}, "'completion' must be text, not int"),
        (CompletionRow, {"messages": chat("su")}, "no assistant turn to learn"),
        (PreferenceRow, {"prompt": "p", "chosen": "a"}, "no 'rejected'; it has chosen, prompt"),
        (PreferenceRow, {"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
        (PreferenceRow, {"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        (PreferenceRow, {"prompt": "p", "chosen": chat("ua"), "rejected": "b"}, "'chosen' must be text, not tuple"),
        (
            PreferenceRow,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1"},
            "'margin' must be a finite number",
        ),
        (
            PreferenceRow,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True},
            "'margin' must be a finite number",
        ),
        (
            PreferenceRow,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400},
            "'margin' must be a finite number",
        ),
        (LabelledRow, {"prompt": "p", "completion": "c"}, "'label' must be true or false, not None"),
        (LabelledRow, {"prompt": "p", "completion": "c", "label": 1}, "'label' must be true or false, not 1"),
        (LabelledRow, {"prompt": "p", "label": True}, "no 'completion'"),
    ],
)
def test_refusals_give_their_reason(row_type: Any, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        row_type.from_record(record)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_every_row_type_says_what_it_needs(row_type: type) -> None:
    assert row_needs(row_type).startswith("it reads ")


def test_a_row_type_without_needs_is_told_by_its_docstring() -> None:
    class Rated:
        """a text with its stars.

        More.
        """

    assert row_needs(Rated) == "it reads a text with its stars."


# Faults: each is to pass


def test_a_label_judges_the_last_reply_after_all_before_it() -> None:
    row = LabelledRow.from_record({"messages": chat("uauaua"), "label": True})
    assert (row.prompt, row.completion) == (chat("uauau"), "a5")


def test_rewards_see_the_reference_completion() -> None:
    row = PromptRow.from_record({"prompt": "p", "completion": "c", "label": "sports"})
    assert row.extra == {"completion": "c", "label": "sports"}


@pytest.mark.parametrize("row_type", [PromptRow, CompletionRow])
@pytest.mark.parametrize("messages", ["text", [1], [{"content": "a"}], [{"role": "user"}, {"role": "assistant"}]])
def test_messages_that_are_none(row_type: Any, messages: Any) -> None:
    with pytest.raises(RowError):
        row_type.from_record({"messages": messages})


@pytest.mark.parametrize("prompt", [[1, 2], ["a"], b"bytes", [{"content": "a"}]])
def test_prompts_that_are_no_chat(prompt: Any) -> None:
    with pytest.raises(RowError):
        PromptRow.from_record({"prompt": prompt})


def test_a_prompt_that_ends_with_the_reply() -> None:
    with pytest.raises(RowError):
        PromptRow.from_record({"prompt": chat("ua")})


def test_a_completion_of_no_prompt() -> None:
    with pytest.raises(RowError):
        CompletionRow.from_record({"messages": chat("a")})


@pytest.mark.parametrize("margin", [float("nan"), float("inf")])
def test_a_margin_is_finite(margin: float) -> None:
    with pytest.raises(RowError):
        PreferenceRow.from_record({"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin})


def test_a_pair_is_a_good_and_a_bad_completion() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0, "id": 7}
    rows = [LabelledRow.from_record(record) for record in LabelledRow.split(pair) or []]
    assert rows == [LabelledRow("p", "a", True, {"id": 7}), LabelledRow("p", "b", False, {"id": 7})]
    for whole in ({**pair, "label": True}, {**pair, "completion": "c"}, {"prompt": "p", "chosen": "a"}):
        assert LabelledRow.split(whole) is None
    with pytest.raises(RowError, match="are the same"):
        LabelledRow.split({**pair, "rejected": "a"})


def test_steps_have_a_label_each() -> None:
    record = {"prompt": "p", "steps": ["a", "b", "c"], "labels": [True, False, 0.25], "level": 3}
    row = StepRow.from_record(record)
    assert (row.steps, row.labels, row.extra) == (("a", "b", "c"), (1.0, 0.0, 0.25), {"level": 3})
    other = {"prompt": "p", "completions": ["a"], "labels": [True]}  # as TRL's stepwise data has it
    assert StepRow.from_record(other) == StepRow("p", ("a",), (1.0,))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": "a"}, "'steps' must be a list, one item a step, not str"),
        ({"labels": None}, "'labels' must be a list, one item a step, not NoneType"),
        ({"steps": None}, "'steps' must be a list, one item a step, not NoneType"),
        ({"steps": []}, "a text for each step, and one at least"),
        ({"steps": ["a", ""]}, "a text for each step, and one at least"),
        ({"labels": [True]}, "2 steps and 1 labels"),
        ({"labels": [True, "no"]}, "true, false, or a number from 0 to 1"),
        ({"labels": [True, 1.5]}, "true, false, or a number from 0 to 1"),
        ({"labels": [True, float("nan")]}, "true, false, or a number from 0 to 1"),
        ({"prompt": None}, "no 'prompt'"),
    ],
    ids=str,
)
def test_steps_that_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(RowError, match=why):
        StepRow.from_record({"prompt": "p", "steps": ["a", "b"], "labels": [True, False], **change})


def test_a_completion_with_a_reward_a_label_or_a_better_one() -> None:
    record = {"prompt": "p", "completion": "c", "reward": -2, "level": 3}
    assert RewardedRow.from_record(record) == RewardedRow("p", "c", -2.0, {"level": 3})
    assert RewardedRow.from_record({"prompt": "p", "completion": "c", "label": True}).reward == 1.0
    assert RewardedRow.from_record({"messages": chat("ua"), "reward": 0.5}) == RewardedRow(chat("u"), "a1", 0.5)
    split = RewardedRow.split({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert split is not None and [RewardedRow.from_record(r).reward for r in split] == [1.0, 0.0]
    assert RewardedRow.split(record) is None


@pytest.mark.parametrize(
    "reward", [None, "1", True, float("nan"), float("inf"), 10**400], ids=lambda value: str(value)[:4]
)
def test_rewards_that_are_no_number(reward: Any) -> None:
    with pytest.raises(RowError, match="'reward' must be a finite number"):
        RewardedRow.from_record({"prompt": "p", "completion": "c", "reward": reward})
