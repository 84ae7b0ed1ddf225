"""Sampling in the trainer's process, from its own module: no second copy of the weights, nothing to sync.

Left out: paged keys and values, compiled graphs, speculative decoding. Engines made for sampling have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf.api import (
    Engine,
    Generation,
    LoadSpec,
    LogProbs,
    Policy,
    Problem,
    RequestError,
    RunError,
    Sample,
    Sequences,
    State,
    Weights,
)
from rlhf_plugins.engines.sampling import draw, uniforms
from rlhf_plugins.engines.slots import SlotCache
from rlhf_plugins.policies.attention import grouped

_SPARE = 64
"""Columns beyond the longest sequence, so that slots are moved back only so often."""


@attrs.define
class _Response:
    """One response on its way."""

    place: int  # among the responses asked for
    of: int  # which of the different prompts
    prompt: Tensor
    uniform: Tensor  # float64 [limit], in [0, 1)
    greedy: bool
    limit: int
    tokens: list[int] = attrs.Factory(list)
    logps: list[float] = attrs.Factory(list)
    finish: str = ""

    @property
    def length(self) -> int:
        """Tokens whose keys are cached: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1


class HFEngine(Engine):
    """Decodes up to `max_batch` responses at once; as some end, those waiting take their slots."""

    borrows = True

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self._calls = 0
        self._version = 0

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """
        Raises:
            RequestError: the model keeps another memory than keys and values of its tokens.
        """
        self._module: Any = module
        base: Any = getattr(module, "get_base_model", lambda: module)()  # inside adapters
        self._base = base
        taken = inspect.signature(base.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # the name in older transformers
        self._codec = policy.codec(spec.model)
        self._compute = spec.compute
        self._device = torch.device(spec.device)
        config = base.config.get_text_config()
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds <= {"full_attention", "sliding_attention"} or getattr(base, "_is_stateful", False):
            what = f"--engine hf samples from attention models, and {spec.model} has {', '.join(sorted(kinds))} layers"
            raise RequestError(Problem(what, "another engine may: rlhf plugins --kind engine"))
        ends = getattr(base.generation_config, "eos_token_id", None)
        self._stops = {self._codec.eos, *([ends] if isinstance(ends, int) else ends or ())}
        truncated = self.config.top_p < 1.0 or self.config.top_k > 0
        full = spec.weights == torch.float32 and spec.compute in (None, torch.float32)
        exact = full and "quantization_config" not in spec.arguments and not truncated
        dtype = str(spec.compute or spec.weights).removeprefix("torch.")
        self.logprobs = LogProbs(exact=exact, truncated=truncated, dtype=dtype)

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """See `rlhf.api.Engine`. The log-probs are those of the distribution that was sampled; of a greedy token, at
        the temperature (1 where that is 0).

        Raises:
            RunError: a prompt fills the model's context.
        """
        heat = self.config.temperature if temperature is None else temperature
        prompts = {id(request.prompt): request.prompt for request in requests}  # several requests may share one
        responses = self._responses(requests, {key: i for i, key in enumerate(prompts)}, greedy=heat == 0)
        self._module.eval()
        device = self._device
        autocast = torch.autocast(device.type, dtype=self._compute, enabled=self._compute is not None)
        with torch.no_grad(), autocast, grouped(self._base):
            self._decode(responses, heat or 1.0, device)
        self._calls += 1
        return Generation(
            Sequences.of(
                [prompt.tokens for prompt in prompts.values()],
                [torch.tensor(response.tokens) for response in responses],
                prompt_of=[response.of for response in responses],
            ),
            torch.tensor([logp for response in responses for logp in response.logps], dtype=torch.float32),
            tuple("stop" if response.finish == "stop" else "length" for response in responses),
            self._version,
        )

    def sync(self, weights: Weights, version: int) -> None:
        """Nothing to take: it samples from the trainer's module."""
        self._version = version

    def state(self) -> State:
        return {"calls": self._calls, "version": self._version}

    def load_state(self, state: State) -> None:
        self._calls, self._version = state["calls"], state["version"]

    def _responses(self, requests: Sequence[Sample], number: dict[int, int], greedy: bool) -> list[_Response]:
        found: list[_Response] = []
        most = self.config.max_new_tokens
        for r, request in enumerate(requests):
            size = len(request.prompt.tokens)
            limit = most if self._context is None else min(most, self._context - size)
            if limit < 1:
                raise RunError(f"a prompt of {size} tokens leaves no room in the model's context of {self._context}")
            for j in range(request.count):
                seed = (request.seed, j) if request.seed is not None else (self.context.seed, self._calls, r, j)
                of, drawn = number[id(request.prompt)], uniforms(seed, limit)
                found.append(_Response(len(found), of, request.prompt.tokens, drawn, greedy or request.greedy, limit))
        return found

    def _decode(self, responses: list[_Response], temperature: float, device: torch.device) -> None:
        # longest prompts first: then whatever enters later finds its columns to the left of the common end
        waiting = sorted(responses, key=lambda x: (-len(x.prompt), x.of, x.place))
        slots = min(self.config.max_batch, len(responses))
        longest = max((len(x.prompt) + x.limit for x in responses), default=0)
        cache = SlotCache(slots, longest + _SPARE, end=len(waiting[0].prompt) if waiting else 0)
        active: list[_Response] = []
        enough = max(1, slots // 4)  # free slots that let others in: some at a time, so that their prompts run together
        while waiting or active:
            if waiting and slots - len(active) >= enough:
                entering, waiting = waiting[: slots - len(active)], waiting[slots - len(active) :]
                logits = self._prefill(entering, cache, device)
                fresh = len(active)
                active += entering
            else:
                logits = self._step(active, cache, device)
                fresh = 0
            self._take(active[fresh:], logits, temperature)
            for row in reversed(range(fresh, len(active))):
                if active[row].finish:
                    cache.leave(row)
                    active[row] = active[-1]
                    active.pop()

    def _prefill(self, entering: list[_Response], cache: SlotCache, device: torch.device) -> Tensor:
        """Run the prompts, each once, and give each response its slot. [len(entering), V] logits."""
        logits: list[Tensor] = []
        prompts = list({x.of: x.prompt for x in entering}.values())  # longest first
        places = {of: i for i, of in enumerate(dict.fromkeys(x.of for x in entering))}
        for piece in _alike(prompts):
            width = len(piece[0])
            ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in piece])
            lengths = torch.tensor([len(prompt) for prompt in piece])
            prefilled = DynamicCache()
            first = sum(len(part) for part in logits)
            logits.append(self._forward(ids.to(device), lengths.to(device), prefilled))
            for x in entering:
                if 0 <= places[x.of] - first < len(piece):
                    cache.enter(prefilled, places[x.of] - first, len(x.prompt))
        return torch.cat(logits)[[places[x.of] for x in entering]]

    def _step(self, active: list[_Response], cache: SlotCache, device: torch.device) -> Tensor:
        """Run the newest token of each. [len(active), V] logits."""
        longest = max(x.length for x in active)
        cache.start = cache.end - longest
        if cache.end == cache.capacity:
            cache.move(longest)  # no prompt that waits is longer
        ids = torch.tensor([[x.tokens[-1]] for x in active], device=device)
        lengths = torch.tensor([x.length + 1 for x in active], device=device)
        logits = self._forward(ids, lengths, cache)
        cache.end += 1
        return logits

    def _forward(self, ids: Tensor, lengths: Tensor, cache: Any) -> Tensor:
        """Logits after the last token. ids: [n, q], padded on the left; lengths: [n], cached tokens included."""
        width = cache.get_seq_length() + ids.shape[1]
        # The last place by number, not as a slice: of a slice of n rows, which has gaps in memory, torch makes a
        # product for each with a copy of the head of its own.
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        place = torch.arange(width, device=ids.device)[None] - (width - lengths)[:, None]  # [n, width], < 0 is padding
        out = self._module(
            input_ids=ids,
            attention_mask=(place >= 0).long(),
            position_ids=place[:, -ids.shape[1] :].clamp(min=0),
            use_cache=True,
            logits_to_keep=last,
            **{self._cache_name: cache},
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _take(self, responses: list[_Response], logits: Tensor, temperature: float) -> None:
        """Draw the next token of each."""
        device = logits.device
        tokens, logps = draw(
            logits,
            torch.stack([x.uniform[len(x.tokens)] for x in responses]).to(device),
            torch.tensor([x.greedy for x in responses], device=device),
            temperature=temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )
        for x, token, logp in zip(responses, tokens.tolist(), logps.tolist(), strict=True):
            x.tokens.append(token)
            x.logps.append(logp)
            if token in self._stops or (self.config.stop and self._stopped(x.tokens)):
                x.finish = "stop"
            elif len(x.tokens) == x.limit:
                x.finish = "length"

    def _stopped(self, tokens: list[int]) -> bool:
        """One of the stop texts has just been completed."""
        tail = 4 * max(len(text) for text in self.config.stop) + 8  # tokens; one may be a single byte of a character
        text = self._codec.decode(torch.tensor(tokens[-tail:]))
        return any(stop in text for stop in self.config.stop)


def _alike(prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut prompts, longest first, where padding would pass a quarter of the longest."""
    piece: list[Tensor] = []
    for prompt in prompts:
        if piece and len(prompt) < 0.75 * len(piece[0]):
            yield piece
            piece = []
        piece.append(prompt)
    yield piece
