"""Sampling from an OpenAI-compatible endpoint, `POST URL/completions`: a model that somebody else serves.

Only texts come back. Their tokens are those of the policy's own tokenizer; how likely they were is not known, so only
algorithms that don't ask are served. The endpoint's model never changes: what is learnt from it is off-policy.

Left out: chat messages (prompts go as the texts that the policy's template makes), streaming, several responses a
request: each has a seed of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from rlhf.api import (
    Engine,
    Failed,
    Generation,
    LoadSpec,
    LogProbs,
    Policy,
    RowError,
    RunError,
    Sample,
    Sequences,
    State,
)
from rlhf_plugins.engines.asking import Asker, Refused, Unusable
from rlhf_plugins.engines.exchange import address_of
from rlhf_plugins.tokens import token_in


@attrs.frozen
class _Text:
    """One response, as it came."""

    text: str
    ended: bool
    """By itself, not at the length limit."""


class Endpoint(Engine):
    """See the module."""

    logprobs = LogProbs(available=False)

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self._calls = 0

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """
        Raises:
            RequestError: the address is none.
        """
        config = self.config
        self._to = address_of(config.url, "--engine.url")
        self._asker = Asker(
            self._to,
            token_in(config.token_env),
            seconds=config.timeout,
            retries=config.retries,
            concurrency=config.concurrency,
        )
        self._codec = policy.codec(spec.model)
        inner: Any = getattr(module, "get_base_model", lambda: module)()
        self._context: int | None = getattr(getattr(inner, "config", None), "max_position_embeddings", None)

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """See `rlhf.api.Engine`. What could not be had after all retries has failed.

        Raises:
            RunError: the endpoint refuses what every request says: the token, the model, an option.
        """
        heat = self.config.temperature if temperature is None else temperature
        prompts = {id(request.prompt): request.prompt for request in requests}
        number = {key: i for i, key in enumerate(prompts)}
        texts = {key: self._codec.prompt_text(prompt.tokens) for key, prompt in prompts.items()}
        asked = [
            (request, self._seed(r, request, j)) for r, request in enumerate(requests) for j in range(request.count)
        ]
        came = self._asker.every(
            [
                partial(self._one, texts[id(request.prompt)], seed, 0.0 if request.greedy else heat)
                for request, seed in asked
            ]
        )
        self._calls += 1
        # in this thread: a tokenizer is used by one at a time
        found = [self._tokens(one, request) for one, (request, _) in zip(came, asked, strict=True)]
        nothing = torch.zeros(0, dtype=torch.long)
        return Generation(
            Sequences.of(
                [prompt.tokens for prompt in prompts.values()],
                [nothing if isinstance(one, Failed) else one for one in found],
                prompt_of=[number[id(request.prompt)] for request, _ in asked],
            ),
            None,
            tuple("stop" if isinstance(one, _Text) and one.ended else "length" for one in came),
            failed={i: one.why for i, one in enumerate(found) if isinstance(one, Failed)},
        )

    def state(self) -> State:
        return {"calls": self._calls}

    def load_state(self, state: State) -> None:
        self._calls = state["calls"]

    def _seed(self, r: int, request: Sample, j: int) -> int:
        """31 bits, as endpoints take them."""
        first = request.seed if request.seed is not None else f"{self.context.seed} {self._calls} {r}"
        return random.Random(f"{first} {j}").getrandbits(31)

    def _one(self, prompt: str, seed: int, temperature: float) -> _Text | Failed:
        body = {
            "model": self.config.model,
            "prompt": prompt,
            "max_tokens": self.config.max_new_tokens,
            "temperature": temperature,
            "top_p": self.config.top_p,
            "seed": seed,
            "n": 1,
            "stream": False,
            **({"stop": list(self.config.stop)} if self.config.stop else {}),
        }
        try:
            return self._asker.ask("/completions", json.dumps(body).encode(), self._read, seed)
        except Unusable as last:
            return Failed(f"the endpoint, asked {self.config.retries + 1} times: {last}")
        except Refused as error:
            token = f"; the token is of the environment variable {self.config.token_env}"
            served = f"; is --engine.model {self.config.model} served at --engine.url {self._to}?"
            fix = {401: token, 403: token, 404: served}
            raise RunError(f"--engine openai: {error}{fix.get(error.status, '')}") from error

    def _tokens(self, found: _Text | Failed, request: Sample) -> Tensor | Failed:
        if isinstance(found, Failed):
            return found
        try:
            # a text that ends a response stands for its end token, and isn't there: nobody learns to end by it
            tokens = self._codec.response(found.text, end=found.ended and not self.config.stop)
        except RowError as error:  # empty, or longer than the policy's limit
            return Failed(f"the endpoint: {error}")
        if self._context is not None and len(request.prompt.tokens) + len(tokens) > self._context:
            return Failed(f"the endpoint: {len(tokens)} tokens, too many for the policy's context of {self._context}")
        return tokens

    def _read(self, body: bytes) -> _Text:
        try:
            (choice,) = json.loads(body)["choices"]
            text, reason = choice["text"], choice["finish_reason"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            said = self._asker.clean(body.decode(errors="replace"), 200)
            raise Unusable(f"{self._to} gives no completion: {said}") from error
        if not isinstance(text, str):
            raise Unusable(f"{self._to} gives no text")
        if reason not in ("stop", "length"):
            raise Unusable(f"{self._to} ended it by {self._asker.clean(str(reason), 80)!r}")
        return _Text(text, reason == "stop")
