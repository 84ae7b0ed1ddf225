"""Train the last layers of a model and freeze what comes before (partial fine-tuning).

The last layers hold the least general of what a model knows (Howard & Ruder 2018, arXiv:1801.06146, who unfreeze from
the last one on). Trained are they, the norm after them and, where there is one, a scalar head. A backward ends where
the first trained layer begins, so what comes before keeps no activations; a plan counts them all the same.

The model is saved whole, as if all of it had been trained; nothing is to be merged.

Left out: unfreezing more of it as training goes on.

    rlhf run --algo sft --mem freeze --mem.freeze.layers 1
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from rlhf.api import LoadSpec, MemoryStrategy, Problem, RequestError
from rlhf_freeze import FreezeConfig

_LAYER = re.compile(r"\.(\d+)\.")


class Freeze(MemoryStrategy):
    """See the module."""

    config: FreezeConfig

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """The module, with `requires_grad` off where nothing is to be trained.

        Raises:
            RequestError: it has no more layers than are to be trained.
        """
        numbers = [int(found[1]) for name, _ in module.named_parameters() if (found := _LAYER.search(name))]
        count = max(numbers, default=-1) + 1
        if self.config.layers >= count:
            what = f"--mem.freeze.layers {self.config.layers}: {spec.model} has {count} layers (role {spec.role})"
            raise RequestError(Problem(what, "give less, or leave --mem freeze out to train them all"))
        parts: Any = module
        heads = {id(p) for p in _parameters(parts.get_output_embeddings())}
        embeddings = {id(p) for p in _parameters(parts.get_input_embeddings())}
        for name, parameter in module.named_parameters():
            found = _LAYER.search(name)
            if id(parameter) in heads:  # asked first: it may be the embedding
                parameter.requires_grad_(self.config.head)
            elif id(parameter) in embeddings or "embed" in name or ".wpe." in name:
                parameter.requires_grad_(False)
            elif found is not None:
                parameter.requires_grad_(int(found[1]) >= count - self.config.layers)
        return module


def _parameters(part: nn.Module | None) -> list[nn.Parameter]:
    return [] if part is None else list(part.parameters())
