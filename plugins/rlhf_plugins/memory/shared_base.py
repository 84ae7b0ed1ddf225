"""One base for several roles: each has adapters, and a scalar head, of its own on it.

The policy's module is the base with the policy's adapters; a value model puts its own beside them, a reward model that
was saved as a PEFT folder brings those it was trained with, and a reference is the base with all of them off. So a run
of four roles holds one model and four small parts.

A forward says whose adapters are on (`rlhf_plugins.memory.adapters`). Two roles are two forwards of the base, where a
shared trunk (`--algo.value-model shared`) is one.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import set_peft_model_state_dict
from torch import nn

from rlhf.api import LoadSpec, MemoryStrategy, Problem, RequestError
from rlhf_plugins.memory.lora import cast_by_autocast
from rlhf_plugins.policies.loading import adapter_config, adapter_weights


class SharedBase(MemoryStrategy):
    """See the module."""

    def join(self, module: nn.Module, spec: LoadSpec) -> None:
        """Of a PEFT folder, its adapters. A role that is trained goes on with them as they are, rank and all.

        Raises:
            RequestError: they don't fit the base.
        """
        shared: Any = module
        base = next(iter(shared.peft_config.values())).base_model_name_or_path
        config = adapter_config(spec.model)
        if config is None:
            if spec.model != base:  # of a model on the hub the plan may know no more than its name
                what = f"--model {spec.role}={spec.model}: is a whole model, not adapters of {base}"
                raise RequestError(Problem(what, f"give {spec.role} a module of its own: --mem {spec.role}=..."))
            return
        # As a part of a language model, whatever head it was trained under; the head is the policy's to load.
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, not spec.trainable
        with torch.random.fork_rng():  # what is drawn is overwritten
            shared.add_adapter(spec.role, config)
        weights = {name: w for name, w in adapter_weights(spec.model).items() if not of_head(name)}
        found = set_peft_model_state_dict(module, weights, adapter_name=spec.role)
        missing = [name for name in found.missing_keys if f".{spec.role}." in name]
        if missing or found.unexpected_keys:
            wrong = ", ".join([*missing, *found.unexpected_keys][:3])
            what = f"--model {spec.role}={spec.model}: its adapters aren't those of this base: {wrong}"
            raise RequestError(Problem(what, "give adapters that were trained on it"))
        cast_by_autocast(module, spec)


def of_head(name: str) -> bool:
    """Whether a saved adapter's weight is the scalar head's, not an adapter's."""
    return ".score." in name
