"""Algorithms: each one file, each option one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from rlhf.api import (
    POLICY,
    AlgorithmEntry,
    CompletionRow,
    Passes,
    Plan,
    PlannedComponent,
    PreferenceRow,
    Problem,
    PromptRow,
    Role,
    hookimpl,
    option,
)
from rlhf_plugins.algorithms import distillation, offline_rl, preferences, processes, samples, without_critic


@attrs.frozen(kw_only=True)
class SFTConfig:
    """Options of `sft`."""

    packing: bool = option(False, help="join rows up to pack_length tokens to one item of a batch, best fit decreasing")
    pack_length: int = option(
        1024, help="tokens of a packed item; a longer row is an item of its own", unit="tokens", ge=2
    )
    loss_on: str = option("responses", help="which tokens are learnt", choices=("responses", "all"))


@attrs.frozen(kw_only=True)
class RewardConfig:
    """Options of `reward`."""

    centre_coef: float = option(
        0.0, help="weight of the mean squared sum of a pair's scores, which centres them on 0",
        source="Eisenstein et al. 2023", ge=0,
    )  # fmt: skip
    use_margin: bool = option(
        True, help="subtract a row's `margin` from the difference of scores", source="Llama 2, eq. 2"
    )


@attrs.frozen(kw_only=True)
class PPOConfig:
    """Options of `ppo`."""

    epochs: int = option(4, help="passes over each batch of rollouts", ge=1)
    minibatches: int = option(1, help="optimiser steps a pass", ge=1)
    clip_range: float = option(0.2, help="how far the ratio may pull a token", source="PPO, eq. 7", gt=0, le=1)
    value_clip_range: float | None = option(0.2, help="how far a value may move from its old one; none: free", gt=0)
    value_coef: float = option(0.1, help="weight of the value loss", ge=0)
    entropy_coef: float = option(
        0.0, help="weight of the entropy bonus; above 0 costs one more reduction a token", ge=0
    )
    gamma: float = option(1.0, help="discount a token", gt=0, le=1)
    lam: float = option(0.95, help="lambda of GAE: 1 is Monte Carlo, 0 one-step", source="Schulman 2016", ge=0, le=1)
    kl_coef: float = option(0.05, help="weight of the KL to the reference in each token's reward; 0 needs no reference",
                            ge=0)  # fmt: skip
    kl_estimator: str = option("k1", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))
    kl_control: str = option("fixed", help="whether kl_coef adapts to kl_target", choices=("fixed", "adaptive"))
    kl_target: float = option(6.0, help="where adaptive control holds the KL of a response", unit="nats", gt=0)
    kl_horizon: int = option(10_000, help="responses over which adaptive control acts", source="Ziegler 2019", ge=1)
    target_kl: float | None = option(
        None, help="leave a batch's rest out once the approximate KL to the sampling policy passes 1.5 x this",
        unit="nats a token", gt=0,
    )  # fmt: skip
    whiten_advantages: bool = option(True, help="advantages to mean 0 and variance 1 over the whole batch")
    whiten_rewards: bool = option(False, help="rewards to variance 1 over the whole batch, their mean kept")
    missing_eos: str = option("replace", help="a response cut at the length limit: its score is replaced by, or loses, "
                              "missing_eos_value", choices=("replace", "subtract", "none"))  # fmt: skip
    missing_eos_value: float | None = option(None, help="left out: -1 to replace by, 1 to subtract", unit="reward")
    length_threshold: int | None = option(None, help="responses longer than this lose score", unit="tokens", ge=0)
    length_penalty: float = option(0.01, help="score lost a token beyond length_threshold", unit="reward a token", ge=0)
    reward_clip: float | None = option(None, help="scores are clipped to plus and minus this", unit="reward", gt=0)
    normalise_rewards: bool = option(False, help="divide scores by their running standard deviation")
    value_model: str = option("separate", help="value head on its own copy of the model, or on the policy's trunk",
                              choices=("separate", "shared"))  # fmt: skip
    value_learning_rate: float | None = option(None, help="of the value model; left out, the policy's", gt=0)
    critic_warmup: int = option(0, help="steps at the start in which only the value model learns", unit="steps", ge=0)

    def __attrs_post_init__(self) -> None:
        if self.kl_control == "adaptive" and self.kl_coef == 0:
            raise ValueError("kl_control adaptive needs a kl_coef above 0 to start from")
        if self.critic_warmup and self.value_model == "shared":
            raise ValueError("critic_warmup needs value_model separate: on a shared trunk the policy would learn too")
        if self.missing_eos == "subtract" and (self.missing_eos_value or 0) < 0:
            raise ValueError("missing_eos_value is subtracted, so it must be >= 0")


def ppo_roles(config: PPOConfig) -> tuple[Role, ...]:
    """Policy and value; a reference where the KL has weight."""
    value = Role(
        "value",
        trainable=True,
        head="scalar",
        start="policy",
        shares="policy" if config.value_model == "shared" else None,
        learning_rate=config.value_learning_rate,
        head_init="zero",
    )
    reference = (Role("reference", start="policy"),) if config.kl_coef > 0 else ()
    return (POLICY, *reference, value)


def _adaptive_kl_is_stable(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """The update multiplies by 1 - .2 n / horizon at the least, which must stay above 0."""
    config, n = component.config, plan.run.batch_size
    if config.kl_control == "adaptive" and n >= 5 * config.kl_horizon:
        what = f"--algo.kl-horizon {config.kl_horizon}: with {n} responses a step the KL coefficient could fall below 0"
        yield Problem(what, f"give more than {n // 5}; the usual is 10000")


@hookimpl
def rlhf_algorithms() -> Iterable[Any]:
    yield AlgorithmEntry(
        name="ppo",
        summary="PPO with GAE, per-token KL reward, clipped policy and value losses",
        config=PPOConfig,
        impl="rlhf_plugins.algorithms.ppo:PPO",
        data=PromptRow,
        roles=ppo_roles,
        constraints=(_adaptive_kl_is_stable,),
        requires={"rollouts", "logprobs"},
        footprint=lambda config: Passes(epochs=config.epochs, entropy=config.entropy_coef > 0),
        defaults={"optim.learning_rate": 3e-6, "batch_size": 64},
        rank=10,
    )
    yield AlgorithmEntry(
        name="sft",
        summary="supervised fine-tuning on completions or chats",
        config=SFTConfig,
        impl="rlhf_plugins.algorithms.sft:SFT",
        footprint=lambda config: Passes(),
        data=CompletionRow,
        defaults={"optim.learning_rate": 2e-5, "batch_size": 32},
    )
    yield AlgorithmEntry(
        name="reward",
        summary="a reward model from preference pairs (Bradley-Terry)",
        config=RewardConfig,
        impl="rlhf_plugins.algorithms.reward:RewardModelling",
        data=PreferenceRow,
        roles=(Role("reward", trainable=True, head="scalar", head_init="normal"),),
        footprint=lambda config: Passes(responses=2, grouped=True),
        defaults={"optim.learning_rate": 1e-5, "batch_size": 32},
    )
    yield from preferences.entries()
    yield from without_critic.entries()
    yield from samples.entries()
    yield from distillation.entries()
    yield from processes.entries()
    yield from offline_rl.entries()
