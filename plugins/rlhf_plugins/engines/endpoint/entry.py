"""What `--engine openai` offers, and when it fits a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from rlhf.api import EngineEntry, ForwardBatch, ModuleMemory, Plan, PlannedComponent, Problem, option
from rlhf_plugins.engines.rules import room_to_answer


@attrs.frozen(kw_only=True)
class EndpointConfig:
    """Options of `--engine openai`."""

    url: str = option(help="of the endpoint, without /completions: https://HOST/v1")
    model: str = option(help="its name there")
    token_env: str = option("OPENAI_API_KEY", help="environment variable with the token; not set, none is sent")
    max_new_tokens: int = option(256, help="the longest response, by the endpoint's count", unit="tokens", ge=1)
    temperature: float = option(1.0, help="divides the logits; 0 is greedy", ge=0)
    top_p: float = option(1.0, help="sample from the fewest tokens whose probabilities add up to this", gt=0, le=1)
    stop: tuple[str, ...] = option((), help="texts that end a response; endpoints leave them out of it")
    concurrency: int = option(8, help="requests under way at once, of each rank", ge=1)
    timeout: float = option(120.0, help="a response is there by then, or is asked for again", unit="seconds", gt=0)
    retries: int = option(
        4, help="how often a response is asked for again, each time after twice as long; then it has failed", ge=0
    )


def _nothing_held_out(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """Rewards before and after would both be of the endpoint's model."""
    if plan.run.eval_rows:
        what = f"--engine {component.name}: held-out rewards would be those of the endpoint's model, not of the policy"
        yield Problem(what, "--eval-rows 0")


def _notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    yield f"--engine {component.name}: samples are of {component.config.model} at the endpoint, which never changes"


def _footprint(
    module: ModuleMemory, batch: ForwardBatch, plan: Plan, component: PlannedComponent
) -> Mapping[str, float]:
    """Nothing on this machine."""
    return {}


OPENAI = EngineEntry(
    name="openai",
    summary="samples from an OpenAI-compatible endpoint: another model, which never changes; no log-probs",
    config=EndpointConfig,
    impl="rlhf_plugins.engines.endpoint.engine:Endpoint",
    provides={"rollouts"},
    footprint=_footprint,
    constraints=(room_to_answer, _nothing_held_out),
    notes=(_notes,),
)
