"""The manifest of `opmd`; no torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import AlgorithmEntry, Passes, PromptRow, hookimpl, option


@attrs.frozen(kw_only=True)
class OPMDConfig:
    """Options of `opmd`."""

    group_size: int = option(8, help="responses to each prompt", ge=2)
    tau: float = option(
        1.0, help="how strongly the policy is held to the one that sampled", unit="reward units a nat",
        source="Kimi k1.5, section 2.3.2", gt=0,
    )  # fmt: skip
    baseline: str = option(
        "partition", help="what rewards are compared with: tau log Z, estimated from the group, or the group's mean",
        choices=("partition", "mean"),
    )  # fmt: skip
    epochs: int = option(1, help="passes over each batch of rollouts", ge=1)
    minibatches: int = option(4, help="optimiser steps a pass, all held to the policy that sampled", ge=1)


@hookimpl
def rlhf_algorithms() -> Iterable[AlgorithmEntry]:
    yield AlgorithmEntry(
        name="opmd",
        summary="online policy mirror descent: squared error to the KL-regularised optimum, no clip and no critic",
        config=OPMDConfig,
        impl="rlhf_opmd.algorithm:OPMD",
        data=PromptRow,
        requires={"rollouts", "logprobs"},
        footprint=lambda config: Passes(responses=config.group_size, epochs=config.epochs),
        defaults={"optim.learning_rate": 1e-6, "batch_size": 32},
        api_version=1,
    )
