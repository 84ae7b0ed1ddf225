"""Text to tokens and back, with the model's own tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rlhf.api import Message, Problem, RequestError, RowError
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.loading import adapter_config, readable, reason

_GENERATION = re.compile(r"\{%-?\s*generation")


class HFCodec:
    """The codec of one model. See `rlhf.api.Codec`."""

    def __init__(self, model: str, config: HFPolicyConfig, trust_remote_code: bool = False) -> None:
        """
        Raises:
            RequestError: the model has no tokenizer or no end token, or the user's template is neither text nor file.
        """
        self._config = config
        self.tokenizer, context = _tokenizer(model, trust_remote_code)
        self._text_template: str | None = None
        if config.template is not None:
            self._take_template(config.template)
        if self.tokenizer.eos_token_id is None:
            raise RequestError(
                Problem(
                    f"--model {model}: its tokenizer has no end token", "set eos_token in its tokenizer_config.json"
                )
            )
        self.eos = int(self.tokenizer.eos_token_id)
        self.stops = frozenset({self.eos}) | _generation_stops(model)
        self.context = context
        """The longest sequence of the model, in tokens; None where its config names none."""
        self._prompt_limit = config.max_prompt_tokens or (context - 1 if context else None)
        self._limit = config.max_length or context
        self._last: tuple[Any, Tensor] | None = None

    def prompt(self, prompt: Any) -> Tensor:
        """int64 [P], P >= 1, of a text or a chat that ends before the assistant speaks.

        An empty text becomes the token that begins text: the first response token needs something before it.

        Raises:
            RowError: it is longer than the limit and not to be cut, or has no place in the user's template.
            RequestError: it is a chat, and there is no chat template.
        """
        if self._last is not None and self._last[0] == prompt:  # a row asks for its prompt and then its responses
            return self._last[1]
        messages, text = self._rendered(prompt)
        tokens = self._tokens(text, special=messages is None) or [self._begin()]
        limit = self._prompt_limit
        if limit is not None and len(tokens) > limit:
            if self._config.prompt_overflow == "refuse":
                raise RowError(
                    f"the prompt is longer than {limit} tokens (--policy.prompt-overflow left or right would cut it)"
                )
            tokens = tokens[-limit:] if self._config.prompt_overflow == "left" else tokens[:limit]
        self._last = (prompt, torch.tensor(tokens, dtype=torch.long))
        return self._last[1]

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        """int64 [R], R >= 1, of a completion to `prompt`, closed as the model closes its turns when `end`.

        Raises:
            RowError: it is empty, or the sequence is longer than the limit and not to be cut.
        """
        messages, before = self._rendered(prompt)
        tokens: list[int] | None = None
        if messages is None:
            tokens = self._continued(before, text)
        elif end:
            tokens = self._turn(before, [*messages, {"role": "assistant", "content": text}])
        if tokens is None:
            tokens = self._tokens(text)
        if end and (not tokens or tokens[-1] not in self.stops):
            tokens = [*tokens, self.eos]
        if not tokens:
            raise RowError("the response is empty")
        room = None if self._limit is None else self._limit - len(self.prompt(prompt))
        if room is not None and len(tokens) > room:
            if self._config.response_overflow == "refuse" or room < 1:
                raise RowError(
                    f"prompt and response are longer than {self._limit} tokens "
                    "(--policy.response-overflow cut would cut the response)"
                )
            tokens = tokens[:room]
        return torch.tensor(tokens, dtype=torch.long)

    def chat(self, messages: Sequence[Message]) -> tuple[Tensor, Tensor]:
        """(int64 [T], bool [T] True on what the assistant says and the token that closes it).

        Raises:
            RowError: the template renders earlier turns differently once later ones follow, and doesn't mark the
                assistant's; or leaves nothing of what it says; or the chat is longer than the limit.
            RequestError: there is no chat template.
        """
        self._need_chat_template()
        pieces = self._pieces(messages)
        if pieces is None:
            tokens, mask = self._marked(messages)
        else:
            tokens, mask = [], []
            for text, spoken in pieces:
                part = self._tokens(text)
                ends = [i for i, token in enumerate(part) if token in self.stops]
                said = (ends[-1] + 1 if ends else len(part)) if spoken else 0
                tokens += part
                mask += [True] * said + [False] * (len(part) - said)
        if self._limit is not None and len(tokens) > self._limit:
            raise RowError(f"the chat is longer than {self._limit} tokens")
        if not any(mask):
            raise RowError("the chat template leaves nothing of the assistant's turns to be learnt")
        return torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.bool)

    def decode(self, tokens: Tensor) -> str:
        """Text of tokens, special ones left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prompt_text(self, tokens: Tensor) -> str:
        """Text of a prompt's tokens, special ones kept."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _take_template(self, template: str) -> None:
        if "{prompt}" in template:
            self._text_template = template
        elif Path(template).is_file():
            self.tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        else:
            raise RequestError(
                Problem(
                    f"--policy.template {template!r} is neither text with {{prompt}} in it nor a file",
                    "give text such as 'Question: {prompt} Answer:', or the path of a Jinja chat template",
                )
            )

    def _rendered(self, prompt: Any) -> tuple[list[Message] | None, str]:
        """(the messages where the chat template made the text, else None; the text)."""
        if isinstance(prompt, str):
            if prompt and self._text_template is not None:
                return None, self._text_template.replace("{prompt}", prompt)
            if not (self._config.chat and prompt):
                return None, prompt
            prompt = ({"role": "user", "content": prompt},)
        messages = list(prompt)
        if self._text_template is not None:
            if len(messages) != 1 or messages[0]["role"] != "user":
                raise RowError("the prompt is a chat of several turns, and --policy.template takes a single user turn")
            return None, self._text_template.replace("{prompt}", messages[0]["content"])
        self._need_chat_template()
        return messages, self._apply(messages, add_generation_prompt=True)

    def _need_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise RequestError(
                Problem(
                    "the data holds chats, and the model has no chat template",
                    "give --policy.template 'text with {prompt}' or the path of a Jinja chat template",
                )
            )

    def _apply(self, messages: Iterable[Message], *, add_generation_prompt: bool = False) -> str:
        """The template's text.

        Raises:
            RowError: the template refuses the messages, such as a system turn.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # jinja's own, raised by templates for what they don't take
            raise RowError(f"the chat template refuses it: {error}") from error

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) if text else []

    def _begin(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eos if bos is None else int(bos)

    def _continued(self, before: str, text: str) -> list[int]:
        """The response's tokens as they stand in the whole text, where the prompt's tokens stay what they are alone:
        some tokenizers put a space of their own before a text."""
        prompt = self._tokens(before, special=True)
        whole = self._tokens(before + text, special=True)
        if before and whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self._tokens(text)

    def _turn(self, before: str, messages: Sequence[Message]) -> list[int] | None:
        """The last turn's tokens up to its end token, or None where the template renders the prompt otherwise now."""
        whole = self._apply(messages)
        if not whole.startswith(before):
            return None
        tokens = self._tokens(whole[len(before) :])
        ends = [i for i, token in enumerate(tokens) if token in self.stops]
        return tokens[: ends[-1] + 1] if ends else tokens

    def _pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]] | None:
        """The chat's text cut into what the assistant says (True) and the rest, or None where it can't be cut."""
        whole, at, pieces = self._apply(messages), 0, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:i], add_generation_prompt=True) if i else ""
            through = self._apply(messages[: i + 1])
            if not (whole.startswith(through) and through.startswith(before) and len(before) >= at):
                return None
            pieces += [(whole[at : len(before)], False), (whole[len(before) : len(through)], True)]
            at = len(through)
        return [*pieces, (whole[at:], False)]

    def _marked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens and mask of a template that marks the assistant's turns itself."""
        if not _GENERATION.search(str(self.tokenizer.chat_template)):
            raise RowError(
                "the chat template renders earlier turns differently once later ones follow, so that its assistant "
                "turns can't be told apart (mark them with {% generation %} in a --policy.template)"
            )
        out = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(x) for x in out["assistant_masks"]]


def _tokenizer(model: str, trust_remote_code: bool) -> tuple[Any, int | None]:
    """(tokenizer, context in tokens or None); of an adapter's folder without a tokenizer, its base's."""
    adapter = adapter_config(model)
    base = adapter.base_model_name_or_path if adapter is not None else model
    problems = []
    for place in dict.fromkeys((model, base)):
        try:
            with readable(model, (OSError, ValueError, KeyError, ImportError)):
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
                config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
        except (OSError, ValueError, KeyError, ImportError) as error:
            problems.append(reason(error))
            continue
        context = getattr(config, "max_position_embeddings", None)
        return tokenizer, int(context) if context else None
    raise RequestError(
        Problem(
            f"--model {model}: has no tokenizer that can be read: {problems[-1]}", "put the tokenizer's files beside it"
        )
    )


def _generation_stops(model: str) -> frozenset[int]:
    """The end tokens of the model's generation config, where it has one: chat models may end turns by another token."""
    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError):
        return frozenset()
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)
