"""Policies, each with one error, on one that is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from rlhf.api import HeadRequest, Scores, Sequences
from rlhf_plugins.policies.hf import HFPolicy


class Unnormalised(HFPolicy):
    """Logits for log-probs."""

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        found = super().score(module, sequences, heads)
        return [attrs.evolve(one, logp_=None if one.logp_ is None else one.logp_ + 1.0) for one in found]


class Cold(HFPolicy):
    """Takes no notice of the temperature."""

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        return super().score(module, sequences, [attrs.evolve(head, temperature=1.0) for head in heads])


class Padded(HFPolicy):
    """Lets the batch's padding in."""

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        longest = max(sequences.total_lengths())
        found = super().score(module, sequences, heads)
        padded = torch.tensor([longest - n for n in sequences.total_lengths()])[sequences.rows_of_tokens()]
        return [attrs.evolve(one, logp_=None if one.logp_ is None else one.logp_ - 0.01 * padded) for one in found]


class Detached(HFPolicy):
    """Scores without a gradient for all of the weights."""

    def load(self, spec: Any) -> nn.Module:
        module: Any = super().load(spec)
        module.register_parameter("unused", nn.Parameter(torch.zeros(1), requires_grad=spec.trainable))
        return module


class Unended(HFPolicy):
    """A codec that never closes a response."""

    def codec(self, model: str) -> Any:
        made: Any = super().codec(model)
        respond = made.response
        made.response = lambda text, prompt="", end=True: respond(text, prompt, end=False)
        return made


class Fresh(HFPolicy):
    """Saves the model that it began with."""

    def save(self, module: nn.Module, folder: Path, spec: Any, head: Any = None, weights: Any = None) -> None:
        super().save(self.load(spec), folder, spec, head)
