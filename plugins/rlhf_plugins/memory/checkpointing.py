"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): of each layer only the input is kept, and the backward
computes the rest again. Costs one more forward; gradients are the same.

Not through transformers' own switch: that one acts in training mode alone, and modules here are kept in evaluation
mode, so that nothing is random.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.api import LoadSpec, MemoryStrategy, Problem, RequestError
from rlhf_plugins.memory.adapters import again, chosen


class Checkpointing(MemoryStrategy):
    """See the module."""

    def wrap(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """Make each layer recompute, in place.

        Raises:
            RequestError: transformers marks none of the model's modules as a layer that may be computed twice.
        """
        layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            what = f"--mem checkpointing: transformers can't checkpoint the layers of a {type(module).__name__}"
            raise RequestError(Problem(what, f"leave it out for the role {spec.role}"))
        # By class and not by a wrapped `forward`, which a copy of the module would share with the original; under the
        # same name, by which layers are found to be sharded.
        how = OnHost if self.config.offload else Recomputing
        kinds = {kind: type(kind.__name__, (how, kind), {}) for kind in {type(layer) for layer in layers}}
        for layer in layers:
            layer.__class__ = kinds[type(layer)]
        return module


class Recomputing(nn.Module):
    """A layer that keeps its inputs alone where a gradient will be asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Without a gradient nothing is kept anyway; and a cache would be written again by the second forward.
        if not torch.is_grad_enabled() or any(isinstance(x, Cache) for x in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        forward, choice = super().forward, chosen(self)

        def as_now(*args: Any, **kwargs: Any) -> Any:
            with again(choice):  # by the backward, another role's adapters may be on
                return forward(*args, **kwargs)

        with self.kept():
            return checkpoint(as_now, *args, use_reentrant=False, **kwargs)

    def kept(self) -> contextlib.AbstractContextManager[Any]:
        """Where the inputs are kept: where they are."""
        return contextlib.nullcontext()


class OnHost(Recomputing):
    """The same, its inputs kept in the host's memory. Untested on a GPU, where alone it saves anything."""

    def kept(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
