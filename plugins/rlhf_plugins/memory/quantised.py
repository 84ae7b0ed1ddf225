"""Linear weights in 4 or 8 bits, by bitsandbytes. They are frozen: what is trained are adapters on them (QLoRA,
Dettmers et al. 2023, arXiv:2305.14314). Embeddings, norms and heads keep the precision of the run.

nf4 keeps, for each block of 64 weights, 64 x 4 bits and their largest magnitude; with double quantisation the latter
takes 8 bits and a float32 for every 256 blocks: 4.127 bits a weight. int8 keeps 8 bits a weight and a float32 a row.

A matrix product is by the weights unpacked to the precision of products, and so is its gradient. For int8 that holds
on a CPU; a GPU multiplies in int8 and rounds each input row to 8 bits first, but for columns beyond `threshold`
(LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339).

What bitsandbytes 0.50.2 does on a CPU to modules in evaluation mode, and ours are never in another, is turned off:
with AVX512-BF16 it repacks 4-bit weights at the first forward without gradient, for a kernel that has no backward (the
gradient of every layer below would be lost, without an error) and computes in bfloat16 whatever was asked for; and it
rounds what comes into int8 weights. What can't be turned off is refused: from 0.49 on it unpacks 4-bit weights
wrongly on a CPU where a row is no multiple of 64 (`rules.whole_blocks` knows it before anything is loaded).
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import attrs
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import BitsAndBytesConfig

from rlhf.api import LoadSpec, MemoryStrategy, Problem, RequestError

# At every product of a GPU, that an input is cast to float16: how LLM.int8() works, and nothing to be done about it.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class FourBit(MemoryStrategy):
    """See the module."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        def check(module: nn.Module) -> None:
            wrong = [name for name, part in module.named_modules() if not unpacks_right(part)]
            if wrong:
                version, size = bitsandbytes.__version__, module.get_submodule(wrong[0]).in_features
                what = f"--mem 4bit: bitsandbytes {version} unpacks rows of {size} weights wrongly here"
                fix = f"give the role {spec.role} --mem 8bit"
                raise RequestError(Problem(f"{what} ({wrong[0]} of {spec.model})", fix))

        quantised = _quantised(
            spec,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.config.quant_type,
            bnb_4bit_use_double_quant=self.config.double_quant,
            bnb_4bit_compute_dtype=spec.compute or spec.weights,
        )
        return attrs.evolve(quantised, loaded=(*quantised.loaded, check))


class EightBit(MemoryStrategy):
    """See the module."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        return _quantised(spec, load_in_8bit=True, llm_int8_threshold=self.config.threshold)


def _quantised(spec: LoadSpec, **config: Any) -> LoadSpec:
    arguments = {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": torch.device(spec.device)}}
    return attrs.evolve(spec, arguments={**spec.arguments, **arguments}, loaded=(*spec.loaded, by_plain_products))


def by_plain_products(module: nn.Module) -> None:
    """Turn off what a CPU would do to modules in evaluation mode."""
    for part in module.modules():
        if isinstance(part, bitsandbytes.nn.Linear4bit):
            part.support_avx512bf16_for_cpu = False
        elif type(part) is bitsandbytes.nn.Linear8bitLt:
            part.__class__ = PlainLinear8bit
            part.train()


class PlainLinear8bit(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
    """int8 weights whose products don't depend on the module's mode. Nothing in it is random, so that the mode has no
    other meaning."""

    def train(self, mode: bool = True) -> PlainLinear8bit:
        super().train(True)
        return self


def unpacks_right(part: nn.Module) -> bool:
    """Whether a 4-bit weight is unpacked by rows as it is when seen as a single row. Any other module does."""
    if not isinstance(part, bitsandbytes.nn.Linear4bit) or part.in_features % 64 == 0:
        return True
    state = copy.copy(part.weight.quant_state)
    rows = dequantize_4bit(part.weight.data, state)
    state.shape = torch.Size((1, rows.numel()))
    return torch.equal(dequantize_4bit(part.weight.data, state).flatten(), rows.flatten())
