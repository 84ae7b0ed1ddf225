"""AdamW whose moments lie in the host's memory and whose step is made there (as in ZeRO-Offload, Ren et al. 2021,
arXiv:2101.06840, without its partition over ranks).

A parameter at a time, weights and gradient go to the host, and the weights come back: 12 bytes a weight over the bus,
for 8 that the GPU need not hold. The step itself is torch's fused AdamW for CPUs, so on a CPU this is `adamw` to the
bit, which is what it is tested by; the copies between a GPU and its host are untested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rlhf.api import TrainedParameter
from rlhf_plugins.optimizers.adamw import AdamW, groups


class AdamWHost(AdamW):
    """See the module."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        config = self.config
        return HostAdamW(groups(parameters, config), (config.beta1, config.beta2), config.eps)


class HostAdamW(torch.optim.Optimizer):
    """The optimiser: parameters anywhere, moments on the CPU."""

    def __init__(self, params: Any, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. `closure` is of torch's interface, and not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        weights = parameter.detach().to("cpu", torch.float32)
        gradient = parameter.grad.to("cpu", torch.float32)
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].cpu() if name in state else torch.zeros_like(weights)
        state["step"] = state["step"].cpu() if "step" in state else torch.zeros(())
        adamw(
            [weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            capturable=False,
            differentiable=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if weights.data_ptr() != parameter.data_ptr():  # on a CPU in float32 the copy is the parameter itself
            parameter.copy_(weights)
