"""The first-party rollout engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from rlhf.api import EngineEntry, Plan, PlannedComponent, Problem, hookimpl, option


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


def _known_ratio(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """Truncated sampling draws from another distribution than the policy's, and no ratio to it is known."""
    config = component.config
    if "logprobs" in plan.algo.entry.requires and config.temperature == 0:
        what = f"--engine.temperature 0: {plan.algo.name} needs log-probs of what was sampled, and greedy has none"
        yield Problem(what, "give a temperature above 0; held-out sampling has --eval-temperature 0")
    if "logprobs" in plan.algo.entry.requires and (config.top_p < 1 or config.top_k > 0):
        given = f"--engine.top-p {config.top_p:g}" if config.top_p < 1 else f"--engine.top-k {config.top_k}"
        what = f"{given}: {plan.algo.name} needs log-probs of what was sampled, and truncation changes them unaccounted"
        yield Problem(what, "leave it out; --engine.temperature is accounted for")


def _room_to_answer(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    context = next((role.model.context for role in plan.roles if role.name == "policy"), None)
    tokens = component.config.max_new_tokens
    if context is not None and tokens >= context:
        what = f"--engine.max-new-tokens {tokens}: the model's context is {context} tokens, prompt included"
        yield Problem(what, f"at most {context - 1}, less what the prompts take")


@hookimpl
def rlhf_engines() -> Iterable[EngineEntry]:
    """Sampling in the trainer's own process."""
    yield EngineEntry(
        name="hf",
        summary="samples from the trainer's own module, in its process; nothing to sync, exact log-probs in fp32",
        config=HFEngineConfig,
        impl="rlhf_plugins.engines.hf:HFEngine",
        provides={"rollouts", "logprobs"},
        constraints=(_known_ratio, _room_to_answer),
        rank=10,
    )
