"""Parallel backends: what makes the ranks of a run act as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf.api import BackendEntry, Plan, PlannedComponent, Problem, hookimpl


def _one_process(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    ranks = max(plan.run.nproc, plan.machine.world_size)
    if ranks > 1:
        yield Problem(f"--backend {component.name} is one process, the run has {ranks}", "leave --nproc out")


@hookimpl
def rlhf_backends() -> Iterable[Any]:
    yield BackendEntry(
        name="single",
        summary="one process, on the CPU or one GPU",
        impl="rlhf_plugins.backends.single:Single",
        provides={"whole-weights", "whole-gradients"},
        constraints=(_one_process,),
        rank=10,
    )
