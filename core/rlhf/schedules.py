"""The field's usual schedules of a learning rate."""

from __future__ import annotations

import math


def schedule(name: str, step: int, steps: int, warmup: float, min_ratio: float) -> float:
    """What the peak rate is multiplied by.

    Args:
        name: constant, linear or cosine.
        step: from 0.
        steps: of the whole run.
        warmup: share of the steps that rise.
        min_ratio: where linear and cosine would arrive after the last step.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if name == "constant":
        return 1.0
    done = (step - rising) / max(steps - rising, 1)
    fall = 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_ratio + (1 - min_ratio) * fall
