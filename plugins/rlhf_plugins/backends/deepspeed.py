"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): optimiser state (1), gradients too (2), parameters too
(3) lie spread over the ranks, flattened and cut into equal parts.

The optimiser, its groups, rates and schedule are ours; DeepSpeed holds its float32 parameters, adds gradients up,
clips and calls it. Where DeepSpeed does otherwise than one process would, it is set right here:

- It averages over ranks; our losses are parts of one, so they go in multiplied by the number of ranks.
- It wants to know beforehand how many micro-batches a step has; with `managed_gradient_accumulation` off it doesn't.
- A flat part has one step counter and always takes a step; a role that a step's loss leaves out (a policy while its
  critic warms up) is left alone in one process. So roles have flat parts of their own, and the optimiser doesn't see
  those without a gradient.
- Where a parameter has no gradient in a step, ZeRO-3 and offloading would apply that of the step before; it is cleared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.utils import logger, safe_set_local_grad
from torch import Tensor, nn

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
from rlhf_plugins.backends.flat import Parts, parts_of
from rlhf_plugins.backends.ranks import RankedBackend
from rlhf_plugins.memory import Zero3Config, ZeroConfig
from rlhf_plugins.memory.footprint import BUCKET

# DeepSpeed calls torch's collectives by names that torch is about to give up.
warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)


class DeepSpeed(RankedBackend):
    """See the module."""

    sharded: ClassVar[bool] = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        sharding.process_group(self.device)
        os.environ.setdefault("LOCAL_RANK", str(self.place.local_rank))  # it asks for that whatever started the ranks
        logger.setLevel(logging.WARNING)
        if self.device == "cpu":  # for inference only, and it would be compiled for a minute first
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._zero = next(c.config for c in context.plan.mem if isinstance(c.config, ZeroConfig))

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        sharding.something_to_train(parameters)
        self._container = container
        self._trained = list(parameters)
        self._seen: set[str] = set()
        """Names of the parameters that had a gradient since the last step, on this rank."""
        self._used: set[str] = set()
        """The same on any rank."""
        built = optimizer.build(parameters)
        _split_by_role(built, parameters)
        for trained in parameters:
            trained.parameter.register_post_accumulate_grad_hook(_noting(self._seen, trained.name))
        built.register_step_pre_hook(self._hide_idle)
        built.register_step_post_hook(self._show_idle)
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._base = built
        elements = sum(parameter.numel() for parameter in container.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=sharding.Visible(container),
            optimizer=built,
            config=configuration(self._zero, optimizer.max_norm, elements),
        )
        self._parts: Parts = parts_of(self._zero.stage, self._engine.optimizer, self._base, parameters, self.world)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        if self._zero.stage == 3:
            self._forget_order()
        with self.world.meeting("a forward", timed=False):
            return sharding.scores_of(self._engine(requests))

    def backward(self, loss: Tensor, last: bool = False) -> None:
        if loss.requires_grad:
            with self.world.meeting("a backward", timed=False):
                self._engine.backward(loss * self.world.size)

    def update(self, factor: float) -> StepResult:
        anywhere = self.world.max(torch.tensor([trained.name in self._seen for trained in self._trained]))
        self._used = {t.name for t, used in zip(self._trained, anywhere.tolist(), strict=True) if used}
        if self._zero.stage == 3:
            for trained in self._trained:
                if trained.name not in self._used:
                    nothing = torch.zeros_like(trained.parameter.ds_tensor)  # type: ignore[attr-defined]
                    safe_set_local_grad(trained.parameter, nothing)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        with self.world.meeting("a step", timed=False):
            self._engine.step()
        if self._zero.stage < 3 and self._zero.offload:  # its buffers live on; see the module
            for group in self._base.param_groups:
                for part in group["params"]:
                    part.grad.zero_()
        self._seen.clear()
        norm = float(self._engine.get_global_grad_norm())
        rate = float(self._engine.optimizer.param_groups[0]["lr"])
        return StepResult(norm, rate, not self._engine.was_step_applied())

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        if self._zero.stage < 3:
            yield from super().weights(module, only)
            return
        body = self._container.get_submodule(f"bodies.{module}")
        spread = dict(body.named_parameters(remove_duplicate=False))
        for name, tensor in body.state_dict().items():
            if only is not None and not only(name):
                continue
            if name not in spread:
                yield name, tensor
                continue
            with deepspeed.zero.GatheredParameters([spread[name]]):
                yield name, spread[name].detach().clone()  # it is given up again

    @contextlib.contextmanager
    def gathered(self, module: str) -> Iterator[None]:
        if self._zero.stage < 3:
            yield
            return
        body = self._container.get_submodule(f"bodies.{module}")
        with deepspeed.zero.GatheredParameters(list(body.parameters())), sharding.bare(body):
            yield

    def state(self) -> State:
        """As `fsdp2`'s: by name, this rank's pieces of each trained parameter (float32) and of what the optimiser keeps
        of it."""
        return self._parts.state()

    def load_state(self, state: State) -> None:
        self._parts.load_state(state)

    def close(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.destroy()
        super().close()

    def _forget_order(self) -> None:
        """DeepSpeed expects each step's modules in the order of the last one's, to gather ahead, and fails where it
        gets others in another order ("tracing error"). Which roles come next is not told by those before."""
        coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def _hide_idle(self, optimizer: Any, *arguments: Any) -> None:
        used = {trained.role for trained in self._trained if trained.name in self._used}
        for group in optimizer.param_groups:
            if group["role"] not in used:
                for part in group["params"]:
                    self._hidden.append((part, part.grad))
                    part.grad = None

    def _show_idle(self, *arguments: Any) -> None:
        for part, gradient in self._hidden:
            part.grad = gradient
        self._hidden.clear()


def configuration(zero: ZeroConfig, max_norm: float | None, elements: int) -> dict[str, Any]:
    """What DeepSpeed is given. Precision isn't its business: weights are float32, and products are in autocast.

    Args:
        elements: of the whole container.
    """
    bucket = max(1, min(elements, BUCKET))
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    stage: dict[str, Any] = {"stage": zero.stage, "overlap_comm": False, "reduce_bucket_size": bucket}
    if "optimizer" in zero.offload:
        stage["offload_optimizer"] = place
    if "parameters" in zero.offload:
        stage["offload_param"] = place
    if isinstance(zero, Zero3Config):
        stage["stage3_param_persistence_threshold"] = zero.keep_whole
        stage["stage3_prefetch_bucket_size"] = 0  # see `_forget_order`
    return {
        "train_micro_batch_size_per_gpu": 1,  # counted by DeepSpeed for its logs alone
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_norm or 0.0,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours, on the CPU too
        "steps_per_print": None,
    }


def _split_by_role(optimizer: torch.optim.Optimizer, parameters: Sequence[TrainedParameter]) -> None:
    """Groups in which no two roles are mixed, each with its "role"."""
    role_of = {id(trained.parameter): trained.role for trained in parameters}
    groups = []
    for group in optimizer.param_groups:
        for role in dict.fromkeys(role_of[id(p)] for p in group["params"]):
            groups.append({**group, "params": [p for p in group["params"] if role_of[id(p)] == role], "role": role})
    optimizer.param_groups[:] = groups


def _noting(seen: set[str], name: str) -> Any:
    def note(parameter: nn.Parameter) -> None:
        seen.add(name)

    return note
