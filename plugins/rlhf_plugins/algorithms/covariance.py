"""Which tokens of an optimiser step are held back for their covariance (Cui et al. 2025, arXiv:2505.22617), as a piece.

    cov_t = (log pi(y_t) - mean log pi) (A_t - mean A)              means over own tokens of the step, all ranks
    clip: of the tokens with low < cov < high so many as `share` of all, drawn at random, have no gradient
    kl:   so many with the highest cov have coef |log pi - log pi_old| added to their loss; no ratio is clipped

At least one token is held where any may be, as in the authors' code. What is drawn goes by the seed, the optimiser step
and where a token stands, so it is the same however the step is cut over ranks and micro-batches.

Otherwise than in their code: all of an optimiser step is looked at, not a micro-batch; and a token may be drawn that
the ratio's clip takes the gradient from.

    rlhf run --algo grpo --algo.covariance clip --algo.minibatches 4
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf.api import Batch, Context, Experience, Score, Sequences, World, token_mean
from rlhf_plugins.algorithms.without_critic_options import GRPOConfig
from rlhf_plugins.functional.advantages import Moments, moments
from rlhf_plugins.functional.covariance import pulled_back, token_covariance, without_held


def prepared(
    minibatch: Experience, score: Score, config: GRPOConfig, context: Context, update: tuple[int, int]
) -> Experience:
    """With a field `held`, [N], 1 on the tokens that are held back; as it was where nothing is asked for.

    update: the step and which of its optimiser steps, so that another pass over the same tokens draws others.
    """
    if config.covariance == "none":
        return minibatch
    logp, advantages = score(minibatch, "policy").logp.cpu(), minibatch.per_token("advantages")  # [N]
    own, world = minibatch.mask, context.world
    of_logp, of_advantages = (Moments.unstack(world.sum(moments(x, own).stack())) for x in (logp, advantages))
    cov = token_covariance(logp, advantages, of_logp.mean, of_advantages.mean, own)
    context.metrics.mean("policy/covariance", cov, own)
    count = max(1, int(config.covariance_share * float(of_logp.count)))
    if config.covariance == "clip":
        inside = (cov > config.covariance_low) & (cov < config.covariance_high)
        held = _drawn(inside, minibatch.sequences, count, [context.seed, *update], world)
    else:
        held = _highest(cov, minibatch.sequences, count, world)
    return Experience(minibatch, {"held": held.to(advantages.dtype)})


def restrained(losses: Tensor, logp: Tensor, batch: Batch, config: GRPOConfig) -> Tensor:
    """The policy's losses with the held tokens held back. [N] -> [N]"""
    if config.covariance == "none":
        return losses
    held = batch["held"] > 0
    batch.log("policy/held", token_mean(held.float(), batch))
    if config.covariance == "clip":
        return without_held(losses, held)
    return pulled_back(losses, held, logp, batch["logp_old"], config.covariance_coef)


def _places(sequences: Sequences) -> Tensor:
    """int64 [N, 3]: a token's group, which of the group's responses here it is of, and where in it. A group is whole on
    one rank, so these are the same on any number of ranks."""
    seen: dict[int, int] = {}
    nth = []
    for number in sequences.group.tolist():
        nth.append(seen.get(number, 0))
        seen[number] = nth[-1] + 1
    rows = sequences.rows_of_tokens()
    starts = torch.repeat_interleave(sequences.lengths.cumsum(0) - sequences.lengths, sequences.lengths)
    offset = torch.arange(len(sequences.tokens)) - starts
    return torch.stack([sequences.group[rows], torch.tensor(nth, dtype=torch.long)[rows], offset], dim=1)


def _drawn(inside: Tensor, sequences: Sequences, count: int, seed: list[int], world: World) -> Tensor:
    """bool [N]: so many of those inside, over all ranks, at random."""
    places = _places(sequences)
    everybody = torch.unique(torch.cat(world.gather(places[inside])), dim=0)  # in an order that all ranks agree on
    order = np.random.default_rng(seed).permutation(len(everybody))[:count]
    return _among(places, everybody[torch.from_numpy(order)])


def _highest(cov: Tensor, sequences: Sequences, count: int, world: World) -> Tensor:
    """bool [N]: so many with the highest covariance, over all ranks; of equal ones those that come first."""
    places = _places(sequences)
    finite = cov.isfinite().nonzero().flatten()
    best = finite[torch.sort(cov[finite], descending=True, stable=True).indices[:count]]  # no other can be among them
    own = torch.cat([-cov[best][:, None], places[best].double()], dim=1)  # [<= count, 4]
    everybody = sorted(tuple(row) for part in world.gather(own) for row in part.tolist())[:count]
    chosen = [[int(number) for number in row[1:]] for row in everybody]
    return _among(places, torch.tensor(chosen, dtype=torch.long).reshape(-1, 3))


def _among(places: Tensor, chosen: Tensor) -> Tensor:
    """bool [N]: the tokens whose place was chosen."""
    wanted = {tuple(place) for place in chosen.tolist()}
    return torch.tensor([tuple(place) in wanted for place in places.tolist()], dtype=torch.bool)
