"""The manifest of distillation: options and entries; no torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import (
    POLICY,
    AlgorithmEntry,
    CompletionRow,
    Passes,
    PromptRow,
    Role,
    option,
)

KINDS = ("forward_kl", "reverse_kl", "js")


@attrs.frozen(kw_only=True)
class DistillConfig:
    """Options of `distill`."""

    divergence: str = option(
        "reverse_kl", help="of the policy from the teacher, at each token: forward_kl covers all that the teacher "
        "might say, reverse_kl keeps to what it says most, js lies between",
        source="GKD, Agarwal et al. 2024", choices=KINDS,
    )  # fmt: skip
    beta: float = option(
        0.5, help="of js: towards 0 it is like forward_kl, towards 1 like reverse_kl", source="GKD", gt=0, lt=1
    )
    temperature: float = option(
        1.0, help="divides the logits of both in the loss; that of sampling is the engine's", gt=0
    )


@attrs.frozen(kw_only=True)
class OnlineDistillConfig(DistillConfig):
    """Options of `distill`."""

    epochs: int = option(1, help="passes over each batch of responses", ge=1)
    minibatches: int = option(1, help="optimiser steps a pass", ge=1)


@attrs.frozen(kw_only=True)
class OfflineDistillConfig(DistillConfig):
    """Options of `distill-offline`."""

    divergence: str = option(
        "forward_kl", help="of the policy from the teacher, at each token: forward_kl covers all that the teacher "
        "might say, reverse_kl keeps to what it says most, js lies between",
        source="Hinton et al. 2015", choices=KINDS,
    )  # fmt: skip


TEACHER = Role("teacher", start="given")


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield AlgorithmEntry(
        name="distill",
        summary="on-policy distillation (GKD): what the policy says is corrected, token by token, by a teacher",
        config=OnlineDistillConfig,
        impl="rlhf_plugins.algorithms.distill:Distill",
        data=PromptRow,
        rewards=False,
        roles=(POLICY, TEACHER),
        requires={"rollouts"},
        footprint=lambda config: Passes(epochs=config.epochs, scored=("teacher",), compared=True),
        defaults={"optim.learning_rate": 1e-5, "batch_size": 64},
    )
    yield AlgorithmEntry(
        name="distill-offline",
        summary="distillation on given completions: the policy learns a teacher's whole distribution at each token",
        config=OfflineDistillConfig,
        impl="rlhf_plugins.algorithms.distill:Distill",
        data=CompletionRow,
        roles=(POLICY, TEACHER),
        footprint=lambda config: Passes(scored=("teacher",), compared=True),
        defaults={"optim.learning_rate": 2e-5, "batch_size": 32},
    )
