"""Causal language models of transformers: loading, scoring ragged sequences, saving."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from peft import PeftModel
from torch import nn

from rlhf.api import (
    HeadRequest,
    LoadSpec,
    LogitSource,
    ModelShape,
    Policy,
    Problem,
    RequestError,
    RunError,
    Scores,
    Sequences,
)
from rlhf_plugins.policies import attention
from rlhf_plugins.policies.codec import HFCodec
from rlhf_plugins.policies.compared import divergences
from rlhf_plugins.policies.export import export
from rlhf_plugins.policies.fused import fuse
from rlhf_plugins.policies.heads import init_scalar_head, scalars, token_logps
from rlhf_plugins.policies.loading import adapter_config, load_model
from rlhf_plugins.policies.parts import own_head, save_part
from rlhf_plugins.policies.shape import shape_of
from rlhf_plugins.policies.token_heads import check_foldable, save_folded, token_numbers
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
        model: Any = load_model(spec, None if auto else self.config.attention, self.context.world.size)
        if auto and spec.device == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(spec.trainable)
        model.eval()
        for act in spec.loaded:
            act(model)
        fuse(model)
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

    def add_token_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        """See `rlhf.api.Policy`."""
        trunk = Trunk(module)
        check_foldable(trunk, role)
        head = nn.Linear(int(trunk.model.config.get_text_config().hidden_size), trunk.vocabulary, bias=False)
        init_scalar_head(head, init, seed)
        head.weight.data *= 0.1
        return head.to(trunk.device)

    def own_head(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        return own_head(module, spec)

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
                    found.append(self._read_out(trunk, states, sequences, request))
                elif request.head == "tokens":
                    assert request.scalar_head is not None
                    tokens, chunk = sequences.tokens.to(states.device), self.config.chunk_tokens
                    taken, logp = token_numbers(trunk.hidden(states), tokens, request.scalar_head, chunk)
                    found.append(Scores(request.role, values_=taken, logp_=logp))
                else:
                    assert last is not None
                    head = request.scalar_head if request.scalar_head is not None else trunk.model.score
                    read = scalars(torch.cat([trunk.hidden(states), trunk.hidden(last)]), head)  # one use of the head
                    values, score = read.split([len(states), len(last)])
                    found.append(Scores(request.role, values_=values, score_=score))
        return found

    def _read_out(self, trunk: Trunk, states: torch.Tensor, sequences: Sequences, request: HeadRequest) -> Scores:
        """What the vocabulary head says of response tokens."""
        # where a head's use is a collective, every rank must make the same number of them
        chunk = max(len(states), 1) if trunk.head_sharded else self.config.chunk_tokens
        if request.compare is not None:
            return Scores(request.role, divergence_=divergences(states, trunk.logits_of(), request.compare, chunk))
        if request.temperature <= 0:
            raise RunError(f"role {request.role!r}: log-probs at temperature 0 are not defined")
        logp, entropy = token_logps(
            states,
            sequences.tokens.to(states.device),
            trunk.logits_of(),
            temperature=request.temperature,
            entropy=request.entropy,
            chunk=chunk,
        )
        return Scores(request.role, logp_=logp, entropy_=entropy)

    def read(self, module: nn.Module, sequences: Sequences) -> LogitSource:
        """See `rlhf.api.Policy`."""
        trunk = Trunk(module)
        trunk.model.eval()
        with trunk.autocast():
            states, _ = trunk.read(sequences, self.config.layout, False)

        def logits_of(some: torch.Tensor) -> torch.Tensor:
            with trunk.autocast():
                return trunk.logits_of()(some)

        return LogitSource(states, logits_of)

    def shape(self, module: nn.Module) -> ModelShape:
        return shape_of(module)

    def save(
        self,
        module: nn.Module,
        folder: Path,
        spec: LoadSpec,
        head: nn.Module | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        folded: Sequence[tuple[float, nn.Module]] = (),
    ) -> None:
        """A PEFT folder where the module has adapters, else a whole model; safetensors, in the weights' own type.

        Where the model was itself started from an adapter, its adapters are merged: a PEFT folder can name only one
        base, and that isn't it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = module
        given = {} if weights is None else {"state_dict": with_ties(module, weights)}
        adapted = hasattr(module, "get_base_model")
        if folded:
            save_folded(model, folder, folded)
        elif spec.joins:
            save_part(module, folder, spec, head, weights)
        elif adapted and adapter_config(spec.model) is not None:
            whole = copy.deepcopy(model) if weights is None else self._again(module, spec, weights)
            whole.merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
        elif adapted:  # the first adapters are its own, others are of roles that share its base
            model.save_pretrained(folder, selected_adapters=[next(iter(model.peft_config))], **given)
        else:
            model.save_pretrained(folder, **given)
        self.codec(spec.model).tokenizer.save_pretrained(folder)

    def _again(self, module: Any, spec: LoadSpec, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """A module like one whose parameters are spread, with its weights."""
        base = load_model(attrs.evolve(spec, device="cpu"), None, 1)
        again: nn.Module = PeftModel(base, module.peft_config[module.active_adapter], module.active_adapter)
        again.load_state_dict(weights)
        return again

    @classmethod
    def export(cls, spec: LoadSpec, folder: Path, dtype: torch.dtype | None) -> Mapping[str, Any]:
        return export(spec, folder, dtype)


def with_ties(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by name, of which those that the module has under several names are one tensor again."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: weights[names.get(name, name)] for name in weights}
