"""The public interface, version 1: everything a plugin needs, and nothing else. Importing this imports no torch;
names that need it are loaded when asked for.

In an entry module (light): `hookimpl`, `option`, the `...Entry` types, `Role`, `Problem`, the row types; for
constraints `Plan` with its `PlannedComponent`s and `RolePlan`s.
In an implementation: the classes of `rlhf.interfaces` and the tensors of `rlhf.sequences`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf import API_VERSION
from rlhf.entries import (
    POLICY,
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    FormatEntry,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    RewardEntry,
    Role,
    StarterEntry,
    TrackerEntry,
)
from rlhf.errors import Interrupted, Problem, RequestError, RowError, RunError
from rlhf.floor import AttentionShape, ModelShape
from rlhf.hooks import hookimpl
from rlhf.options import option
from rlhf.plan import Component as PlannedComponent
from rlhf.plan import Plan, RolePlan
from rlhf.rows import CompletionRow, LabelledRow, Message, PreferenceRow, PromptRow

if TYPE_CHECKING:
    from rlhf.interfaces import (
        Algorithm,
        Backend,
        Codec,
        Component,
        Context,
        Engine,
        Failed,
        Format,
        HeadRequest,
        Launcher,
        LoadSpec,
        LogProbs,
        MemoryStrategy,
        OptimizerStrategy,
        Policy,
        Reward,
        Score,
        State,
        StepResult,
        Tracker,
        TrainedParameter,
        World,
    )
    from rlhf.sequences import (
        Batch,
        Example,
        Experience,
        Generation,
        Prompt,
        Rollouts,
        Sample,
        ScoreRequest,
        Scores,
        Sequences,
        Totals,
        group_mean,
        sequence_mean,
        sequence_sum,
        token_mean,
    )

_LAZY = {
    **dict.fromkeys(
        (
            "Algorithm", "Backend", "Codec", "Component", "Context", "Engine", "Failed", "Format", "HeadRequest",
            "Launcher", "LoadSpec", "LogProbs", "MemoryStrategy", "OptimizerStrategy", "Policy", "Reward", "Score",
            "State", "StepResult", "Tracker", "TrainedParameter", "World",
        ),
        "rlhf.interfaces",
    ),
    **dict.fromkeys(
        (
            "Batch", "Example", "Experience", "Generation", "Prompt", "Rollouts", "Sample", "ScoreRequest", "Scores",
            "Sequences", "Totals", "group_mean", "sequence_mean", "sequence_sum", "token_mean",
        ),
        "rlhf.sequences",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"rlhf.api has no {name!r}")


__all__ = [
    "API_VERSION",
    "POLICY",
    "Algorithm",
    "AlgorithmEntry",
    "AttentionShape",
    "Backend",
    "BackendEntry",
    "Batch",
    "Codec",
    "CompletionRow",
    "Component",
    "Context",
    "Engine",
    "EngineEntry",
    "Example",
    "Experience",
    "Failed",
    "Format",
    "FormatEntry",
    "Generation",
    "HeadRequest",
    "Interrupted",
    "LabelledRow",
    "Launcher",
    "LauncherEntry",
    "LoadSpec",
    "LogProbs",
    "MemoryEntry",
    "MemoryStrategy",
    "Message",
    "ModelShape",
    "OptimizerEntry",
    "OptimizerStrategy",
    "Plan",
    "PlannedComponent",
    "Policy",
    "PolicyEntry",
    "PreferenceRow",
    "Problem",
    "Prompt",
    "PromptRow",
    "RequestError",
    "Reward",
    "RewardEntry",
    "Role",
    "RolePlan",
    "Rollouts",
    "RowError",
    "RunError",
    "Sample",
    "Score",
    "ScoreRequest",
    "Scores",
    "Sequences",
    "StarterEntry",
    "State",
    "StepResult",
    "Totals",
    "Tracker",
    "TrackerEntry",
    "TrainedParameter",
    "World",
    "group_mean",
    "hookimpl",
    "option",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
]
