"""How an engine takes new weights: which of them, and by what way they go. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from rlhf.api import Plan, PlannedComponent, Problem
from rlhf_plugins.memory import LoraConfig

MOST_RANK = 512
"""Of an adapter, in vLLM 0.32."""


@attrs.frozen
class Way:
    """Of taking new weights, and why it was chosen."""

    name: str
    why: str


def way_of(plan: Plan, config: Any) -> Way:
    """The one that was asked for, else the cheapest that fits: counting what it makes of sampling, too."""
    obstacle = no_adapter(plan)
    if config.sync != "auto":
        return Way(config.sync, "as asked for")
    if obstacle is not None:
        merged = "; adapters are merged" if "adapters" in plan.role("policy").provides() else ""
        return Way("reload", f"{obstacle}{merged}")
    if "cuda" not in plan.machine.provides:
        return Way(
            "reload", "on a CPU all weights are soon sent; adapters are merged, so that sampling doesn't compute them"
        )
    return Way("adapter", "the base never changes, and adapters are a small part of it")


def no_adapter(plan: Plan) -> str | None:
    """Why adapters alone don't carry what is trained; None where they do."""
    policy = plan.role("policy")
    if "adapters" not in policy.provides():
        return "the policy is trained whole"
    config = next((component.config for component in policy.mem if isinstance(component.config, LoraConfig)), None)
    if config is None:
        return "its adapters are not of a kind that vLLM knows"
    if config.dora:
        return "vLLM has no DoRA"
    if config.rank > MOST_RANK:
        return f"vLLM has no adapters of a rank over {MOST_RANK}"
    return None


CARRIERS = ("auto", "host", "cuda-ipc", "broadcast")


def carrier_of(plan: Plan, config: Any) -> Way | None:
    """What carries weights to another process, or is tried first; None where there is none."""
    if config.place == "inside":
        return None
    gpu = "cuda" in plan.machine.provides
    name = config.carrier
    if name == "auto":
        name = "host" if not gpu else "cuda-ipc" if config.place == "beside" else "broadcast"
    otherwise = "" if config.carrier != "auto" else "; by way of the host where that isn't open, which is tried"
    workers = "its workers" if config.tensor_parallel_size > 1 else "it"
    if name == "cuda-ipc":
        then = ", and from there to the other workers" if config.tensor_parallel_size > 1 else ""
        how = f"from the trainer's GPU memory to the engine's, which has the same GPU (CUDA IPC){then}"
    elif name == "broadcast":
        means = "NCCL, from GPU to GPU" if gpu else "gloo, from memory to memory"
        how = f"to {workers} by a broadcast ({means})"
    else:
        how, otherwise = "through shared memory where both see the same, else as bodies of requests; that is tried", ""
    return Way(name, f"{how}{otherwise}")


def carrier_fits(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """Whether it can be the one that is asked for."""
    config, gpu = component.config, "cuda" in plan.machine.provides
    what = f"--engine.carrier {config.carrier}"
    if config.carrier != "auto" and config.place == "inside":
        yield Problem(f"{what}: inside, nothing is carried", "leave it out, or --engine.place beside")
    elif config.carrier == "cuda-ipc" and not gpu:
        yield Problem(f"{what}: this machine has no GPU", "leave it out")
    elif config.carrier == "cuda-ipc" and config.place == "server":
        yield Problem(f"{what}: a server has GPUs of its own", "--engine.carrier broadcast, or leave it out")
    elif config.carrier == "broadcast" and config.place == "beside" and gpu:
        yield Problem(
            f"{what}: an engine beside has this rank's GPU, and NCCL wants one for each process",
            "--engine.carrier cuda-ipc",
        )


def notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    """What a plan tells of it."""
    way, carrier = way_of(plan, component.config), carrier_of(plan, component.config)
    yield f"--engine.sync {way.name}: {way.why}"
    if carrier is not None:
        yield f"--engine.place {component.config.place}: weights go {carrier.why}"
