"""Text to tokens: plain, chat, limits, templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors

from rlhf.errors import RequestError, RowError

TURNS = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
FORGETFUL = TURNS.replace("m.content | trim", "(m.content if loop.last else 'x') | trim")
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content if loop.last else 'x' }}<end>"
    "{% else %}<bot>{% generation %}{{ m.content if loop.last else 'x' }}<end>{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = ({"role": "user", "content": "hi"},)
EOS = 0


@pytest.fixture
def codec(folder: Any, policy: Any) -> Callable[..., Any]:
    def make(
        template: str = "", bos: bool = False, stops: Any = None, template_option: str | None = None, **options: Any
    ) -> Any:
        place = folder("llama", bos=bos)
        if template:
            (Path(place) / "chat_template.jinja").write_text(template)
        if stops is not None:
            (Path(place) / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return policy(template=template_option, **options).codec(place)

    return make


def spell(codec: Any, tokens: torch.Tensor) -> str:
    return "".join(codec.tokenizer.convert_ids_to_tokens(tokens.tolist()))


def test_plain_text_is_itself_and_a_response_ends(codec: Any) -> None:
    plain = codec()
    assert spell(plain, plain.prompt("a b?")) == "a b?"
    assert spell(plain, plain.response("cd", "a b?")) == "cd<eos>"
    assert spell(plain, plain.response("cd", "a b?", end=False)) == "cd"
    assert plain.eos == EOS
    assert plain.decode(plain.response("cd")) == "cd"
    assert plain.prompt_text(torch.tensor([0, 6])) == "<eos>a"


def test_a_completion_is_read_where_it_stands(codec: Any) -> None:
    """As tokenizers with a space of their own before each text have it: alone "cd" would be " cd"."""
    spaced = codec()
    spaced.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    assert spell(spaced, spaced.prompt("ab")) == " ab"
    assert spell(spaced, spaced.response("cd", "ab")) == "cd<eos>"


def test_a_text_begins_with_the_tokenizers_own_token_and_a_rendered_chat_as_its_template_says(codec: Any) -> None:
    chat = codec(TURNS, bos=True, stops=[0, 5])
    beginning = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    chat.tokenizer.backend_tokenizer.post_processor = beginning
    assert spell(chat, chat.prompt("hi")) == "<s>hi"
    assert spell(chat, chat.response("yo", "hi")) == "yo<eos>"
    assert spell(chat, chat.prompt(CHAT)) == "<user>hi<end>\n<bot>"
    assert spell(chat, chat.response("yo", CHAT)) == "yo<end>"


def test_an_empty_prompt_is_the_token_that_begins_text(codec: Any) -> None:
    assert spell(codec(), codec().prompt("")) == "<eos>"
    assert spell(codec(bos=True), codec(bos=True).prompt("")) == "<s>"


def test_an_empty_response_is_an_end_or_refused(codec: Any) -> None:
    plain = codec()
    assert plain.response("").tolist() == [EOS]
    with pytest.raises(RowError, match="empty"):
        plain.response("", end=False)


def test_a_chat_goes_through_the_models_template(codec: Any) -> None:
    chat = codec(TURNS, stops=[0, 5])
    prompt, response = chat.prompt(CHAT), chat.response(" yes ", CHAT)
    assert spell(chat, prompt) == "<user>hi<end>\n<bot>"
    assert spell(chat, response) == "yes<end>"  # as the template closes a turn; what follows is never sampled
    whole = chat.tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": " yes "}], tokenize=False)
    assert whole.startswith(spell(chat, torch.cat([prompt, response])))


def test_a_template_that_closes_turns_otherwise_gets_the_tokenizers_end(codec: Any) -> None:
    """Nothing says that <end> stops a response, so sampling wouldn't: the tokenizer's end token has to be learnt."""
    chat = codec(TURNS, stops=0)
    assert spell(chat, chat.response("yes", CHAT)) == "yes<end>\n<eos>"


def test_plain_text_on_a_chat_model_is_left_alone_unless_told(codec: Any) -> None:
    assert spell(codec(TURNS), codec(TURNS).prompt("hi")) == "hi"
    assert spell(codec(TURNS), codec(TURNS, chat=True).prompt("hi")) == "<user>hi<end>\n<bot>"


def test_a_chat_without_a_template_is_asked_for_one(codec: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"policy\.template"):
        codec().prompt(CHAT)
    with pytest.raises(RequestError, match="neither text"):
        codec(template_option="nowhere.jinja")
    text = codec(template_option="Q: {prompt}\nA:")
    assert spell(text, text.prompt(CHAT)) == "Q: hi\nA:" == spell(text, text.prompt("hi"))
    with pytest.raises(RowError, match="several turns"):
        text.prompt((*CHAT, {"role": "assistant", "content": "a"}, *CHAT))
    path = tmp_path / "own.jinja"
    path.write_text(TURNS)
    own = codec(template_option=str(path))
    assert spell(own, own.prompt(CHAT)) == "<user>hi<end>\n<bot>"


def test_a_whole_chat_is_learnt_on_the_assistants_turns(codec: Any) -> None:
    chat = codec(TURNS, stops=[0, 5])
    bot = {"role": "assistant", "content": "yo"}
    tokens, mask = chat.chat([*CHAT, bot, *CHAT, {**bot, "content": "ok"}])
    assert spell(chat, tokens) == "<user>hi<end>\n<bot>yo<end>\n<user>hi<end>\n<bot>ok<end>\n"
    assert spell(chat, tokens[mask]) == "yo<end>ok<end>"
    assert spell(chat, tokens[~mask]) == "<user>hi<end>\n<bot>\n<user>hi<end>\n<bot>\n"


def test_a_template_that_rewrites_the_past_is_refused_unless_it_marks_its_turns(codec: Any) -> None:
    turns = [*CHAT, {"role": "assistant", "content": "yo"}, *CHAT, {"role": "assistant", "content": "ok"}]
    with pytest.raises(RowError, match="renders earlier turns differently"):
        codec(FORGETFUL, stops=[0, 5]).chat(turns)
    marked = codec(MARKED, stops=[0, 5])
    tokens, mask = marked.chat(turns)
    assert spell(marked, tokens) == "<user>x<end><bot>x<end><user>x<end><bot>ok<end>"
    assert spell(marked, tokens[mask]) == "x<end>ok<end>"


def test_a_chat_of_which_nothing_can_be_learnt_is_a_refused_row(codec: Any) -> None:
    closed_outside = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")
    with pytest.raises(RowError, match="leaves nothing of the assistant's turns"):
        codec(closed_outside, stops=[0, 5]).chat([*CHAT, {"role": "assistant", "content": ""}])


def test_a_template_that_refuses_is_a_refused_row(codec: Any) -> None:
    chat = codec("{{ raise_exception('no system turns') }}")
    with pytest.raises(RowError, match="no system turns"):
        chat.prompt(CHAT)


def test_long_prompts_are_refused_or_cut_on_the_side_asked_for(codec: Any) -> None:
    with pytest.raises(RowError, match="longer than 3 tokens"):
        codec(max_prompt_tokens=3).prompt("abcd")
    assert spell(codec(), codec(max_prompt_tokens=3, prompt_overflow="left").prompt("abcd")) == "bcd"
    assert spell(codec(), codec(max_prompt_tokens=3, prompt_overflow="right").prompt("abcd")) == "abc"
    assert len(codec(max_prompt_tokens=4).prompt("abcd")) == 4
    with pytest.raises(RowError, match="longer than 63 tokens"):  # the model's 64, less one to answer
        codec().prompt("a" * 64)


def test_long_sequences_are_refused_or_their_responses_cut(codec: Any) -> None:
    with pytest.raises(RowError, match="longer than 5 tokens"):
        codec(max_length=5).response("abc", "de")
    assert spell(codec(), codec(max_length=6).response("abc", "de")) == "abc<eos>"
    assert spell(codec(), codec(max_length=5, response_overflow="cut").response("abc", "de")) == "abc"
    with pytest.raises(RowError, match="chat is longer than 8 tokens"):
        codec(TURNS, max_length=8).chat([*CHAT, {"role": "assistant", "content": "yo"}])


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, policy: Any) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        policy().codec(str(tmp_path))
