"""What trains: memory strategies, the optimiser, and the backend that makes the ranks one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from rlhf.component import Component
from rlhf.interfaces.policy import LoadSpec
from rlhf.scaling import LossScaler
from rlhf.scores import ScoreRequest, Scores
from rlhf.world import World


class MemoryStrategy(Component):
    """How a role's module is loaded, adapted, wrapped, sharded. Override the phases it acts in."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        """LOAD: rewrite how the module is loaded."""
        return spec

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """ADAPT: replace what is trained, such as by adapters.

        Raises:
            RequestError: it doesn't fit the module; lists what would.
        """
        return module

    def wrap(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """WRAP: change how it runs, not what it computes."""
        return module

    def join(self, module: nn.Module, spec: LoadSpec) -> None:
        """ADAPT, for a role that joins another's module: put what is its own into the module, under `spec.role`, and
        change nothing of the others'.

        Raises:
            RequestError: it doesn't fit the module.
        """

    def adapters_off(self, module: nn.Module) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which the module is its own base; None where it brings no adapters."""
        return None

    def as_role(self, module: nn.Module, role: str) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which a module that several roles share is this one's; None where it keeps no parts apart.
        It lasts for a forward; a backward comes after it, so it must not change what is trained."""
        return None

    def noisy(self, module: nn.Module) -> bool:
        """Whether its forward is random where gradients are recorded, as dropout of adapters is. A loss then makes a
        forward of its own; else one that was made for the experience may be its first."""
        return False

    def visit(self, module: nn.Module) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which a frozen module's weights are on the device; None where they always are. It may be
        entered again inside itself."""
        return None

    def settled(self, parameters: Sequence[TrainedParameter]) -> None:
        """What is trained of the role is settled: these. Before the first step."""

    def stepped(self) -> None:
        """An optimiser step has changed the weights."""

    def stand_in(self, purpose: Literal["evaluate", "save"]) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which the role's trained weights are those to be evaluated, or saved; None where they are."""
        return None

    def loss_scaler(self) -> LossScaler | None:
        """What keeps gradients in the range of the products' precision; None where that has range enough."""
        return None


class OptimizerStrategy(Component):
    """Parameter groups, the optimiser and its schedule. Doesn't know the process layout."""

    max_norm: float | None = None
    """Gradients are scaled down to this global norm."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """Make the optimiser; each group needs `lr` and `base_lr`."""
        raise NotImplementedError  # abstract: each implementation has its own

    def factor(self, step: int, steps: int) -> float:
        """What the schedule multiplies each group's `base_lr` by in step `step` (from 0) of `steps`. By the loop's
        steps, not by optimiser steps: an early stop inside a step must not shift the schedule."""
        return 1.0


@attrs.frozen(eq=False)
class TrainedParameter:
    """A parameter with what the optimiser may want to know of it."""

    name: str
    parameter: nn.Parameter
    role: str
    learning_rate: float | None
    """The role's own, where it has one."""


@attrs.frozen
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    learning_rate: float
    skipped: bool = False
    """The gradients weren't finite, so nothing was changed."""
    loss_scale: float | None = None
    """What the loss was multiplied by, where it was."""


class Backend(Component):
    """The ranks as one: wraps one container of all trainable roles behind a single forward, owns step, clipping,
    gathering, reductions and shards of state. Doesn't know the algorithm."""

    world: World
    device: str
    sharded: ClassVar[bool] = False
    """A module's parameters are spread over ranks, so that each forward of it is a meeting of all ranks, and the
    module alone can't be saved. The run then has every rank make the same number of forwards (ranks with less work
    repeat a group at weight 0), and saves a model from `weights`."""
    scaler: LossScaler | None = None
    """Set before `prepare` where the precision of products needs one: `backward` scales by it, `update` takes the
    scale out before it clips, and `state` holds its own."""

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        """Take over the container of all trainable roles."""
        raise NotImplementedError  # abstract: each implementation has its own

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """One forward of the container, with gradient where it is enabled."""
        raise NotImplementedError  # abstract: each implementation has its own

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Add a micro-batch's gradients: the step's are the sum over micro-batches and ranks, not a mean.

        Args:
            last: this rank makes no further micro-batch of the step, so ranks may begin to add up. Ranks need not have
                made as many unless the backend is `sharded`; one that had no work at all is never called.
        """
        raise NotImplementedError  # abstract: each implementation has its own

    def update(self, factor: float) -> StepResult:
        """Add the gradients up over ranks, clip by their global norm, step at `factor` times each group's base
        learning rate, clear the gradients. Called on every rank, once a step; the result is the same on all."""
        raise NotImplementedError  # abstract: each implementation has its own

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        """A trained module's whole weights by name, in buckets, never all at once. Every rank runs through all of
        them, at the same time: each may be a meeting.

        Args:
            only: which names are wanted; the others needn't be gathered.
        """
        raise NotImplementedError  # abstract: each implementation has its own

    def gathered(self, module: str) -> contextlib.AbstractContextManager[None]:
        """A context in which a trained module is whole on every rank and can be called there by itself, without the
        others; no forward of the container meanwhile. For an engine that samples from it: it is gathered once, and
        not layer by layer for every token."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Leave the other ranks."""
