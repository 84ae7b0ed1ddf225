"""Causal language models of transformers: loading, scoring ragged sequences, saving."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rlhf.api import HeadRequest, LoadSpec, ModelShape, Policy, Problem, RequestError, RunError, Scores, Sequences
from rlhf_plugins.policies import attention
from rlhf_plugins.policies.codec import HFCodec
from rlhf_plugins.policies.export import export
from rlhf_plugins.policies.heads import init_scalar_head, scalars, token_logps
from rlhf_plugins.policies.loading import adapter_config, load_model
from rlhf_plugins.policies.shape import shape_of
from rlhf_plugins.policies.trunk import Trunk, examine


class HFPolicy(Policy):
    """Any causal language model of transformers, alone or inside PEFT adapters."""

    def codec(self, model: str) -> HFCodec:
        return HFCodec(model, self.config, self.context.plan.run.trust_remote_code)

    def load(self, spec: LoadSpec) -> nn.Module:
        """A `PreTrainedModel` on its device; of an adapter's folder, its base with the adapter merged.

        Raises:
            RequestError: there is no such model, or its weights aren't all those of the head asked for.
        """
        auto = self.config.attention == "auto"
        model: Any = load_model(spec, "sdpa" if auto else self.config.attention, self.context.world.size)
        in_half = torch.bfloat16 in (spec.compute, model.dtype)
        if auto and in_half and spec.device == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(spec.trainable)
        model.eval()
        for act in spec.loaded:
            act(model)
        examine(model, spec.compute, torch.device(spec.device), lm=spec.head == "lm")
        return cast(nn.Module, model)

    def add_scalar_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        if init == "keep":
            fix = f"give it a checkpoint that has one: --model {role}=PATH"
            raise RequestError(Problem(f"role {role!r} shares a trunk, and there is no head to keep", fix))
        trunk = Trunk(module)
        head = nn.Linear(int(trunk.model.config.get_text_config().hidden_size), 1)
        init_scalar_head(head, init, seed)
        head.to(trunk.device)
        return head

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        """See `rlhf.api.Policy`. On the module's device; float32.

        Raises:
            RunError: log-probs at temperature 0, which are not defined.
        """
        trunk = Trunk(module)
        trunk.model.eval()  # dropout off: ratios and references assume one distribution
        found = []
        with trunk.autocast():
            wants_last = any(request.head == "scalar" for request in heads)
            states, last = trunk.read(sequences, self.config.layout, wants_last)
            for request in heads:
                if request.head == "lm":
                    if request.temperature <= 0:
                        raise RunError(f"role {request.role!r}: log-probs at temperature 0 are not defined")
                    logp, entropy = token_logps(
                        states,
                        sequences.tokens.to(states.device),
                        trunk.logits_of(),
                        temperature=request.temperature,
                        entropy=request.entropy,
                        # where a head's use is a collective, every rank must make the same number of them
                        chunk=max(len(states), 1) if trunk.sharded else self.config.chunk_tokens,
                    )
                    found.append(Scores(request.role, logp_=logp, entropy_=entropy))
                else:
                    assert last is not None
                    head = request.scalar_head if request.scalar_head is not None else trunk.model.score
                    read = scalars(torch.cat([trunk.hidden(states), trunk.hidden(last)]), head)  # one use of the head
                    values, score = read.split([len(states), len(last)])
                    found.append(Scores(request.role, values_=values, score_=score))
        return found

    def shape(self, module: nn.Module) -> ModelShape:
        return shape_of(module)

    def save(self, module: nn.Module, folder: Path, spec: LoadSpec) -> None:
        """A PEFT folder where the module has adapters, else a whole model; safetensors, in the weights' own type.

        Where the model was itself started from an adapter, its adapters are merged: a PEFT folder can name only one
        base, and that isn't it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = module
        if hasattr(module, "get_base_model") and adapter_config(spec.model) is not None:
            model = copy.deepcopy(module).merge_and_unload()  # type: ignore[operator]
        model.save_pretrained(folder)
        self.codec(spec.model).tokenizer.save_pretrained(folder)

    @classmethod
    def export(cls, spec: LoadSpec, folder: Path, dtype: torch.dtype | None) -> Mapping[str, Any]:
        return export(spec, folder, dtype)
