"""Components that break the contract of their kind, each in one way."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.api import (
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    FormatEntry,
    LabelledRow,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    RewardEntry,
    TrackerEntry,
    hookimpl,
    option,
)


@attrs.frozen(kw_only=True)
class GroupConfig:
    group_size: int = option(4, help="completions per prompt", gt=1)


@attrs.frozen(kw_only=True)
class UndocumentedConfig:
    coefficient: float = 1.0


@attrs.define(kw_only=True)
class ChangingConfig:
    coefficient: float = option(1.0, help="of nothing")


ONLINE = {
    "all-tokens": "AllTokens",
    "leaking": "Leaking",
    "batch-mean": "BatchMean",
    "cut-groups": "CutGroups",
    "own-whitening": "OwnWhitening",
    "needs-rows": "NeedsRows",
    "uncorrected": "Uncorrected",
    "forgetful": "Forgetful",
    "unsaved": "Unsaved",
    "turned": "Turned",
    "by-place": "ByPlace",
    "all-groups": "AllGroups",
    "clockwork": "Clockwork",
    "constant": "Constant",
}


@hookimpl
def rlhf_algorithms() -> Iterator[AlgorithmEntry]:
    for name, impl in ONLINE.items():
        yield AlgorithmEntry(
            name=f"broken-{name}",
            summary="breaks one term of the contract",
            config=GroupConfig,
            impl=f"broken_kit.algorithms:{impl}",
            requires={"rollouts", "logprobs"},
        )
    yield AlgorithmEntry(
        name="broken-undocumented", summary="has an option without help", config=UndocumentedConfig,
        impl="broken_kit.algorithms:Plain", requires={"rollouts", "logprobs"},
    )  # fmt: skip
    yield AlgorithmEntry(
        name="broken-changing", summary="has options that can be changed", config=ChangingConfig,
        impl="broken_kit.algorithms:Plain", requires={"rollouts", "logprobs"},
    )  # fmt: skip
    yield AlgorithmEntry(
        name="broken-kind", summary="names another class", impl="broken_kit.algorithms:Nothing", requires={"rollouts"}
    )
    yield AlgorithmEntry(
        name="broken-unrequired", summary="asks for log-probs that it doesn't require", config=GroupConfig,
        impl="broken_kit.algorithms:Plain", requires={"rollouts"},
    )  # fmt: skip
    yield AlgorithmEntry(name="broken-api", summary="of a later API", impl="broken_kit.algorithms:Plain", api_version=2)
    yield AlgorithmEntry(
        name="broken-worse", summary="learns what is bad", impl="broken_kit.algorithms:Worse", data=LabelledRow
    )


REWARDS = {
    "short": "Short",
    "by-order": "ByOrder",
    "of-the-batch": "OfTheBatch",
    "needs-rollouts": "NeedsRollouts",
    "needs-text": "NeedsText",
    "nothing-for-failure": "NothingForFailure",
    "silent": "Silent",
    "meddling": "Meddling",
    "hidden-column": "HiddenColumn",
    "unsaved": "Unsaved",
}


@hookimpl
def rlhf_rewards() -> Iterator[RewardEntry]:
    for name, impl in REWARDS.items():
        yield RewardEntry(name=f"broken-{name}", summary="breaks one term", impl=f"broken_kit.rewards:{impl}")


@attrs.frozen(kw_only=True)
class RateConfig:
    learning_rate: float = option(0.1, help="of every step", gt=0)


OPTIMIZERS = {
    "no-base": "NoBase",
    "one-rate": "OneRate",
    "uphill": "Uphill",
    "fixed-rate": "FixedRate",
    "decaying": "Decaying",
    "apart": "Apart",
    "pickled": "Pickled",
    "frozen": "Frozen",
    "right": "Plain",
}


@hookimpl
def rlhf_optimizers() -> Iterator[OptimizerEntry]:
    for name, impl in OPTIMIZERS.items():
        yield OptimizerEntry(
            name=f"broken-{name}",
            summary="breaks one term",
            impl=f"broken_kit.optimizers:{impl}",
            config=RateConfig,
            requires={"whole-gradients"},
        )


TRACKERS = {
    "needs-rollouts": "NeedsRollouts",
    "meddling": "Meddling",
    "strict": "Strict",
    "drawing": "Drawing",
    "late": "Late",
    "fresh": "Fresh",
}


@hookimpl
def rlhf_trackers() -> Iterator[TrackerEntry]:
    for name, impl in TRACKERS.items():
        yield TrackerEntry(name=f"broken-{name}", summary="breaks one term", impl=f"broken_kit.trackers:{impl}")


FORMATS = {"losing": "Losing", "placeless": "Placeless", "unclaimed": "Unclaimed", "crashing": "Crashing"}


@hookimpl
def rlhf_formats() -> Iterator[FormatEntry]:
    for name, impl in FORMATS.items():
        yield FormatEntry(
            name=f"broken-{name}",
            summary="breaks one term",
            impl=f"broken_kit.formats:{impl}",
            suffixes=(".other",) if name == "unclaimed" else (),
        )


@attrs.frozen(kw_only=True)
class EngineConfig:
    max_new_tokens: int = option(6, help="of a response", unit="tokens", ge=1)


ENGINES = {
    "right": "Plain",
    "backwards": "Backwards",
    "one": "One",
    "unseeded": "Unseeded",
    "alike": "Alike",
    "inexact": "Inexact",
    "stale": "Stale",
    "versionless": "Versionless",
    "asking": "Asking",
    "hot": "Hot",
    "unsaved": "Unsaved",
}


@hookimpl
def rlhf_engines() -> Iterator[EngineEntry]:
    for name, impl in ENGINES.items():
        yield EngineEntry(
            name=f"broken-{name}",
            summary="breaks one term",
            config=EngineConfig,
            impl=f"broken_kit.engines:{impl}",
            provides={"rollouts", "logprobs", "on-policy"},
        )


MEMORY = {
    "right": "Plain",
    "shrinking": "Shrinking",
    "drifting": "Drifting",
    "other": "Other",
    "forgetful": "Forgetful",
    "slowing": "Slowing",
}


@hookimpl
def rlhf_memory() -> Iterator[MemoryEntry]:
    for name, impl in MEMORY.items():
        yield MemoryEntry(
            name=f"broken-{name}", summary="breaks one term", impl=f"broken_kit.memory:{impl}", phase="wrap"
        )


BACKENDS = {
    "right": "Plain",
    "mean": "Mean",
    "each-clipped": "EachClipped",
    "keeping": "Keeping",
    "applying": "Applying",
    "strict": "Strict",
    "parameters": "Parameters",
    "everything": "Everything",
    "forgetful": "Forgetful",
    "turned": "Turned",
    "constant": "Constant",
}


@hookimpl
def rlhf_backends() -> Iterator[BackendEntry]:
    for name, impl in BACKENDS.items():
        yield BackendEntry(
            name=f"broken-{name}",
            summary="breaks one term",
            impl=f"broken_kit.backends:{impl}",
            provides={"whole-weights", "whole-gradients"},
        )


POLICIES = ("Unnormalised", "Cold", "Padded", "Detached", "Unended", "Fresh")


@hookimpl
def rlhf_policies() -> Iterator[PolicyEntry]:
    from rlhf_plugins.policies import HFPolicyConfig

    for impl in POLICIES:
        yield PolicyEntry(
            name=f"broken-{impl.lower()}",
            summary="breaks one term",
            config=HFPolicyConfig,
            impl=f"broken_kit.policies:{impl}",
        )


LAUNCHERS = {"right": "Plain", "first": "First", "silent": "Silent", "content": "Content", "patient": "Patient"}


@hookimpl
def rlhf_launchers() -> Iterator[LauncherEntry]:
    for name, impl in LAUNCHERS.items():
        yield LauncherEntry(name=f"broken-{name}", summary="breaks one term", impl=f"broken_kit.launchers:{impl}")
