"""The plugin author's kit: contracts that a component of each kind must keep, as pytest classes to derive from.

    from rlhf.testing import AlgorithmContract

    class TestTempered(AlgorithmContract):
        name = "tempered"

`pytest` then checks what the entry says, the numbers, state and resume, seeds, and whether it learns, on a tiny model
of its own, on the CPU, without a network. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.testing.algorithm_numbers import AlgorithmNumbers
    from rlhf.testing.algorithms import AlgorithmContract
    from rlhf.testing.backends import BackendContract
    from rlhf.testing.engines import EngineContract
    from rlhf.testing.formats import FormatContract
    from rlhf.testing.launchers import LauncherContract
    from rlhf.testing.memory import MemoryContract
    from rlhf.testing.optimizers import OptimizerContract
    from rlhf.testing.policies import PolicyContract
    from rlhf.testing.rewards import RewardContract
    from rlhf.testing.trackers import TrackerContract

_LAZY = {
    "AlgorithmContract": "rlhf.testing.algorithms",
    "AlgorithmNumbers": "rlhf.testing.algorithm_numbers",
    "BackendContract": "rlhf.testing.backends",
    "EngineContract": "rlhf.testing.engines",
    "FormatContract": "rlhf.testing.formats",
    "LauncherContract": "rlhf.testing.launchers",
    "MemoryContract": "rlhf.testing.memory",
    "OptimizerContract": "rlhf.testing.optimizers",
    "PolicyContract": "rlhf.testing.policies",
    "RewardContract": "rlhf.testing.rewards",
    "TrackerContract": "rlhf.testing.trackers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"rlhf.testing has no {name!r}")


__all__ = [
    "AlgorithmContract",
    "AlgorithmNumbers",
    "BackendContract",
    "EngineContract",
    "FormatContract",
    "LauncherContract",
    "MemoryContract",
    "OptimizerContract",
    "PolicyContract",
    "RewardContract",
    "TrackerContract",
]
