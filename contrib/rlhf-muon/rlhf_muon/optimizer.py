"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for matrices in layers, AdamW for everything else.

    M <- mu M + (1 - mu) G,   U = (1 - mu) G + mu M with Nesterov, else M
    W <- (1 - rate decay) W - rate scale O,   O = U V^T of U's singular value decomposition, by Newton-Schulz iterations
    scale: 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982), or sqrt(max(1, rows / columns)) (Jordan)

The iterations, in bfloat16, bring singular values to between .7 and 1.2, not to 1; that is meant. The step is torch's
own, `torch.optim.Muon`. What is in no layer (embeddings, the vocabulary head, scalar heads) or is no matrix (norms,
biases, experts kept in one tensor) has AdamW's. A layer is told by the number in its name, such as `layers.3.`.

A matrix that is fused of several, such as GPT-2's c_attn, is made orthogonal as a whole. Only whole gradients will do:
a part of a matrix has other singular values, so backends that spread them over ranks are refused.

    rlhf run --algo sft --optim muon
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rlhf.api import Context, OptimizerStrategy, Problem, RequestError, TrainedParameter, schedule
from rlhf_muon import MuonConfig

_LAYER = re.compile(r"\.\d+\.")
_SCALES = {"match-rms": "match_rms_adamw", "original": "original"}
"""As torch calls them."""


class Muon(OptimizerStrategy):
    """See the module."""

    config: MuonConfig

    def __init__(self, config: MuonConfig, context: Context) -> None:
        super().__init__(config, context)
        self.max_norm = config.max_norm

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """One optimiser of both sorts, Muon's groups first.

        Raises:
            RequestError: no matrix of a layer is trained.
        """
        config = self.config
        matrices = [trained for trained in parameters if in_layer(trained)]
        others = [trained for trained in parameters if not in_layer(trained)]
        if not matrices:
            names = ", ".join(trained.name for trained in others[:3])
            what = f"--optim muon: no matrix of a layer is trained, only {names}{' ...' if len(others) > 3 else ''}"
            raise RequestError(Problem(what, "--optim adamw"))
        muon = torch.optim.Muon(
            self._groups(matrices, 1.0),
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.iterations,
            adjust_lr_fn=_SCALES[config.scale],
        )
        if not others:  # adapters are all in layers
            return Together(muon)
        adamw = torch.optim.AdamW(
            self._groups(others, config.adamw_ratio), betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        return Together(muon, adamw)

    def factor(self, step: int, steps: int) -> float:
        """Linear warm-up, then the schedule, as `rlhf.api.schedule` has them."""
        config = self.config
        return schedule(config.schedule, step, steps, config.warmup, config.min_ratio)

    def _groups(self, parameters: Iterable[TrainedParameter], ratio: float) -> list[dict[str, Any]]:
        """One for each learning rate, with and without decay. ratio: what the learning rate is multiplied by."""
        found: dict[tuple[float, float], list[Any]] = {}
        for trained in parameters:
            rate = trained.learning_rate if trained.learning_rate is not None else self.config.learning_rate
            decay = self.config.weight_decay if trained.parameter.ndim > 1 else 0.0
            found.setdefault((ratio * rate, decay), []).append(trained.parameter)
        return [
            {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay), members in found.items()
        ]


def in_layer(trained: TrainedParameter) -> bool:
    """Whether it is a matrix in a layer."""
    return trained.parameter.ndim == 2 and _LAYER.search(trained.name) is not None


class Together(torch.optim.Optimizer):
    """Optimisers that step as one: their groups, in order, and one state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self._counts = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each. `closure` is of torch's interface, and not used."""
        at = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            # Given anew each time: whoever restores a state may put other objects in their place.
            part.state, part.param_groups = self.state, self.param_groups[at : at + count]
            part.step()
            at += count
