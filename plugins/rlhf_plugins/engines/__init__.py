"""The first-party rollout engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from rlhf.api import (
    EngineEntry,
    ForwardBatch,
    ModuleMemory,
    Plan,
    PlannedComponent,
    hookimpl,
    option,
    transformer,
)
from rlhf_plugins.engines.endpoint.entry import OPENAI
from rlhf_plugins.engines.rules import room_to_answer
from rlhf_plugins.engines.vllm.entry import VLLM


@attrs.frozen(kw_only=True)
class HFEngineConfig:
    """Options of `--engine hf`."""

    max_new_tokens: int = option(256, help="the longest response, its end token included", unit="tokens", ge=1)
    temperature: float = option(1.0, help="divides the logits; 0 is greedy", ge=0)
    top_p: float = option(1.0, help="sample from the fewest tokens whose probabilities add up to this", gt=0, le=1)
    top_k: int = option(0, help="sample from so many of the likeliest tokens; 0 from all", ge=0)
    stop: tuple[str, ...] = option((), help="texts that end a response; they are kept in it")
    max_batch: int = option(
        64, help="sequences decoded at once; the next prompts enter as others end", unit="sequences", ge=1
    )


def _footprint(
    module: ModuleMemory, batch: ForwardBatch, plan: Plan, component: PlannedComponent
) -> Mapping[str, float]:
    """A slot for each sequence that is decoded at once, as long as the longest and 64 columns more; its prompt's keys
    and values once again while they are computed; logits of the newest tokens, in 24 bytes each while one is drawn."""
    a = module.architecture
    slots = min(component.config.max_batch, batch.rows)
    number = max(module.stream, module.compute) + module.compute  # rotary positions leave keys as wide as the stream
    column = a.layers * a.key_heads * a.head_size * number
    prompts = -(-slots // batch.group)
    prefill = attrs.evolve(batch, rows=prompts, response=0)
    work = transformer(module, prefill)
    return {
        "KV cache": slots * column * (batch.prompt + batch.response + 64) + prompts * column * batch.prompt,
        "activations": work.working,
        "logits": max(0.0, slots * a.vocabulary * 24.0 - work.working),
        "gathered weights": sum(weight.bytes for weight in module.weights) * (1 - 1 / module.over("weights")),
    }


@hookimpl
def rlhf_engines() -> Iterable[EngineEntry]:
    """Sampling from the trainer's own module, by vLLM, and from somebody else's endpoint."""
    yield EngineEntry(
        name="hf",
        summary="samples from the trainer's own module, in its process; nothing to sync, exact log-probs in fp32",
        config=HFEngineConfig,
        impl="rlhf_plugins.engines.hf:HFEngine",
        provides={"rollouts", "logprobs", "on-policy"},
        footprint=_footprint,
        eases=("max_batch",),
        constraints=(room_to_answer,),
        rank=10,
    )
    yield VLLM
    yield OPENAI
