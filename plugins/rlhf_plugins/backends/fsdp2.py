"""FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277): parameters, gradients and optimiser
state lie spread over the ranks, each by its rows. A block is gathered for its own forward and again for its backward,
after which its gradients are added up and scattered; what is outside the blocks stays whole from a step's forward to
its backward.

Gradients are scattered in every micro-batch's backward, so that no rank ever keeps whole ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rlhf.api import (
    Context,
    OptimizerStrategy,
    ScoreRequest,
    Scores,
    State,
    StepResult,
    TrainedParameter,
)
from rlhf_plugins.backends import sharding
from rlhf_plugins.backends.ranks import RankedBackend


class FSDP2(RankedBackend):
    """See the module."""

    sharded: ClassVar[bool] = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        sharding.process_group(self.device)

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        sharding.something_to_train(parameters)
        mesh = init_device_mesh(self.device.partition(":")[0], (self.world.size,))
        self._container, self._whole = container, sharding.Visible(container)
        for block in sharding.blocks_of(container):
            fully_shard(block, mesh=mesh)
        fully_shard(self._whole, mesh=mesh)
        self._units = [part for part in self._whole.modules() if isinstance(part, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # losses are parts of one: ranks add up, and aren't averaged
            unit.set_force_sum_reduction_for_comms(True)  # by plain sums: gloo has no others
            # FSDP notes at the first gathering what takes a gradient: now, and not when adapters happen to be off.
            unit.unshard()
            unit.reshard()
        now = dict(container.named_parameters())  # other objects than before
        self._parameters: dict[str, DTensor] = {trained.name: now[trained.name] for trained in parameters}  # type: ignore[misc]
        self._max_norm = optimizer.max_norm
        self._optimizer = optimizer.build(
            [attrs.evolve(trained, parameter=now[trained.name]) for trained in parameters]
        )

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        with self.world.meeting("a forward", timed=False):
            scores = sharding.scores_of(self._whole(requests))
        if not torch.is_grad_enabled():
            self._whole.reshard()  # type: ignore[operator]  # which a backward would have done
        return scores

    def backward(self, loss: Tensor, last: bool = False) -> None:
        if loss.requires_grad:
            with self.world.meeting("a backward", timed=False):
                loss.backward()

    def update(self, factor: float) -> StepResult:
        gradients = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        squares = sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64))
        norm = self.world.sum(squares.cpu()).sqrt()
        skipped = not bool(torch.isfinite(norm))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if not skipped:
            if self._max_norm is not None:
                scale = min(1.0, self._max_norm / (float(norm) + 1e-6))  # as torch.nn.utils.clip_grad_norm_
                for gradient in gradients:
                    gradient.mul_(scale)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(float(norm), float(self._optimizer.param_groups[0]["lr"]), skipped)

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().weights(module, only):
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @contextlib.contextmanager
    def gathered(self, module: str) -> Iterator[None]:
        for unit in self._units:
            unit.unshard()
        try:
            with sharding.bare(self._container.get_submodule(f"bodies.{module}")):
                yield
        finally:
            for unit in self._units:
                unit.reshard()

    def state(self) -> State:
        """Of each trained parameter, by name, this rank's piece, and what the optimiser keeps of it, in pieces too."""
        parameters, moments = {}, {}
        for name, parameter in self._parameters.items():
            parameters[name] = self._piece(parameter)
            if kept := self._optimizer.state.get(parameter):
                moments[name] = {k: self._piece(v) if isinstance(v, DTensor) else v for k, v in kept.items()}
        return {"parameters": parameters, "optimizer": moments}

    def load_state(self, state: State) -> None:
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            start = self._start(parameter)
            sharding.fill(local(parameter).view(-1), state["parameters"][name], start)
            for key, value in state["optimizer"].get(name, {}).items():
                if tuple(value.shape) == tuple(parameter.shape):
                    kept: Any = torch.zeros_like(parameter.detach())
                    sharding.fill(local(kept).view(-1), value, start)
                else:
                    kept = value.to(parameter.device)
                self._optimizer.state[parameter][key] = kept

    def _piece(self, x: DTensor) -> Any:
        return sharding.piece_of(local(x).reshape(-1), x.shape, self._start(x))

    def _start(self, x: DTensor) -> int:
        """Where this rank's rows begin in the flattened whole: rows are dealt evenly, and the last ranks may have
        fewer, or none."""
        rows = -(-x.shape[0] // self.world.size)
        return min(self.world.rank * rows, x.shape[0]) * (x.numel() // max(x.shape[0], 1))


def local(x: Any) -> Tensor:
    """This rank's part; shares memory."""
    part: Tensor = x.detach()
    return part.to_local() if isinstance(part, DTensor) else part
