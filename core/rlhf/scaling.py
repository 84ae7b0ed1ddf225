"""Loss scaling: gradients of float16 products vanish below 6e-8, so the loss is multiplied by a large number and the
gradients divided by it again. The number is found as training goes: halved when a gradient overflowed, and that step
left out; doubled when none has for long (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

It is a power of two, so that scaling rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from rlhf.errors import RunError


@attrs.define
class LossScaler:
    """The scale, and how it moves. A backend calls `scaled` in each backward, `unscale` and then `update` in each step.
    All ranks must tell it the same."""

    scale: float = 2.0**16
    interval: int = 2000
    """Steps in a row without an overflow after which the scale is doubled."""
    clean: int = attrs.field(default=0, init=False)
    """Steps since the last overflow or doubling."""

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the scale out of the gradients, in place. One that overflowed stays infinite or NaN."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, overflowed: bool) -> None:
        """After a step, or one that was left out since a gradient overflowed.

        Raises:
            RunError: nothing is left to halve: it isn't the scale that makes gradients infinite.
        """
        if not overflowed:
            self.clean += 1
            if self.clean == self.interval:
                self.scale, self.clean = self.scale * 2.0, 0
            return
        if self.scale <= 1.0:
            raise RunError(
                "gradients overflow in float16 even unscaled: train in float32, or with a lower learning rate"
            )
        self.scale, self.clean = self.scale / 2.0, 0

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"scale": self.scale, "clean": self.clean}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.scale, self.clean = float(state["scale"]), int(state["clean"])
