"""Causal language models of transformers: loading, scoring ragged sequences, saving."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.api import HeadRequest, LoadSpec, Policy, Problem, RequestError, RunError, Scores, Sequences
from rlhf_plugins.policies.codec import HFCodec
from rlhf_plugins.policies.heads import init_scalar_head, scalars, token_logps
from rlhf_plugins.policies.trunk import Trunk, base_of, examine

_LM_HEADS = ("lm_head.", "embed_out.")
"""Weights that a language model has and its scalar-headed sibling has not."""


class HFPolicy(Policy):
    """Any causal language model of transformers, alone or inside PEFT adapters."""

    def codec(self, model: str) -> HFCodec:
        return HFCodec(model, self.config, self.context.plan.run.trust_remote_code)

    def load(self, spec: LoadSpec) -> nn.Module:
        """A `PreTrainedModel`; of an adapter's folder, its base with the adapter merged.

        Raises:
            RequestError: there is no such model, or its weights aren't all those of the head asked for.
        """
        adapter = _adapter(spec)
        with torch.random.fork_rng():  # transformers draws for weights that are missing; the run's own RNG stays put
            torch.manual_seed(spec.seed)
            model, missing, unexpected = _load(spec, adapter.base_model_name_or_path if adapter else spec.model)
        if spec.head == "scalar":
            missing = _start_head(model, spec, missing, brought=bool(adapter) and _adapter_has_head(spec.model))
            unexpected = {name for name in unexpected if not name.startswith(_LM_HEADS)}
        if missing or unexpected:
            parts = [f"lacks {_names(missing)}"] if missing else []
            parts += [f"has {_names(unexpected)}, which a {type(model).__name__} hasn't"] if unexpected else []
            fix = "its config.json names another architecture than its weights; nothing is left out or made up"
            raise RequestError(Problem(f"--model {spec.model}: {' and '.join(parts)}", fix))
        if adapter:
            model = _merged(model, spec)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(spec.trainable)
        model.eval()
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            examine(model, spec.compute, spec.head == "lm")
        return model

    def add_scalar_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        if init == "keep":
            fix = f"give it a checkpoint that has one: --model {role}=PATH"
            raise RequestError(Problem(f"role {role!r} shares a trunk, and there is no head to keep", fix))
        trunk = Trunk(module)
        head = nn.Linear(int(trunk.model.config.get_text_config().hidden_size), 1)
        init_scalar_head(head, init, seed)
        return head.to(trunk.device)

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        """See `rlhf.api.Policy`. On the module's device; float32.

        Raises:
            RunError: log-probs at temperature 0, which are not defined.
        """
        trunk = Trunk(module)
        trunk.prepare()
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

    def save(self, module: nn.Module, folder: Path, spec: LoadSpec) -> None:
        """A PEFT folder where the module has adapters, else a whole model; safetensors, in the weights' own type.

        Where the model was itself started from an adapter, its adapters are merged: a PEFT folder can name only one
        base, and that isn't it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = module
        if hasattr(module, "get_base_model") and _adapter(spec):
            model = copy.deepcopy(module).merge_and_unload()  # type: ignore[operator]
        model.save_pretrained(folder)
        self.codec(spec.model).tokenizer.save_pretrained(folder)


def _adapter(spec: LoadSpec) -> Any:
    """The PEFT config of an adapter's folder or repository, or None."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(spec.model)
    except (ValueError, OSError):
        return None


def _adapter_has_head(folder: str) -> bool:
    from peft.utils import load_peft_weights

    return any(".score." in name for name in load_peft_weights(folder, device="cpu"))


def _load(spec: LoadSpec, model: str) -> tuple[Any, set[str], set[str]]:
    """(the model on its device, names of missing weights, names of unexpected ones)."""
    auto: Any = AutoModelForCausalLM if spec.head == "lm" else AutoModelForSequenceClassification
    arguments: dict[str, Any] = {
        "dtype": spec.weights,
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": True,  # never unpickle
        "output_loading_info": True,
        **({"num_labels": 1} if spec.head == "scalar" else {}),
        **spec.arguments,
    }
    try:
        found, info = auto.from_pretrained(model, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        what = f"--model {spec.model}: can't be loaded: {str(error).strip().splitlines()[0]}"
        raise RequestError(
            Problem(what, "give a folder or hub id of a causal language model in safetensors")
        ) from error
    if not any(hasattr(parameter, "ds_id") for parameter in found.parameters()) and "device_map" not in arguments:
        found = found.to(spec.device)
    return found, set(info["missing_keys"]), set(info["unexpected_keys"])


def _start_head(model: Any, spec: LoadSpec, missing: set[str], brought: bool) -> set[str]:
    """Start a scalar head that the checkpoint hasn't; returns what else is missing."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        what = f"--model {spec.model}: {type(model).__name__} has no scalar head on its last token"
        raise RequestError(Problem(what, "give a causal language model, or a reward model made from one"))
    names = {f"score.{name}" for name, _ in head.named_parameters()}
    if names & missing and not brought:
        if spec.head_init == "keep":
            raise RequestError(
                Problem(
                    f"--model {spec.role}={spec.model}: the checkpoint has no scalar head, and role {spec.role!r} needs "
                    "a trained one",
                    f"give a reward model: --model {spec.role}=PATH (rlhf run --algo reward-model makes one)",
                )
            )
        init_scalar_head(head, spec.head_init, spec.seed)
    return missing - names


def _merged(model: Any, spec: LoadSpec) -> PreTrainedModel:
    from peft import PeftModel

    if "quantization_config" in spec.arguments:
        what = f"--model {spec.model}: is an adapter, and merging it into quantised weights would round it away"
        raise RequestError(Problem(what, f"merge it first: rlhf export {spec.model}"))
    return base_of(PeftModel.from_pretrained(model, spec.model).merge_and_unload())


def _names(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
