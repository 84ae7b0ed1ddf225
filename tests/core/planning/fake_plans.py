"""Plans of fakes, of a model that is a config.json alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf.api import (
    AlgorithmEntry,
    BackendEntry,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    moments,
    precision,
    unchanged,
)
from rlhf.entries import FormatEntry
from rlhf.planning.memory import Lengths, Memory
from rlhf.registry import Registry
from rlhf.rows import CompletionRow

GIB = 1 << 30
Make = Callable[..., Registry]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128 + 2 * 64
N = 1000 * 64 + 2 * LAYER + 64
LONG = Lengths(prompt=1024, response=1024)


def entries(*more: Any, **algorithm: Any) -> tuple[Any, ...]:
    """Fakes of every kind that a plan needs."""
    return (
        AlgorithmEntry(name="fake-algo", summary="", impl="m:C", rank=1, data=CompletionRow, **algorithm),
        PolicyEntry(name="fake-policy", summary="", impl="m:C", rank=1),
        OptimizerEntry(name="fake-adam", summary="", impl="m:C", rank=1, footprint=moments(4, 4)),
        BackendEntry(name="fake-backend", summary="", impl="m:C", rank=1, footprint=unchanged),
        LauncherEntry(name="fake-launch", summary="", impl="m:C", rank=1),
        FormatEntry(name="fake-format", summary="", impl="m:C", suffixes=(".jsonl",)),
        MemoryEntry(name="fake-fp32", summary="", impl="m:C", phase="load", slot="precision", rank=1,
                    footprint=precision(trained=4, frozen=4, compute=4)),
        *more,
    )  # fmt: skip


def strategy(name: str, footprint: Any, **more: Any) -> MemoryEntry:
    return MemoryEntry(name=name, summary="", impl="m:C", **{"phase": "shard", **more}, footprint=footprint)


def phase(found: Memory, name: str) -> Any:
    return next(p for p in found.phases if p.phase == name)
