"""The manifest of the algorithms without a critic: options and entries; no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf.api import (
    POLICY,
    AlgorithmEntry,
    Passes,
    Plan,
    PlannedComponent,
    Problem,
    PromptRow,
    Role,
)
from rlhf_plugins.algorithms.without_critic_options import (
    CISPOConfig,
    DAPOConfig,
    DPPOConfig,
    DrGRPOConfig,
    GFPOConfig,
    GRPOConfig,
    GSPOConfig,
    LUSPOConfig,
    RegularisedConfig,
    ReinforceBaselineConfig,
    ReinforceConfig,
    RemaxConfig,
    RLOOConfig,
    SAPOConfig,
    VESPOConfig,
)


def roles_of(config: RegularisedConfig) -> tuple[Role, ...]:
    """The policy; a reference where the KL has weight."""
    return (POLICY, Role("reference", start="policy")) if config.kl_coef > 0 else (POLICY,)


def passes_of(config: RegularisedConfig) -> Passes:
    """What a step takes: a group a prompt where there are groups."""
    size = getattr(config, "group_size", 1)
    return Passes(responses=size, epochs=config.epochs, entropy=config.entropy_coef > 0)


def _length_is_known(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """Where a limit of the responses' length is counted with, somebody must say it."""
    config, engine = component.config, plan.engine
    buffer = config.overlong_buffer
    uses = ["mean constant"] if getattr(config, "mean", "") == "constant" else []
    uses += [] if buffer == 0 else ["the overlong punishment"]
    longest = int(config.max_length or getattr(engine.config if engine else None, "max_new_tokens", None) or 0)
    if uses and not longest:
        what = f"{component}: {' and '.join(uses)} goes by the longest response, and {engine} has no max_new_tokens"
        yield Problem(what, "give --algo.max-length")
    elif buffer and buffer > longest:
        what = f"--algo.overlong-buffer {buffer} is more than the longest response of {longest} tokens"
        yield Problem(what, f"at most {longest}; the field takes a fifth, {max(1, longest // 5)}")


def _rounds(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    """What dynamic sampling may cost, since a plan counts one round."""
    rounds = component.config.sampling_rounds
    if rounds > 1:
        what = "groups whose rewards are all equal are replaced by those of further prompts"
        yield f"--algo.sampling-rounds {rounds}: {what}, so a step samples up to {rounds} times what is counted here"


def _entry(name: str, summary: str, config: type, impl: str, **more: Any) -> AlgorithmEntry:
    """What all of them have alike."""
    given: dict[str, Any] = {
        "data": PromptRow,
        "roles": roles_of,
        "requires": {"rollouts", "logprobs"},
        "footprint": passes_of,
        "defaults": {"optim.learning_rate": 1e-6, "batch_size": 32},
        **more,
    }
    return AlgorithmEntry(name=name, summary=summary, config=config, impl=f"rlhf_plugins.algorithms.{impl}", **given)


def _group_entry(name: str, summary: str, config: type, impl: str) -> AlgorithmEntry:
    """What those that compare a group have alike."""
    return _entry(name, summary, config, impl, constraints=(_length_is_known,), notes=(_rounds,))


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield _group_entry(
        "grpo",
        "GRPO: a group's rewards, less their mean and by their deviation; clipped ratios",
        GRPOConfig,
        "grpo:GRPO",
    )
    yield _group_entry(
        "dr-grpo",
        "GRPO done right: nothing divided by a group's deviation or a response's length",
        DrGRPOConfig,
        "grpo:GRPO",
    )
    yield _group_entry(
        "dapo",
        "GRPO with a higher clip, token means, prompts in place of those that teach nothing, and a limit told softly",
        DAPOConfig,
        "dapo:DAPO",
    )
    yield _entry("rloo", "REINFORCE leave-one-out: each against the others of its group", RLOOConfig, "rloo:RLOO")
    yield _entry(
        "reinforce++",
        "REINFORCE with token-level KL in the reward, whitened over the batch; one response a prompt",
        ReinforceConfig,
        "reinforce:Reinforce",
        defaults={"optim.learning_rate": 1e-6, "batch_size": 128},
    )
    yield _entry(
        "reinforce++-baseline",
        "REINFORCE++ on scores less their group's mean, the KL in the loss",
        ReinforceBaselineConfig,
        "reinforce:Reinforce",
    )
    yield _entry(
        "remax",
        "REINFORCE whose baseline is the greedy response's reward",
        RemaxConfig,
        "remax:Remax",
        defaults={"optim.learning_rate": 1e-6, "batch_size": 128},
        footprint=lambda config: Passes(epochs=config.epochs, entropy=config.entropy_coef > 0),
    )
    yield _group_entry("gspo", "GRPO with one ratio, and its clip, for a whole response", GSPOConfig, "gspo:GSPO")
    yield _group_entry("luspo", "GSPO that doesn't weigh long responses less", LUSPOConfig, "gspo:GSPO")
    summary = "GRPO that clips the weight of a token and keeps its gradient"
    yield _group_entry("cispo", summary, CISPOConfig, "cispo:CISPO")
    yield _group_entry("sapo", "GRPO with a smooth gate in place of the clip", SAPOConfig, "sapo:SAPO")
    summary = "GRPO on some of a larger group: the shortest, or the best for their length"
    yield _group_entry("gfpo", summary, GFPOConfig, "gfpo:GFPO")
    summary = "GRPO with a smooth weight of a whole response's ratio in place of the clip"
    yield _group_entry("vespo", summary, VESPOConfig, "vespo:VESPO")
    summary = "GRPO that bounds how far a token's distribution moves, not its ratio"
    yield _group_entry("dppo", summary, DPPOConfig, "dppo:DPPO")
