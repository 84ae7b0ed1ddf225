"""Every shape a row may come in, written out, with the canonical record it must become."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.api import CompletionRow, LabelledRow, Message, PreferenceRow, PromptRow, RowError
from rlhf_plugins.formats.shapes import to_record, typed


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


# Rows that are canonical already


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": "2+2?", "answer": "4", "level": 3},
        {"text": "all of it"},
    ],
)
def test_trl_standard_stays_as_it_is(row: dict[str, Any]) -> None:
    assert to_record(row) == row


def test_a_null_is_a_column_that_is_not_there_but_others_keep_theirs() -> None:
    row = {"prompt": "p", "completion": "c", "messages": None, "chosen": None, "margin": None, "source": None}
    assert to_record(row) == {"prompt": "p", "completion": "c", "source": None}


@pytest.mark.parametrize("value", [7, 0.5, True, {"role": "user", "content": "x"}])
def test_a_prompt_of_a_wrong_type_reaches_the_row_type(value: Any) -> None:
    record = to_record({"prompt": value})
    assert record == {"prompt": value}
    with pytest.raises(RowError, match="'prompt' must be text"):
        PromptRow.from_record(record)


# TRL conversational


def test_a_conversational_completion_is_its_text() -> None:
    record = to_record({"prompt": [system("be brief"), user("2+2?")], "completion": [assistant("4")]})
    assert record == {"prompt": (system("be brief"), user("2+2?")), "completion": "4"}


def test_a_completion_of_several_turns_is_a_chat_to_learn_and_the_prompt_stays() -> None:
    record = to_record({"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]})
    whole = (user("a"), assistant("b"), user("c"), assistant("d"))
    assert record == {"prompt": (user("a"),), "messages": whole}
    assert CompletionRow.from_record(record).messages == whole
    assert PromptRow.from_record(record).prompt == (user("a"),)


def test_a_label_judges_the_last_turn_of_a_long_completion() -> None:
    turns = [assistant("b"), user("c"), assistant("d")]
    row = LabelledRow.from_record(to_record({"prompt": [user("a")], "completion": turns, "label": False}))
    assert row == LabelledRow((user("a"), assistant("b"), user("c")), "d", False)


def test_conversational_pairs_with_a_prompt() -> None:
    record = to_record({"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]})
    assert record == {"prompt": (user("2+2?"),), "chosen": "4", "rejected": "5"}


def test_whole_chats_share_their_prompt() -> None:
    begin = [system("s"), user("a"), assistant("b"), user("c")]
    record = to_record({"chosen": [*begin, assistant("good")], "rejected": [*begin, assistant("bad")]})
    assert record == {"prompt": tuple(begin), "chosen": "good", "rejected": "bad"}


def test_whole_chats_with_the_prompt_beside_them_and_scores() -> None:
    # The columns of ultrafeedback_binarized: its prompt is the text of the chats' user turn.
    row = {
        "prompt": "2+2?",
        "prompt_id": "x",
        "chosen": [user("2+2?"), assistant("4")],
        "rejected": [user("2+2?"), assistant("5")],
        "messages": [user("2+2?"), assistant("4")],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }
    record = to_record(row)
    assert PreferenceRow.from_record(record).prompt == (user("2+2?"),)
    assert (record["chosen"], record["rejected"], record["margin"]) == ("4", "5", 2.5)
    assert CompletionRow.from_record(record).completion == "4"
    with pytest.raises(RowError, match="'prompt' isn't what the chats"):
        to_record({**row, "prompt": "3+3?"})


def test_whole_chats_that_are_the_same_keep_their_reply_and_are_refused_as_a_pair() -> None:
    chat = [user("a"), assistant("b")]
    record = to_record({"chosen": chat, "rejected": chat})
    assert record == {"prompt": (user("a"),), "chosen": "b", "rejected": "b"}
    with pytest.raises(RowError, match="the same"):
        PreferenceRow.from_record(record)


def test_whole_chats_that_part_before_the_last_reply_are_no_pair_of_texts() -> None:
    chosen, rejected = [user("a"), assistant("b"), user("c"), assistant("d")], [user("a"), assistant("x")]
    record = to_record({"chosen": chosen, "rejected": rejected})
    assert (record["prompt"], record["rejected"]) == ((user("a"),), "x")
    with pytest.raises(RowError, match="'chosen' must be text"):
        PreferenceRow.from_record(record)


def test_whole_chats_without_a_common_start_are_refused() -> None:
    with pytest.raises(RowError, match="no prompt in common"):
        to_record({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]})


def test_messages_are_a_chat_to_learn() -> None:
    chat = [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]
    record = to_record({"messages": chat})
    assert record == {"messages": tuple(chat)}
    assert PromptRow.from_record(record).prompt == tuple(chat[:4])


def test_messages_with_a_label_end_with_what_is_judged() -> None:
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    record = to_record({"messages": chat, "label": True})
    assert record == {"prompt": tuple(chat[:3]), "completion": "d", "label": True}
    for broken in ([user("a"), assistant("b"), user("c")], [assistant("b")], []):
        with pytest.raises(RowError, match="'label' judges"):
            to_record({"messages": broken, "label": True})


def test_a_label_that_is_no_boolean_changes_nothing() -> None:
    chat = [user("a"), assistant("b")]
    assert to_record({"messages": chat, "label": "sports"}) == {"messages": tuple(chat), "label": "sports"}


def test_what_else_a_message_carries_is_kept() -> None:
    record = to_record({"messages": [{**user("a"), "name": "Ann", "weight": None}, assistant("b")]})
    assert record["messages"] == ({**user("a"), "name": "Ann"}, assistant("b"))


# ShareGPT


def test_sharegpt() -> None:
    turns = [("system", "s"), ("human", "a"), ("function_call", "f(1)"), ("observation", "2"), ("gpt", "b")]
    record = to_record({"conversations": [{"from": who, "value": text} for who, text in turns]})
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in record["messages"]] == roles
    assert [m["content"] for m in record["messages"]] == ["s", "a", "f(1)", "2", "b"]


def test_sharegpt_pair() -> None:
    row = {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
        "system": "s",
    }
    record = to_record(row)
    assert (record["prompt"], record["chosen"], record["rejected"]) == ((system("s"), user("a")), "good", "bad")
    assert "messages" not in record  # or its earlier replies would be learnt
    assert PreferenceRow.from_record(record).prompt == (system("s"), user("a"))


def test_a_chat_that_is_a_prompt_must_end_before_the_reply() -> None:
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(RowError, match="ends with the assistant's turn"):
        to_record({"conversations": chat, "chosen": chat[1], "rejected": {"from": "gpt", "value": "c"}})
    with pytest.raises(RowError, match="ends with the assistant's turn"):
        to_record({"prompt": [user("a"), assistant("b")]})


# Alpaca


def test_alpaca() -> None:
    record = to_record({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert (record["prompt"], record["completion"]) == ((user("Add.\n\n2 and 2"),), "4")
    assert to_record({"instruction": "Hi", "input": "", "output": "Ho"})["prompt"] == (user("Hi"),)
    assert to_record({"instruction": "Hi", "input": None, "output": "Ho"})["prompt"] == (user("Hi"),)


def test_alpaca_with_history_learns_every_response() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"], ["x", "y"]]}
    chat = (system("s"), user("a"), assistant("b"), user("x"), assistant("y"), user("c"))
    record = to_record(row)
    assert CompletionRow.from_record(record).messages == (*chat, assistant("d"))
    assert PromptRow.from_record(record).prompt == chat
    labelled = LabelledRow.from_record(to_record({**row, "label": True}))
    assert (labelled.prompt, labelled.completion) == (chat, "d")


def test_alpaca_pair() -> None:
    record = to_record({"instruction": "a", "chosen": "good", "rejected": "bad", "history": []})
    row = PreferenceRow.from_record(record)
    assert (row.prompt, row.chosen, row.rejected) == ((user("a"),), "good", "bad")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": ""}, "'instruction' is empty"),
        ({"instruction": 7}, "'instruction' must be text, not int"),
        ({"instruction": "a", "input": ["b"]}, "'input' must be text, not list"),
        ({"instruction": "a", "history": [["b"]]}, "'history' must be"),
        ({"instruction": "a", "history": "b"}, "'history' must be"),
        ({"instruction": "a", "history": [["b", None]]}, "'history' must be"),
    ],
)
def test_broken_alpaca(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_record(row)


# Question and answer


def test_the_answer_stays_whole_and_is_the_completion() -> None:
    answer = "48/2 = 24\n#### 72"
    record = to_record({"question": "How many?", "answer": answer})
    assert record == {"question": "How many?", "prompt": "How many?", "answer": answer, "completion": answer}
    assert PromptRow.from_record(record).extra["answer"] == answer


def test_a_question_with_a_system_column_is_a_chat() -> None:
    record = to_record({"system": "s", "question": "q", "chosen": "a", "rejected": "b"})
    assert record["prompt"] == (system("s"), user("q"))


def test_the_canonical_names_win() -> None:
    record = to_record({"prompt": "p", "question": "q", "instruction": "i", "answer": "a", "output": "o"})
    assert record["prompt"] == "p"
    assert "completion" not in record


# Broken messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "'messages' must be a list of messages, not str"),
        (3, "'messages' must be a list of messages, not int"),
        (["hello"], "must be an object with a role and a content, not 'hello'"),
        ([{"content": "a"}], "has no role"),
        ([{"role": "narrator", "content": "a"}], "has the role 'narrator'; known: system, user"),
        ([{"role": ["user"], "content": "a"}], "has the role"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "a content that is no text but list"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}], "'tool_calls'"),
    ],
)
def test_broken_messages(messages: Any, reason: str) -> None:
    for key in ("messages", "conversations"):
        with pytest.raises(RowError, match=reason.replace("'messages'", f"'{key}'")):
            to_record({key: messages})


def test_a_completion_must_begin_with_the_assistant() -> None:
    with pytest.raises(RowError, match="must begin with the assistant"):
        to_record({"prompt": "a", "completion": [user("b")]})


# Labels, margins, scores


def test_scores_give_the_margin_unless_there_is_one() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert to_record({**pair, "chosen_score": 3, "rejected_score": 1.5})["margin"] == 1.5
    assert to_record({**pair, "chosen_score": 3, "rejected_score": 1.5, "margin": 9})["margin"] == 9
    assert "margin" not in to_record({**pair, "chosen_score": 3, "rejected_score": None})
    assert "margin" not in to_record({**pair, "chosen_score": "3", "rejected_score": "1"})
    assert "margin" not in to_record({**pair, "chosen_score": True, "rejected_score": False})
    with pytest.raises(RowError, match="finite"):
        to_record({**pair, "chosen_score": float("inf"), "rejected_score": 1.0})
    with pytest.raises(RowError, match="finite"):
        to_record({**pair, "margin": float("nan")})
    with pytest.raises(RowError, match="'chosen_score' and 'rejected_score' must be finite numbers"):
        to_record({**pair, "chosen_score": 10**400, "rejected_score": 1.0})


def test_typed_reads_labels_and_scores_and_nothing_else() -> None:
    row = {"prompt": "1", "answer": "72", "label": "True", "margin": "0.5", "chosen_score": "2", "rejected_score": ""}
    expected = {"prompt": "1", "answer": "72", "label": True, "margin": 0.5, "chosen_score": 2.0}
    assert typed(row) == expected
    assert typed({"label": "1", "margin": "much"}) == {"label": "1", "margin": "much"}


# Options


def test_forced_shapes() -> None:
    row = {
        "prompt": "p",
        "instruction": "i",
        "output": "o",
        "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}],
    }
    assert to_record(row)["prompt"] == "p"
    alpaca = to_record(row, shape="alpaca")
    assert (alpaca["prompt"], alpaca["completion"]) == ((user("i"),), "o")
    sharegpt = to_record(row, shape="sharegpt")
    assert sharegpt["messages"] == (user("h"), assistant("g"))
    assert "prompt" not in sharegpt
    assert "messages" not in to_record({**row, "messages": [user("m")]}, shape="alpaca")
    plain = {"instruction": "i", "output": "o", "conversations": row["conversations"]}
    assert to_record(plain, shape="plain") == plain
    for shape, column in (("alpaca", "instruction"), ("sharegpt", "conversations")):
        with pytest.raises(RowError, match=f"no '{column}', which the shape {shape} needs; it has prompt"):
            to_record({"prompt": "p"}, shape=shape)


def test_chat_makes_a_text_prompt_a_users_turn() -> None:
    assert to_record({"question": "q", "answer": "a"}, shape="chat")["prompt"] == (user("q"),)
    assert to_record({"prompt": ""}, shape="chat")["prompt"] == ""  # the row type refuses it


def test_a_system_message_goes_before_every_chat_that_has_none() -> None:
    assert to_record({"prompt": "p"}, system="s")["prompt"] == (system("s"), user("p"))
    assert to_record({"prompt": [user("p")]}, system="s")["prompt"] == (system("s"), user("p"))
    own = [system("own"), user("p"), assistant("q")]
    assert to_record({"messages": own}, system="s")["messages"] == tuple(own)
    assert to_record({"messages": own[1:]}, system="s")["messages"][0] == system("s")
    labelled = to_record({"messages": own[1:], "label": True}, system="s")
    assert labelled["prompt"] == (system("s"), user("p"))


def test_a_prompt_of_the_users_takes_the_place_of_the_rows_own() -> None:
    assert to_record({"instruction": "i", "output": "o"}, prompt="mine")["prompt"] == "mine"
    assert to_record({"instruction": "i", "output": "o"}, prompt="mine")["completion"] == "o"
    assert to_record({"messages": [user("a"), assistant("b")]}, prompt="mine") == {"prompt": "mine"}


def test_the_row_itself_is_left_alone() -> None:
    row = {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": True}
    before = {"messages": [dict(m) for m in row["messages"]], "label": True}  # type: ignore[attr-defined]
    to_record(row, shape="chat", system="s")
    assert row == before
