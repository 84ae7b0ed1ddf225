"""A model that is spread over several workers (`--engine.tensor-parallel-size`): when it fits a plan. Imports neither
torch nor vllm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.api import Plan, PlannedComponent, Problem

_ROWS = 64
"""vLLM fills a vocabulary up to a multiple of these before it splits it."""


def fits(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """There is a place for the workers, and the model can be split over so many."""
    config: Any = component.config
    size = config.tensor_parallel_size
    if size == 1:
        return
    option = f"--engine.tensor-parallel-size {size}"
    if config.place == "inside":
        what = f"{option}: inside, each rank has an engine of its own in its own process, and this needs {size} more"
        yield Problem(what, "--engine.place beside, or --engine.place server")
    sizes = legal_sizes(plan)
    if sizes and size not in sizes:
        what = f"{option}: the attention heads, layers and vocabulary of {plan.role('policy').model.path} can't be "
        yield Problem(f"{what}split into {size} equal parts", f"one of {', '.join(map(str, sizes))}")
    gpus = len(plan.machine.gpus)
    ranks = max(plan.run.nproc, 1)  # of this host; those of another launcher are counted when they start
    if config.place == "beside" and gpus and ranks * size > gpus:
        what = f"{option}: {ranks} {'ranks have' if ranks > 1 else 'rank has'} an engine each, which takes "
        yield Problem(f"{what}{ranks * size} GPUs, and there are {gpus}", f"{max(gpus // ranks, 1)} at most")


def legal_sizes(plan: Plan) -> tuple[int, ...]:
    """That the policy can be split into; empty where its config doesn't say enough.

    Each worker has whole heads of queries. It has whole heads of keys and values, too, or shares one with others.
    """
    model = plan.role("policy").model
    heads = model.get("num_attention_heads", "n_head") if model.known else None
    if not heads:
        return ()
    keys = model.get("num_key_value_heads") or heads
    inner, rows = model.get("intermediate_size", "n_inner"), model.get("vocab_size")
    found = [size for size in range(1, heads + 1) if heads % size == 0 and (keys % size == 0 or size % keys == 0)]
    found = [size for size in found if not inner or inner % size == 0]
    return tuple(size for size in found if not rows or -(-rows // _ROWS) * _ROWS % size == 0)


def gpus_of(local_rank: int, ranks: int, size: int) -> list[int]:
    """Which of this host's GPUs the engine beside a rank takes: the rank's own, and others that no rank has. So each
    GPU holds a part of one engine, and what the plan counts for one is true of all.

    Args:
        local_rank: whose GPU has the same number.
        ranks: of this host.
        size: GPUs of an engine.
    """
    first = ranks + local_rank * (size - 1)
    return [local_rank, *range(first, first + size - 1)]
