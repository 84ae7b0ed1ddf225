"""The hooks a plugin may implement. Each yields entries; none may import torch.

A complete plugin, `rlhf_tempered/__init__.py`, with `[project.entry-points.rlhf]  tempered = "rlhf_tempered"`:

    from rlhf.api import AlgorithmEntry, hookimpl, option
    import attrs

    @attrs.frozen(kw_only=True)
    class TemperedConfig:
        group_size: int = option(8, help="completions per prompt", gt=1)

    @hookimpl
    def rlhf_algorithms():
        yield AlgorithmEntry(name="tempered", summary="reward-weighted regression within a group",
                             config=TemperedConfig, impl="rlhf_tempered.algorithm:Tempered", requires={"rollouts"})
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from rlhf import entries

GROUP = "rlhf"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Decorates a plugin's hook, such as `rlhf_algorithms`."""


class Hooks:
    """The specifications. A hook returns an iterable of its kind's entries, or is a generator of them."""

    @hookspec
    def rlhf_algorithms(self) -> Iterable[entries.AlgorithmEntry]:  # type: ignore[empty-body]
        """Algorithms: `--algo`. The implementation subclasses `rlhf.api.Algorithm`."""

    @hookspec
    def rlhf_policies(self) -> Iterable[entries.PolicyEntry]:  # type: ignore[empty-body]
        """Model families: `--policy`. The implementation subclasses `rlhf.api.Policy`."""

    @hookspec
    def rlhf_engines(self) -> Iterable[entries.EngineEntry]:  # type: ignore[empty-body]
        """Rollout engines: `--engine`. The implementation subclasses `rlhf.api.Engine`."""

    @hookspec
    def rlhf_rewards(self) -> Iterable[entries.RewardEntry]:  # type: ignore[empty-body]
        """Reward sources: `--reward`. The implementation subclasses `rlhf.api.Reward`."""

    @hookspec
    def rlhf_memory(self) -> Iterable[entries.MemoryEntry]:  # type: ignore[empty-body]
        """Memory strategies: `--mem`. The implementation subclasses `rlhf.api.MemoryStrategy`."""

    @hookspec
    def rlhf_optimizers(self) -> Iterable[entries.OptimizerEntry]:  # type: ignore[empty-body]
        """Optimiser strategies: `--optim`. The implementation subclasses `rlhf.api.OptimizerStrategy`."""

    @hookspec
    def rlhf_backends(self) -> Iterable[entries.BackendEntry]:  # type: ignore[empty-body]
        """Parallel backends: `--backend`. The implementation subclasses `rlhf.api.Backend`."""

    @hookspec
    def rlhf_formats(self) -> Iterable[entries.FormatEntry]:  # type: ignore[empty-body]
        """Data formats: `--format`. The implementation subclasses `rlhf.api.Format`."""

    @hookspec
    def rlhf_trackers(self) -> Iterable[entries.TrackerEntry]:  # type: ignore[empty-body]
        """Trackers: `--track`. The implementation subclasses `rlhf.api.Tracker`."""

    @hookspec
    def rlhf_launchers(self) -> Iterable[entries.LauncherEntry]:  # type: ignore[empty-body]
        """Launchers: `--launch`. The implementation subclasses `rlhf.api.Launcher`."""

    @hookspec
    def rlhf_starters(self) -> Iterable[entries.StarterEntry]:  # type: ignore[empty-body]
        """What a run uses where the user names no model or data."""


HOOK_OF_KIND = {
    "algo": "rlhf_algorithms",
    "policy": "rlhf_policies",
    "engine": "rlhf_engines",
    "reward": "rlhf_rewards",
    "mem": "rlhf_memory",
    "optim": "rlhf_optimizers",
    "backend": "rlhf_backends",
    "format": "rlhf_formats",
    "track": "rlhf_trackers",
    "launch": "rlhf_launchers",
}
