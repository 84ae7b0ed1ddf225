"""Advantages without a critic: a response is compared with the others to its prompt.

`group` is int64 [B]: responses of one group (completions of one prompt) share a number; numbers need not be dense, nor
a group's responses neighbours. Nothing here carries a gradient: a reward is data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from rlhf_plugins.functional.advantages import Moments
from rlhf_plugins.functional.ragged import check_same_length


@attrs.frozen(eq=False)
class GroupStats:
    """What `group_stats` returns: of each response's group, spread over its responses."""

    mean: Tensor  # [B], unit of x
    std: Tensor  # [B], unit of x; unbiased (divided by size - 1); 0 for a group of one
    size: Tensor  # [B], responses
    flat: Tensor  # bool [B]: all of the group are equal, so nothing in it is better than anything else


def group_stats(x: Tensor, group: Tensor) -> GroupStats:
    """Mean and spread of each group. x: [B], any unit; group: int64 [B].

    In float64, whatever x is, and about the mean: squares of large rewards would cancel.
    Raises: ValueError if the two are not [B] alike.
    """
    check_same_length(x=x, group=group)
    groups, of = torch.unique(group, return_inverse=True)
    wide = x.detach().double()

    def summed(values: Tensor) -> Tensor:  # [B] -> [B], each group's sum
        return values.new_zeros(len(groups)).index_add(0, of, values)[of]

    size = summed(torch.ones_like(wide))
    mean = summed(wide) / size  # divided by the group's responses: each weighs the same
    std = (summed((wide - mean).square()) / (size - 1).clamp(min=1)).sqrt()
    highest = wide.new_full((len(groups),), -torch.inf).scatter_reduce(0, of, wide, "amax")[of]
    lowest = wide.new_full((len(groups),), torch.inf).scatter_reduce(0, of, wide, "amin")[of]
    return GroupStats(mean.to(x.dtype), std.to(x.dtype), size, highest == lowest)


def group_advantages(
    rewards: Tensor, group: Tensor, scale: bool = True, eps: float = 1e-4, batch: Moments | None = None
) -> Tensor:
    """(r - mean) / (std + eps) within each group, or r - mean without `scale`: [B] -> [B].

    Source: GRPO, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; without the division, Liu et al. 2025
    (arXiv:2503.20783), "Dr. GRPO". eps: unit of rewards; it is the 1e-4 of TRL.

    batch: moments of the whole batch's rewards; the division is then by their (unbiased) deviation, one for all groups,
    Liu et al. 2025 (arXiv:2508.08221).
    Raises: ValueError if a shape differs or eps is negative.
    """
    if not eps >= 0:
        raise ValueError(f"expected eps >= 0, given {eps}")
    stats = group_stats(rewards, group)
    centred = rewards.detach() - stats.mean
    if batch is not None:
        std = math.sqrt(float(batch.var * batch.count / (batch.count - 1).clamp(min=1.0)))
        return centred / (std + eps)
    return centred / (stats.std + eps if scale else 1.0)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """r - mean of the others in its group: [B] -> [B]; 0 for a group of one, which has no others.

    Source: RLOO, Ahmadian et al. 2024 (arXiv:2402.14740), section 2.3; Kool et al. 2019. The baseline doesn't depend on
    the response itself, so the gradient is unbiased.
    Raises: ValueError if a shape differs.
    """
    stats = group_stats(rewards, group)
    others = (stats.size - 1).clamp(min=1)
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
    return ((rewards.detach() - stats.mean) * stats.size / others).to(rewards.dtype)


def each_normalised(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, eps: float = 1e-4
) -> Tensor:
    """sum over rewards k of weight_k (r_k - mean_k) / (std_k + eps), each within its group: -> [B].

    Source: GDPO, Liu et al. 2026 (arXiv:2601.05242): of rewards that are summed first, one with a wide spread drowns
    the rest. The caller whitens the sum over the whole batch.

    parts: name -> [B]; weights: name -> weight, of the same names.
    Raises: ValueError if there is no reward, a weight lacks, or a shape differs.
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(f"expected a weight for each reward, given rewards {[*parts]} and weights {[*weights]}")
    return torch.stack([weights[name] * group_advantages(part, group, eps=eps) for name, part in parts.items()]).sum(0)


def best_of_groups(x: Tensor, group: Tensor, keep: int) -> Tensor:
    """bool [B]: the `keep` largest of each group; of equal ones those that come first.

    x: [B], any unit. Raises: ValueError if a shape differs or keep is not positive.
    """
    check_same_length(x=x, group=group)
    if keep < 1:
        raise ValueError(f"expected keep >= 1, given {keep}")
    by_size = torch.sort(x, descending=True, stable=True).indices
    order = by_size[torch.sort(group[by_size], stable=True).indices]  # by group, within it the largest first
    _, counts = torch.unique(group, return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.arange(len(x), device=x.device) - starts
    return torch.zeros_like(group, dtype=torch.bool).index_put((order,), rank < keep)


def tied_for_best(x: Tensor, group: Tensor) -> Tensor:
    """bool [B]: in its group several, but not all, have the largest x; the same for all of a group.

    x: [B], any unit. Raises: ValueError if a shape differs.
    """
    two = best_of_groups(x, group, 2)
    alike = group_stats(x[two], group[two]).flat
    return torch.isin(group, group[two][alike]) & ~group_stats(x, group).flat


def best_and_worst(x: Tensor, group: Tensor) -> Tensor:
    """int64 [P, 2]: rows of the largest and the smallest x of each group, by the groups' numbers; of equal ones those
    that come first. Groups all of whose x are equal are left out.

    x: [B], any unit. Raises: ValueError if a shape differs.
    """
    spread = ~group_stats(x, group).flat
    ends = [(best_of_groups(way, group, 1) & spread).nonzero().flatten() for way in (x, -x)]
    return torch.stack([rows[torch.sort(group[rows]).indices] for rows in ends], dim=1)


def less_baseline(rewards: Tensor, group: Tensor, baseline: Tensor, baseline_group: Tensor) -> Tensor:
    """r - its group's baseline: [B] -> [B].

    Source: ReMax, Li et al. 2023 (arXiv:2310.10505), the baseline being the greedy response's reward.
    rewards, group: [B]; baseline, baseline_group: [P], one a group, in any order.
    Raises: ValueError if a shape differs, or a group has no baseline or several.
    """
    check_same_length(rewards=rewards, group=group)
    check_same_length(baseline=baseline, baseline_group=baseline_group)
    same = group[:, None] == baseline_group[None, :]  # [B, P]
    if not bool((same.sum(1) == 1).all()):
        raise ValueError(f"expected one baseline a group, given groups {group.tolist()} and {baseline_group.tolist()}")
    return rewards.detach() - (same.to(baseline.dtype) @ baseline.detach()).to(rewards.dtype)
