"""Optimiser strategies: parameter groups, the optimiser and its schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from rlhf.api import OptimizerEntry, Plan, PlannedComponent, Problem, Weight, hookimpl, moments, option
from rlhf_plugins.memory.rules import bitsandbytes_from


@attrs.frozen(kw_only=True)
class AdamWConfig:
    """Options of `adamw`."""

    learning_rate: float = option(1e-5, help="peak learning rate; an algorithm may set another default", gt=0)
    schedule: str = option(
        "constant", help="of the learning rate after warm-up", choices=("constant", "linear", "cosine")
    )
    warmup: float = option(0.0, help="share of the steps over which the rate rises linearly from 0", ge=0, lt=1)
    min_ratio: float = option(0.0, help="what linear and cosine end at, as a share of the peak", ge=0, le=1)
    weight_decay: float = option(
        0.0, help="decoupled decay of matrices; biases, norms and other vectors never decay",
        source="Loshchilov & Hutter 2019", ge=0,
    )  # fmt: skip
    beta1: float = option(0.9, help="decay of the mean of gradients", ge=0, lt=1)
    beta2: float = option(0.999, help="decay of the mean of squared gradients", ge=0, lt=1)
    eps: float = option(1e-8, help="added to the root of the mean square", gt=0)
    max_norm: float | None = option(1.0, help="gradients are scaled down to this global norm; none: never", gt=0)


@attrs.frozen(kw_only=True)
class AdamW8bitConfig(AdamWConfig):
    """Options of `adamw8bit`."""

    min_size: int = option(
        4096, help="a parameter with fewer weights keeps float32 moments; they would save next to nothing",
        unit="weights", ge=0,
    )  # fmt: skip


def _moments_of_8_bits(weight: Weight, config: Any) -> float:
    """Bytes that `adamw8bit` keeps of a tensor: two moments of a byte, and of each 256 of them a float32; small ones
    stay in float32. Besides, 2 KiB for all tensors together."""
    if weight.numel < config.min_size:
        return 8.0 * weight.numel
    return 2.0 * weight.numel + 2 * 4 * -(-weight.numel // 256)


def _as_float32(weight: Weight, config: Any) -> float:
    """What bitsandbytes' step on a CPU makes of a tensor: both moments, the gradient, the root and the quotient."""
    return 5 * 4.0 * weight.numel if weight.numel >= config.min_size else 0.0


def _host_is_elsewhere(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    if "cuda" not in plan.machine.provides:
        what = f"--optim {component.name}: this machine has no GPU, so moments are in the host's memory anyway"
        yield Problem(what, "--optim adamw is the same, with fewer copies; --optim adamw8bit keeps smaller moments")


@hookimpl
def rlhf_optimizers() -> Iterable[Any]:
    yield OptimizerEntry(
        name="adamw",
        summary="AdamW with constant, linear or cosine schedule and warm-up",
        config=AdamWConfig,
        impl="rlhf_plugins.optimizers.adamw:AdamW",
        footprint=moments(4, 4, beside=4),  # beside: a float32 that counts the steps
        rank=10,
    )
    yield OptimizerEntry(
        name="adamw8bit",
        summary="adamw with moments of 8 bits, 2.03 bytes a trained weight instead of 8 (bitsandbytes)",
        config=AdamW8bitConfig,
        impl="rlhf_plugins.optimizers.adamw8bit:AdamW8bit",
        requires={"whole-gradients"},
        footprint=_moments_of_8_bits,
        at_work=_as_float32,
        constraints=(bitsandbytes_from("0.48", on_cpu="0.50"),),
        modules={"bitsandbytes": "pip install 'rlhf-kit[quant]'"},
    )
    yield OptimizerEntry(
        name="adamw-host",
        summary="adamw with moments and step in the host's memory: 8 bytes a trained weight less on the GPU",
        config=AdamWConfig,
        impl="rlhf_plugins.optimizers.adamw_host:AdamWHost",
        requires={"whole-gradients"},
        constraints=(_host_is_elsewhere,),
        footprint=moments(4, 4, beside=4),
        state_on_host=True,
    )
