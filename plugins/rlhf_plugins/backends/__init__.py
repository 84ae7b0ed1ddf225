"""Parallel backends: what makes the ranks of a run act as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from rlhf.api import BackendEntry, ModuleMemory, Plan, PlannedComponent, Problem, divided, hookimpl, option, unchanged
from rlhf_plugins.memory import DEEPSPEED
from rlhf_plugins.memory.rules import seen_with


@attrs.frozen(kw_only=True)
class RanksConfig:
    """Options of every backend of several processes."""

    deadline: float = option(
        1800.0, help="how long a rank may be late before the run ends and names it; longer than one step's rollouts",
        unit="seconds", gt=0,
    )  # fmt: skip


@attrs.frozen(kw_only=True)
class DDPConfig(RanksConfig):
    """Options of `ddp`."""

    bucket_mib: float = option(25.0, help="gradients added up in one go", unit="MiB", gt=0)


def _one_process(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    if plan.world_size > 1:
        what = f"--backend {component.name} is one process, the run has {plan.world_size}"
        yield Problem(what, "leave --nproc out, or name a backend of several, or none")


def one_gpu_a_rank(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """For every parallel backend: ranks of a machine don't share GPUs."""
    gpus = len(plan.machine.gpus)
    if gpus and plan.run.nproc > gpus:
        yield Problem(f"--nproc {plan.run.nproc}: this machine has {gpus} GPUs, and each process needs one",
                      f"--nproc {gpus}")  # fmt: skip


def _something_to_shard(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """DeepSpeed without ZeRO would be `ddp`."""
    if not any("zero" in strategy.entry.requires for strategy in plan.mem):
        what = f"--backend {component.name}: nothing says what it is to spread over ranks"
        yield Problem(what, "--mem zero1, zero2 or zero3; or --backend ddp, which spreads the batch alone")


def _largest_bucket(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """A gradient stands beside its bucket for a moment: as large as the option says, or the largest tensor."""
    if not module.trainable or plan.world_size == 1:
        return module
    largest = max((w.numel * w.bytes_each for w in module.trained), default=0.0)
    total = sum(w.bytes for w in module.trained)
    bucket = min(max(largest, component.config.bucket_mib * 2**20), total)
    return attrs.evolve(module, copies={**module.copies, "bucket": bucket})


def _sharded(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """All of it is spread over ranks. On a CPU whole gradients of a layer come and go between what stays of the layers
    before, and leave gaps in the heap: in runs of a 135M model .6 and .7 GB more than all tensors, in bfloat16 and in
    float32, where a whole model's gradients are .54."""
    module = divided("weights", "gradients", "optimizer")(module, plan, component)
    if "cuda" in plan.machine.provides or plan.world_size == 1 or not module.trained:
        return module
    gaps = 4.0 * sum(weight.numbers for weight in module.trained)
    return attrs.evolve(module, copies={**module.copies, "gaps that whole gradients leave": gaps})


@hookimpl
def rlhf_backends() -> Iterable[Any]:
    yield BackendEntry(
        name="single",
        summary="one process, on the CPU or one GPU",
        impl="rlhf_plugins.backends.single:Single",
        provides={"whole-weights", "whole-gradients"},
        constraints=(_one_process,),
        footprint=unchanged,
        rank=10,
    )
    yield BackendEntry(
        name="ddp",
        summary="several processes, each with the whole model and a part of the batch",
        config=DDPConfig,
        impl="rlhf_plugins.backends.ddp:DDP",
        provides={"whole-weights", "whole-gradients"},
        constraints=(one_gpu_a_rank,),
        footprint=_largest_bucket,
        rank=9,
    )
    yield BackendEntry(
        name="deepspeed",
        summary="several processes, over which --mem zero1, zero2 or zero3 spreads the training state (DeepSpeed)",
        config=RanksConfig,
        impl="rlhf_plugins.backends.deepspeed:DeepSpeed",
        provides={"zero"},
        constraints=(one_gpu_a_rank, _something_to_shard),
        footprint=unchanged,
        modules=DEEPSPEED,
        rank=8,
    )
    yield BackendEntry(
        name="fsdp2",
        summary="several processes, over which weights, gradients and optimiser state are spread (torch)",
        config=RanksConfig,
        impl="rlhf_plugins.backends.fsdp2:FSDP2",
        provides={"replaced-weights"},
        constraints=(one_gpu_a_rank, seen_with("torch", "2.13")),
        footprint=_sharded,
    )
