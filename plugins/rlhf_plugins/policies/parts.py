"""A role's own part of a module that several share: its scalar head, and the folder that it is saved as.

The folder is a PEFT one of the base, with the head among its weights, as if the role had been trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from rlhf.api import LoadSpec, Problem, RequestError
from rlhf_plugins.policies.heads import init_scalar_head
from rlhf_plugins.policies.loading import adapter_config, adapter_weights
from rlhf_plugins.policies.trunk import Trunk

_HEAD = "base_model.model.score.weight"
"""Where PEFT saves the head of a sequence classifier."""


def own_head(module: nn.Module, spec: LoadSpec) -> nn.Linear:
    """See `rlhf.api.Policy.own_head`. Without a bias and in float32, as a sequence classifier's is."""
    trunk = Trunk(module)
    head = nn.Linear(int(trunk.model.config.get_text_config().hidden_size), 1, bias=False)
    saved = adapter_weights(spec.model).get(_HEAD) if adapter_config(spec.model) is not None else None
    if saved is not None:
        with torch.no_grad():
            head.weight.copy_(saved)
    elif spec.head_init == "keep":
        what = f"--model {spec.role}={spec.model}: holds no scalar head, and role {spec.role!r} keeps one"
        raise RequestError(Problem(what, f"give a model that was trained with one: --model {spec.role}=PATH"))
    else:
        init_scalar_head(head, spec.head_init, spec.seed)
    return head.to(trunk.device)


def save_part(
    module: nn.Module,
    folder: Path,
    spec: LoadSpec,
    head: nn.Module | None,
    whole: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapters that joined under `spec.role`, and the head. whole: see `rlhf.api.Policy.save`'s `weights`."""
    shared: Any = module
    config: Any = shared.peft_config[spec.role]
    weights = {k: w.contiguous() for k, w in get_peft_model_state_dict(module, whole, adapter_name=spec.role).items()}
    task, kept = (config.task_type, config.modules_to_save)
    if head is not None:
        weights[_HEAD] = next(head.parameters()).detach().cpu()
        config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier", "score"]
    config.inference_mode = True
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = task, kept, False
