"""KTO's loss of single completions that are good or bad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import check_same_length


def kto(
    x: Tensor, desirable: Tensor, baseline: Tensor, beta: float, weight_desirable: float, weight_undesirable: float
) -> Tensor:
    """w+ (1 - s(beta (x - z))) where desirable, w- (1 - s(beta (z - x))) elsewhere: [B].

    x: [B], nats, log-ratio of policy to reference summed over the completion. desirable: bool [B]. baseline: [B], nats,
    z >= 0, without gradient: the KL to the reference. beta: > 0. weights: > 0.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8.
    Raises: ValueError if the shapes differ or a number is out of range.
    """
    check_same_length(x=x, desirable=desirable, baseline=baseline)
    for name, value in (
        ("beta", beta),
        ("weight_desirable", weight_desirable),
        ("weight_undesirable", weight_undesirable),
    ):
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"expected a finite {name} > 0, given {value}")
    above = beta * (x - baseline.detach())
    return torch.where(desirable, weight_desirable * torch.sigmoid(-above), weight_undesirable * torch.sigmoid(above))
