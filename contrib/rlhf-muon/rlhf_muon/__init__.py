"""The manifest of `muon`; no torch here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator

import attrs

from rlhf.api import OptimizerEntry, Plan, PlannedComponent, Problem, Weight, hookimpl, option


@attrs.frozen(kw_only=True)
class MuonConfig:
    """Options of `muon`."""

    learning_rate: float = option(1e-5, help="peak learning rate; an algorithm may set another default", gt=0)
    scale: str = option(
        "match-rms", help="of an orthogonal step: 0.2 sqrt(max(rows, columns)), which makes it as large as AdamW's at "
        "the same rate; or sqrt(max(1, rows / columns)), whose usual rate is 0.02",
        source="Liu et al. 2025, arXiv:2502.16982; Jordan 2024", choices=("match-rms", "original"),
    )  # fmt: skip
    momentum: float = option(0.95, help="decay of the mean of gradients", ge=0, lt=1)
    nesterov: bool = option(True, help="step along the gradient and the momentum, not the momentum alone")
    iterations: int = option(5, help="Newton-Schulz iterations a step", source="Jordan 2024", ge=1, lt=100)
    weight_decay: float = option(
        0.0, help="decoupled decay of matrices, AdamW's among them; biases, norms and other vectors never decay", ge=0
    )
    adamw_ratio: float = option(
        1.0, help="rate of what AdamW steps (embeddings, heads, norms, biases), times the learning rate", gt=0
    )
    beta1: float = option(0.9, help="AdamW's decay of the mean of gradients", ge=0, lt=1)
    beta2: float = option(0.999, help="AdamW's decay of the mean of squared gradients", ge=0, lt=1)
    eps: float = option(1e-8, help="AdamW's, added to the root of the mean square", gt=0)
    schedule: str = option(
        "constant", help="of the learning rate after warm-up", choices=("constant", "linear", "cosine")
    )
    warmup: float = option(0.0, help="share of the steps over which the rate rises linearly from 0", ge=0, lt=1)
    min_ratio: float = option(0.0, help="what linear and cosine end at, as a share of the peak", ge=0, le=1)
    max_norm: float | None = option(1.0, help="gradients are scaled down to this global norm; none: never", gt=0)


def hidden(weight: Weight) -> bool:
    """Whether Muon steps it: a matrix in a layer, adapters and routers among them; not experts in one tensor."""
    return len(weight.shape) == 2 and weight.kind not in ("embedding", "head", "score")


def kept(weight: Weight, config: MuonConfig) -> float:
    """Bytes kept of a tensor: a momentum, or AdamW's two moments and a count of steps, all float32."""
    return 4.0 * weight.numel if hidden(weight) else 8.0 * weight.numel + 4


def at_work(weight: Weight, config: MuonConfig) -> float:
    """Bytes while a matrix is stepped: the update in float32, two of it in bfloat16, and two squares of its shorter
    side."""
    return 8.0 * weight.numel + 4.0 * min(weight.shape) ** 2 if hidden(weight) else 0.0


def torch_has_it(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """torch.optim.Muon came with torch 2.9."""
    version = importlib.metadata.version("torch")
    if [int(part) for part in version.split(".")[:2]] < [2, 9]:
        yield Problem(f"--optim {component.name}: torch {version} has no Muon", "pip install 'torch>=2.9'")


@hookimpl
def rlhf_optimizers() -> Iterable[OptimizerEntry]:
    yield OptimizerEntry(
        name="muon",
        summary="Muon: orthogonalised momentum for matrices in layers, 4 bytes a weight; AdamW for the rest",
        config=MuonConfig,
        impl="rlhf_muon.optimizer:Muon",
        requires={"whole-gradients"},
        constraints=(torch_has_it,),
        footprint=kept,
        at_work=at_work,
        api_version=1,
    )
