"""The first-party rollout engines."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import EngineEntry, hookimpl, option


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


@hookimpl
def rlhf_engines() -> Iterable[EngineEntry]:
    """Sampling in the trainer's own process."""
    yield EngineEntry(
        name="hf",
        summary="samples from the trainer's own module, in its process; nothing to sync, exact log-probs in fp32",
        config=HFEngineConfig,
        impl="rlhf_plugins.engines.hf:HFEngine",
        provides={"rollouts", "logprobs"},
        rank=10,
    )
