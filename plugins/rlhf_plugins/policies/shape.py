"""What a transformers model computes and reads: counted from its parameters and config, for the floor of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf.api import AttentionShape, ModelShape
from rlhf_plugins.policies.trunk import Trunk


def shape_of(module: nn.Module) -> ModelShape:
    """Of a model alone or inside adapters."""
    trunk = Trunk(module)
    config = trunk.model.config.get_text_config()
    head = trunk.model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    dtype = trunk.traits.compute or trunk.model.dtype
    weights = trained = 0.0
    for parameter, count in _matrices(trunk.model, config, head):
        weights += count
        trained += count if parameter.requires_grad else 0
    in_head = 0 if head_weight is None else head_weight.numel()
    return ModelShape(
        trunk=round(weights),
        trunk_trained=round(trained),
        head=in_head,
        head_trained=in_head if head_weight is not None and head_weight.requires_grad else 0,
        attention=tuple(_attention(config)),
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=(weights + in_head) * torch.finfo(dtype).bits / 8,
    )


def _matrices(model: nn.Module, config: Any, head: Any) -> Iterator[tuple[nn.Parameter, float]]:
    """(a parameter that tokens are multiplied by, how many of its weights a token goes through)."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    for name, part in model.named_modules():
        if part is head or isinstance(part, nn.Embedding) or name.split(".")[0] == "score":
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.ndim < 2 or own.endswith("bias"):
                continue
            # a quantised weight is packed: its module still tells the matrix that it stands for
            packed = not parameter.is_floating_point() and hasattr(part, "in_features")
            count = part.in_features * part.out_features if packed else parameter.numel()
            of_expert = (parameter.ndim == 3 and parameter.shape[0] == experts) or ".experts." in f".{name}."
            yield parameter, float(count) * (share if of_expert else 1.0)


def _attention(config: Any) -> Iterator[AttentionShape]:
    """Layers alike in their window, together."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * size * (getattr(config, "num_key_value_heads", None) or heads)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windows = (
        [window if kind == "sliding_attention" else None for kind in kinds]
        if kinds
        else [window] * (config.num_hidden_layers)
    )
    for found in dict.fromkeys(windows):
        layers = windows.count(found)
        yield AttentionShape(width=layers * heads * size, cached=layers * cached, window=found)
