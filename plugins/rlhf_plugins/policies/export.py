"""A saved model as a plain folder: adapters merged into their base, quantised weights unpacked, in one precision.

An adapter is merged into what it was trained on. Where the base was quantised, that is the unpacked weights, not the
ones they were rounded from: so the folder gives the log-probs that the run had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from rlhf.api import LoadSpec
from rlhf_plugins.policies.loading import adapter_config, load_model, quiet


def export(spec: LoadSpec, folder: Path, dtype: torch.dtype | None) -> Mapping[str, Any]:
    """See `rlhf.api.Policy.export`. Merging is in float32, whatever is written."""
    adapter = adapter_config(spec.model)
    quantised = "quantization_config" in spec.arguments
    if not quantised:
        spec = attrs.evolve(spec, weights=torch.float32, compute=None)
    model: Any = load_model(spec, None, 1, unpack=unpacked if quantised else None)
    if quantised and adapter is None:
        model = unpacked(model)
    if dtype is None:
        source = adapter.base_model_name_or_path if adapter else spec.model
        stored = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code).dtype
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    model = model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    tokenizer: Any = None
    with contextlib.suppress(OSError, ValueError):  # a model of token ids may have none
        tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    parameters = list(model.parameters())
    return {
        "architecture": type(model).__name__,
        "weights": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
        "dtype": str(dtype).removeprefix("torch."),
        "merged": adapter is not None,
        "unpacked": quantised,
    }


def unpacked(model: nn.Module) -> nn.Module:
    """The model with ordinary float32 modules in place of quantised ones; what else it has becomes float32 too."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    # Not by the model's own `dequantize`: it leaves GPT-2's matrices transposed.
    for name, part in list(model.named_modules()):
        if isinstance(part, Linear4bit):
            weight = dequantize_4bit(part.weight.data, part.weight.quant_state).float()
        elif isinstance(part, Linear8bitLt):
            scales = part.state.SCB if part.weight.SCB is None else part.weight.SCB
            weight = part.weight.data.float() * (scales / 127)[:, None]
        else:
            continue
        model.set_submodule(name, _plain(part, weight))
    for left in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, left):
            delattr(model, left)
    config: Any = model.config
    for left in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, left):
            delattr(config, left)
    return model.float()


def _plain(part: Any, weight: Tensor) -> nn.Module:
    """weight: [out, in]."""
    rows, columns = weight.shape
    if part.source_cls is Conv1D:
        plain: Any = Conv1D(rows, columns)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(columns, rows, bias=part.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if part.bias is not None:
        plain.bias = nn.Parameter(part.bias.detach().float())
    return plain  # type: ignore[no-any-return]
