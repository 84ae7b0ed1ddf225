"""The manifest of the algorithms that learn from their own samples as if those were data; no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from rlhf.api import POLICY, AlgorithmEntry, Follows, Passes, Plan, PlannedComponent, Problem, PromptRow, Role, option
from rlhf_plugins.algorithms.preferences import DPOConfig


@attrs.frozen(kw_only=True)
class BestOfNConfig:
    """Options of `best-of-n`."""

    group_size: int = option(8, help="responses to each prompt", ge=2)
    keep: int = option(1, help="of them learnt, the best", ge=1)
    threshold: float | None = option(
        None, help="responses with less reward than this aren't learnt, though they be the best", unit="reward"
    )
    keep_flat: bool = option(
        False, help="learn from groups whose rewards are all equal too, as RAFT does: none is better than another",
        source="RAFT, Dong et al. 2023",
    )  # fmt: skip
    epochs: int = option(1, help="passes over each batch of responses", ge=1)
    minibatches: int = option(1, help="optimiser steps a pass", ge=1)

    def __attrs_post_init__(self) -> None:
        if self.keep >= self.group_size:
            raise ValueError(f"keep {self.keep} of {self.group_size} leaves none out: give less than group_size")


@attrs.frozen(kw_only=True)
class OnlineDPOConfig(DPOConfig):
    """Options of `online-dpo`."""

    group_size: int = option(
        2, help="responses to each prompt; of more than two the best and the worst are the pair", ge=2
    )
    renew_every: int = option(
        0, help="the reference becomes the policy as it is, after so many optimiser steps; 0: it stays", unit="steps",
        ge=0,
    )  # fmt: skip
    epochs: int = option(1, help="passes over each batch of pairs", ge=1)
    minibatches: int = option(1, help="optimiser steps a pass", ge=1)


def online_dpo_roles(config: OnlineDPOConfig) -> tuple[Role, ...]:
    """The policy, and the reference, which is renewed where that is asked for."""
    follows = Follows("policy", every=config.renew_every) if config.renew_every else None
    return (POLICY, Role("reference", start="policy", follows=follows))


def _responses_differ(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """Greedy responses to a prompt are all the same one."""
    if plan.engine is not None and getattr(plan.engine.config, "temperature", 1.0) == 0:
        what = f"--engine.temperature 0: {component} compares responses to a prompt, and greedy ones are all the same"
        yield Problem(what, "give a temperature above 0; held-out sampling has --eval-temperature 0")


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield AlgorithmEntry(
        name="best-of-n",
        summary="rejection-sampling fine-tuning (RAFT): the best of several responses is learnt as data",
        config=BestOfNConfig,
        impl="rlhf_plugins.algorithms.best_of_n:BestOfN",
        data=PromptRow,
        requires={"rollouts"},
        constraints=(_responses_differ,),
        footprint=lambda config: Passes(responses=config.group_size, epochs=config.epochs, scored=()),
        defaults={"optim.learning_rate": 1e-5, "batch_size": 64},
    )
    yield AlgorithmEntry(
        name="online-dpo",
        summary="DPO on the policy's own responses: the reward says which of a pair is the better",
        config=OnlineDPOConfig,
        impl="rlhf_plugins.algorithms.online_dpo:OnlineDPO",
        data=PromptRow,
        roles=online_dpo_roles,
        requires={"rollouts"},
        constraints=(_responses_differ,),
        footprint=lambda config: Passes(
            responses=config.group_size, grouped=True, epochs=config.epochs, scored=("reference",)
        ),
        defaults={"optim.learning_rate": 1e-6, "batch_size": 64},
    )
