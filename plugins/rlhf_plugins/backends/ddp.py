"""Data parallel: every rank has the whole model and a part of the batch, and gradients are added up over ranks.

Adding up begins while the backward of a rank's last micro-batch still runs, in buckets, the last layers first.

torch's own DistributedDataParallel is not used: it wants one forward a backward, in which every rank uses every
parameter, as often as every other rank. Here a rank may have fewer micro-batches than another or none at all, and a
loss may leave a role out or call a forward twice. What is added up is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from rlhf.api import Context, OptimizerStrategy, RunError, State, StepResult, TrainedParameter, World
from rlhf_plugins.backends.ranks import RankedBackend
from rlhf_plugins.backends.steps import Steps


class DDP(RankedBackend):
    """See the module."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._adder: Adder | None = None

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        self._container = container
        self._steps = Steps(parameters, optimizer, self.scaler)
        if self.world.size > 1:
            check_alike(parameters, self.world)
            size = int(self.config.bucket_mib * 2**20)
            self._adder = Adder([trained.parameter for trained in parameters], size, self.world)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        if self._adder is not None:
            self._adder.begun = last
        self._steps.backward(loss)

    def update(self, factor: float) -> StepResult:
        if self._adder is not None:
            self._adder.finish()
        return self._steps.step(factor)

    def state(self) -> State:
        """Alike on every rank; see `Steps.state`."""
        return self._steps.state()

    def load_state(self, state: State) -> None:
        self._steps.load_state(state)


def check_alike(parameters: Sequence[TrainedParameter], world: World) -> None:
    """Ranks that begin with other weights would add up gradients of different models, without an error.

    Raises:
        RunError: this rank's weights are not those of rank 0.
    """
    sums = [float(trained.parameter.detach().double().sum()) for trained in parameters]
    first = world.broadcast(sums)
    for trained, own, other in zip(parameters, sums, first, strict=True):
        if abs(own - other) > 1e-6 * max(1.0, abs(other)):  # devices of two sorts add up in another order
            raise RunError(f"{trained.name} has other weights than on rank 0: the same path must hold the same model")


@attrs.define(eq=False)
class _Bucket:
    """Parameters whose gradients are added up in one go; of one dtype and device."""

    parameters: list[nn.Parameter]
    missing: int = 0
    """Parameters that have not had their last gradient."""
    flat: Tensor | None = None
    work: Any = None


class Adder:
    """Adds gradients up over ranks. Buckets start in the same order on every rank, whatever order their gradients come
    in, so that ranks need not use the same parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter], size: int, world: World) -> None:
        """
        Args:
            size: bytes of a bucket, about.
        """
        self.begun = False
        """The backward at work is this rank's last of the step."""
        self._world = world
        self._buckets = list(_buckets(parameters, size))
        self._parameters = list(parameters)
        self._of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._seen: set[int] = set()
        self._used: set[int] = set()
        self._next = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._clear()

    def finish(self) -> None:
        """After the last backward, on every rank: what is left is added up, and gradients are whole.

        A parameter that no rank has a gradient for keeps none: the optimiser must not decay it, as it wouldn't in one
        process.
        """
        with self._world.meeting("adding gradients up"):
            while self._next < len(self._buckets):
                self._start(self._buckets[self._next])
            for bucket in self._buckets:
                bucket.work.wait()
        used = torch.tensor([id(p) in self._used for p in self._parameters])
        anywhere = self._world.max(used).tolist()
        for bucket in self._buckets:
            assert bucket.flat is not None
            parts = bucket.flat.split([p.numel() for p in bucket.parameters])
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        for parameter, has in zip(self._parameters, anywhere, strict=True):
            if not has:
                parameter.grad = None
        self._clear()

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self.begun:
            return
        if id(parameter) in self._seen:
            raise RunError("a parameter's gradient came in two parts in one backward: use no reentrant checkpointing")
        self._seen.add(id(parameter))
        self._of[id(parameter)].missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._start(self._buckets[self._next])

    def _start(self, bucket: _Bucket) -> None:
        self._used.update(id(p) for p in bucket.parameters if p.grad is not None)
        with torch.no_grad():
            bucket.flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket.parameters]
            )
        for parameter in bucket.parameters:
            parameter.grad = None  # it is in the bucket: all of them twice would be as much as the weights
        bucket.work = torch.distributed.all_reduce(bucket.flat, async_op=True)
        self._next += 1

    def _clear(self) -> None:
        self.begun, self._next = False, 0
        self._seen.clear()
        self._used.clear()
        for bucket in self._buckets:
            bucket.missing, bucket.flat, bucket.work = len(bucket.parameters), None, None


def _buckets(parameters: Sequence[nn.Parameter], size: int) -> list[_Bucket]:
    """The last parameters first: their gradients are there first."""
    found: list[_Bucket] = []
    room, before = 0, None
    for parameter in reversed(parameters):
        needed = parameter.numel() * parameter.element_size()
        kind = (parameter.dtype, parameter.device)
        if needed > room or kind != before:
            found.append(_Bucket([]))
            room, before = size, kind
        found[-1].parameters.append(parameter)
        room -= needed
    return found
