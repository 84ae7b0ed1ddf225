"""Means that components report beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.world import World


class MetricSink:
    """Means that a component reports outside the loss, as `self.context.metrics.mean("kl/k1", kl, mask)`; kept as sums
    and counts, so that ranks reduce exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def mean(self, name: str, x: Tensor | float, mask: Tensor | None = None) -> None:
        """Add values to the step's mean called `name`. x: any shape; mask: bool, the same shape."""
        values = torch.as_tensor(x, dtype=torch.float64).detach().cpu().reshape(-1)
        if mask is not None:
            values = values[mask.cpu().reshape(-1)]
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + float(values.sum()), count + values.numel())

    def drain(self, world: World) -> dict[str, float]:
        """The means over all ranks, and start anew."""
        names = sorted(set[str]().union(*world.gather(list(self.sums))))
        table = torch.tensor([self.sums.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
        self.sums = {}
        if not names:
            return {}
        table = world.sum(table)
        return {name: float(s / n) for name, (s, n) in zip(names, table.tolist(), strict=True) if n}
