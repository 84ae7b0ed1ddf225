"""Engines, each with one error. What they have in common is right: they sample from the trainer's module, token by
token, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.api import Engine, Generation, LoadSpec, LogProbs, Policy, Sample, Sequences, State, Weights


class Plain(Engine):
    borrows = True
    logprobs = LogProbs(exact=True)
    module: Any
    eos: int
    version = 0
    calls = 0

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        self.module, self.eos = module, policy.codec(spec.model).eos

    def sync(self, weights: Weights, version: int) -> None:
        self.version = version

    def generator(self, request: Sample, nth: int) -> torch.Generator:
        return torch.Generator().manual_seed((request.seed or 0) * 1000 + nth)

    @torch.no_grad()
    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        self.calls += 1
        prompts = [request.prompt.tokens for request in requests for _ in range(request.count)]
        drawn = [
            self.one(request, self.generator(request, nth), temperature)
            for request in requests
            for nth in range(request.count)
        ]
        logp = torch.tensor([logp for _, logps in drawn for logp in logps])
        ended = [tokens[-1] == self.eos for tokens, _ in drawn]
        sequences = Sequences.of(prompts, [torch.tensor(tokens) for tokens, _ in drawn])
        return Generation(sequences, logp, tuple("stop" if end else "length" for end in ended), self.version)

    def one(self, request: Sample, generator: torch.Generator, temperature: float | None) -> tuple[list[int], Any]:
        tokens, logps = request.prompt.tokens.tolist(), []
        heat = 1.0 if temperature is None else temperature
        for _ in range(self.config.max_new_tokens):
            logits = self.module(input_ids=torch.tensor([tokens])).logits[0, -1].float()
            logp = torch.log_softmax(logits / (heat or 1.0), dim=-1)
            greedy = heat == 0 or request.greedy
            token = int(logp.argmax()) if greedy else int(torch.multinomial(logp.exp(), 1, generator=generator))
            tokens.append(token)
            logps.append(self.said(logp, token))
            if token == self.eos:
                break
        return tokens[len(request.prompt.tokens) :], logps

    def said(self, logp: Tensor, token: int) -> float:
        return float(logp[token])


class Backwards(Plain):
    """Returns the last request's responses first."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        return super().generate(requests[::-1], temperature)


class One(Plain):
    """One response, whatever the count."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        return super().generate([Sample(r.prompt, seed=r.seed, greedy=r.greedy) for r in requests], temperature)


class Unseeded(Plain):
    """Draws from a stream of its own."""

    stream = torch.Generator().manual_seed(1)

    def generator(self, request: Sample, nth: int) -> torch.Generator:
        return self.stream


class Alike(Plain):
    """One draw for all responses to a prompt."""

    def generator(self, request: Sample, nth: int) -> torch.Generator:
        return super().generator(request, 0)


class Inexact(Plain):
    """Log-probs in another precision, said to be exact."""

    def said(self, logp: Tensor, token: int) -> float:
        return float(logp[token].bfloat16())


class Stale(Plain):
    """A copy of the first weights."""

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        import copy

        super().attach(copy.deepcopy(module), policy, spec)


class Versionless(Plain):
    """Keeps its version to itself."""

    def sync(self, weights: Weights, version: int) -> None: ...


class Asking(Plain):
    """Counts on a request."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        longest = max(len(request.prompt.tokens) for request in requests)
        assert longest
        return super().generate(requests, temperature)


class Hot(Plain):
    """Takes no notice of the temperature asked for."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        return super().generate(requests)


class Unsaved(Plain):
    """A state that isn't taken back."""

    def state(self) -> State:
        return {"calls": self.calls}
