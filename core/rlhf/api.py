"""The public interface, version 1: everything a plugin needs, and nothing else. Importing this imports no torch;
names that need it are loaded when asked for.

In an entry module (light): `hookimpl`, `option`, the `...Entry` types, `Role`, `Problem`, the row types; for
constraints `Plan` with its `PlannedComponent`s and `RolePlan`s.
In an implementation: the classes of `rlhf.interfaces`, and what they hand on: `rlhf.sequences`, `rlhf.experience`,
`rlhf.scores`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf import API_VERSION
from rlhf.component import Component, Context, Launcher, State
from rlhf.entries import (
    POLICY,
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    Follows,
    FormatEntry,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    RewardEntry,
    Role,
    StarterEntry,
    Times,
    TrackerEntry,
)
from rlhf.errors import Interrupted, Problem, RankLost, RequestError, RowError, RunError
from rlhf.floor import AttentionShape, ModelShape
from rlhf.hooks import hookimpl
from rlhf.options import option
from rlhf.place import Place, here
from rlhf.plan import Component as PlannedComponent
from rlhf.plan import Plan, RolePlan
from rlhf.planning.activations import transformer
from rlhf.planning.architecture import Architecture, Weight
from rlhf.planning.footprint import (
    Activations,
    Footprint,
    ForwardBatch,
    ModuleMemory,
    Passes,
    copied,
    divided,
    moments,
    on_disk,
    on_host,
    precision,
    recomputed,
    unchanged,
)
from rlhf.rank import PARENT_PIPE, REPORT, Report
from rlhf.rows import CompletionRow, LabelledRow, Message, PreferenceRow, PromptRow, RewardedRow, StepRow
from rlhf.schedules import schedule

if TYPE_CHECKING:
    from rlhf.checkpoint import Piece, Spread
    from rlhf.experience import (
        Batch,
        Experience,
        Totals,
        group_mean,
        policy_mean,
        sequence_mean,
        sequence_sum,
        token_mean,
    )
    from rlhf.interfaces import (
        Algorithm,
        Backend,
        Codec,
        Engine,
        Failed,
        Format,
        HeadRequest,
        LoadSpec,
        LogProbs,
        MemoryStrategy,
        OptimizerStrategy,
        Policy,
        Reward,
        Score,
        StepResult,
        Tracker,
        TrainedParameter,
        Weights,
    )
    from rlhf.metrics import MetricSink
    from rlhf.mixture import completion_example
    from rlhf.scaling import LossScaler
    from rlhf.scores import Comparison, Divergence, LogitSource, ScoreRequest, Scores
    from rlhf.sequences import Example, Generation, Prompt, Rollouts, Sample, Sequences
    from rlhf.world import World, join

_LAZY = {
    **dict.fromkeys(
        (
            "Algorithm", "Backend", "Codec", "Engine", "Failed", "Format", "HeadRequest",
            "LoadSpec", "LogProbs", "MemoryStrategy", "OptimizerStrategy", "Policy", "Reward", "Score",
            "StepResult", "Tracker", "TrainedParameter", "Weights",
        ),
        "rlhf.interfaces",
    ),
    "LossScaler": "rlhf.scaling",
    "completion_example": "rlhf.mixture",
    "MetricSink": "rlhf.metrics",
    **dict.fromkeys(("Example", "Generation", "Prompt", "Rollouts", "Sample", "Sequences"), "rlhf.sequences"),
    **dict.fromkeys(
        (
            "Batch", "Experience", "Totals", "group_mean", "policy_mean", "sequence_mean", "sequence_sum", "token_mean",
        ),
        "rlhf.experience",
    ),
    **dict.fromkeys(("Comparison", "Divergence", "LogitSource", "ScoreRequest", "Scores"), "rlhf.scores"),
    **dict.fromkeys(("World", "join"), "rlhf.world"),
    **dict.fromkeys(("Piece", "Spread"), "rlhf.checkpoint"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"rlhf.api has no {name!r}")


__all__ = [
    "API_VERSION",
    "PARENT_PIPE",
    "POLICY",
    "REPORT",
    "Activations",
    "Algorithm",
    "AlgorithmEntry",
    "Architecture",
    "AttentionShape",
    "Backend",
    "BackendEntry",
    "Batch",
    "Codec",
    "Comparison",
    "CompletionRow",
    "Component",
    "Context",
    "Divergence",
    "Engine",
    "EngineEntry",
    "Example",
    "Experience",
    "Failed",
    "Follows",
    "Footprint",
    "Format",
    "FormatEntry",
    "ForwardBatch",
    "Generation",
    "HeadRequest",
    "Interrupted",
    "LabelledRow",
    "Launcher",
    "LauncherEntry",
    "LoadSpec",
    "LogProbs",
    "LogitSource",
    "LossScaler",
    "MemoryEntry",
    "MemoryStrategy",
    "Message",
    "MetricSink",
    "ModelShape",
    "ModuleMemory",
    "OptimizerEntry",
    "OptimizerStrategy",
    "Passes",
    "Piece",
    "Place",
    "Plan",
    "PlannedComponent",
    "Policy",
    "PolicyEntry",
    "PreferenceRow",
    "Problem",
    "Prompt",
    "PromptRow",
    "RankLost",
    "Report",
    "RequestError",
    "Reward",
    "RewardEntry",
    "RewardedRow",
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
    "Spread",
    "StarterEntry",
    "State",
    "StepResult",
    "StepRow",
    "Times",
    "Totals",
    "Tracker",
    "TrackerEntry",
    "TrainedParameter",
    "Weight",
    "Weights",
    "World",
    "completion_example",
    "copied",
    "divided",
    "group_mean",
    "here",
    "hookimpl",
    "join",
    "moments",
    "on_disk",
    "on_host",
    "option",
    "policy_mean",
    "precision",
    "recomputed",
    "schedule",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
    "transformer",
    "unchanged",
]
