"""An optimiser over whole parameters: clipping, steps, and a state that holds them by name. What backends share whose
ranks hold everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.api import LossScaler, OptimizerStrategy, RunError, Spread, State, StepResult, TrainedParameter


class Steps:
    """Losses and gradients in, steps out. Every rank sees the same gradients, so all agree on what overflowed."""

    def __init__(
        self,
        parameters: Sequence[TrainedParameter],
        optimizer: OptimizerStrategy,
        scaler: LossScaler | None = None,
    ) -> None:
        """
        Args:
            scaler: see `Backend.scaler`.

        Raises:
            RunError: nothing is to be trained.
        """
        if not parameters:
            raise RunError("nothing is to be trained: every parameter of every trainable role is frozen")
        self.parameters = {trained.name: trained.parameter for trained in parameters}
        self.optimizer = optimizer.build(parameters)
        self._max_norm = optimizer.max_norm
        self._scaler = scaler

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, times the scale where there is one."""
        if loss.requires_grad:  # a loss may be constant, such as that of a micro-batch without gradient
            (self._scaler.scaled(loss) if self._scaler else loss).backward()

    def step(self, factor: float) -> StepResult:
        """Take the scale out, clip, step, clear."""
        parameters = list(self.parameters.values())
        used = self._scaler.scale if self._scaler else None
        if self._scaler:
            self._scaler.unscale(parameters)
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, self._max_norm if self._max_norm is not None else float("inf")
        )
        skipped = not bool(torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._scaler:
            self._scaler.update(skipped)
        return StepResult(float(norm), float(self.optimizer.param_groups[0]["lr"]), skipped, used)

    def state(self) -> State:
        """Trained parameters and, by their names, what the optimiser keeps of each; the loss's scale."""
        moments = {
            name: dict(self.optimizer.state[parameter])
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
        }
        scaler = {"scaler": self._scaler.state()} if self._scaler else {}
        return {"parameters": {n: p.detach() for n, p in self.parameters.items()}, "optimizer": moments, **scaler}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(_whole(state["parameters"][name]))
        if self._scaler:
            self._scaler.load_state(state["scaler"])
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            # Moments live beside their parameter; a step counter does where the kernel reads it, else on the CPU.
            counts_there = bool(group.get("fused") or group.get("capturable"))
            for parameter in group["params"]:
                if found := state["optimizer"].get(names[parameter]):
                    moments = {key: _whole(value) for key, value in found.items()}
                    self.optimizer.state[parameter] = {
                        key: value.to(parameter.device)
                        if isinstance(value, Tensor) and (value.ndim or counts_there)
                        else value
                        for key, value in moments.items()
                    }


def _whole(value: Any) -> Any:
    """What another backend saved in pieces, whole."""
    return value.whole() if isinstance(value, Spread) else value
