"""Where ZeRO keeps what: the runs of a parameter's elements that lie in this rank's flat parts, and how a state by
parameter name is taken from them and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor

from rlhf.api import State, TrainedParameter, World
from rlhf_plugins.backends import sharding


class Parts(Protocol):
    """The parts of this rank."""

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


@attrs.frozen(eq=False)
class _Run:
    """A parameter's elements in a flat part."""

    name: str
    shape: tuple[int, ...]
    at: int
    """Where the run begins in the flat part."""
    size: int
    """0 where this rank has none of it."""
    start: int
    """Where it begins in the flattened parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """The run, of a flat part or what is laid out like it."""
        return flat.detach()[self.at : self.at + self.size]


@attrs.define
class FlatParts:
    """By name, from and to flat parts."""

    optimizer: torch.optim.Optimizer
    """The one that steps the flat parts."""
    runs: list[_Run]
    flat_of: dict[str, Tensor]
    """Parameter -> the flat part of this rank that its group has: even where it holds none of its elements, its step
    counter is the same."""
    published: Any
    """Called when the float32 parts were changed: gives the weights that are computed with the same values."""

    def state(self) -> State:
        parameters, moments = {}, {}
        for run in self.runs:
            flat = self.flat_of[run.name]
            parameters[run.name] = self._piece(run, flat)
            if kept := self.optimizer.state.get(flat):
                moments[run.name] = {
                    key: self._piece(run, value) if _alike(value, flat) else value for key, value in kept.items()
                }
        return {"parameters": parameters, "optimizer": moments}

    def load_state(self, state: State) -> None:
        self.optimizer.state.clear()
        for run in self.runs:
            flat = self.flat_of[run.name]
            sharding.fill(run.of(flat), state["parameters"][run.name], run.start)
            for key, value in state["optimizer"].get(run.name, {}).items():
                kept = self.optimizer.state[flat]
                if tuple(value.shape) == run.shape and run.shape:
                    sharding.fill(run.of(kept.setdefault(key, torch.zeros_like(flat.detach()))), value, run.start)
                else:
                    kept[key] = value.to(flat.device)
        self.published()

    def _piece(self, run: _Run, flat: Tensor) -> Any:
        return sharding.piece_of(run.of(flat).clone(), run.shape, run.start)


def parts_of(
    stage: int, zero: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[TrainedParameter], world: World
) -> FlatParts:
    """Where DeepSpeed put everything.

    Args:
        zero: its optimiser.
        optimizer: ours, inside.
    """
    return _of_stage_3(zero, optimizer, parameters, world) if stage == 3 else _of_stage_1(zero, optimizer, parameters)


def _of_stage_1(zero: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[TrainedParameter]) -> FlatParts:
    """And of stage 2: the parameters of a group one after another, cut into as many parts as there are ranks."""
    group_of = {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}
    runs, flat_of = [], {}
    for trained in parameters:
        p: Any = trained.parameter
        flat = zero.single_partition_of_fp32_groups[group_of[id(p)]]
        flat_of[trained.name] = flat
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:
            runs.append(_Run(trained.name, tuple(p.shape), 0, 0, p.numel()))
        else:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            runs.append(_Run(trained.name, tuple(p.shape), here.start, here.numel, there.start))
    return FlatParts(optimizer, runs, flat_of, zero.update_lp_params)


def _of_stage_3(
    zero: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[TrainedParameter], world: World
) -> FlatParts:
    """Each parameter cut into as many parts as there are ranks, the last padded; a rank's parts one after another."""
    runs, flat_of = [], {}
    for trained in parameters:
        p: Any = trained.parameter
        group, at, size = zero.grad_position[zero.get_param_id(p)]
        flat = zero.fp32_partitioned_groups_flat[group]
        flat_of[trained.name] = flat
        runs.append(_Run(trained.name, tuple(p.ds_shape), at, size, min(world.rank * size, p.ds_numel)))

    def publish() -> None:
        for trained in parameters:
            p: Any = trained.parameter
            p.ds_tensor.data.copy_(safe_get_local_fp32_param(p).view(p.ds_tensor.shape))
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    return FlatParts(optimizer, runs, flat_of, publish)


def _alike(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.ndim > 0
