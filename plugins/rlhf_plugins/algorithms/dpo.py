"""Direct preference optimisation (Rafailov et al. 2023, eq. 7) and the losses that others put in its place.

    c, r = sum_t [log pi(y_t) - log pi_ref(y_t)] of the chosen and the rejected completion
    sigmoid: - log sigmoid(beta (c - r))        and hinge, ipo, exo_pair, nca_pair, ...: `functional.preference`
    aot, aot_unpaired: the same of sorted log-ratios: `functional.transport`        sft: - log pi(chosen) / n

Several are added with weights, from one forward. The reference's log-probs are computed once a pair and kept; with
adapters the reference is the policy without them. The AOT losses sort over the minibatch, so they look at all of it
before its losses: one more forward, but where it is one micro-batch. Held-out, they sort all held-out pairs.
Left out: WPO's weights, and losses without a reference, which are algorithms: simpo, orpo, cpo.

    rlhf run --algo dpo --model MODEL --data pairs.jsonl --mem lora --algo.loss sigmoid:0.8,sft:0.2
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, Experience, PreferenceRow, Score, World, group_mean, sequence_sum
from rlhf_plugins.algorithms.preferences import DPO_SMOOTHED, DPOConfig
from rlhf_plugins.functional.likelihood import sft
from rlhf_plugins.functional.preference import LOSSES, discopop, divergence_score
from rlhf_plugins.functional.transport import aot, aot_unpaired, counterparts


class DPO(Algorithm):
    config: DPOConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        prompt = codec.prompt(row.prompt)
        for text in (row.chosen, row.rejected):
            yield Example(prompt, codec.response(text, row.prompt))

    def experience(self, rollouts: Experience, score: Score) -> Experience:
        logp_ref = sequence_sum(score(rollouts, "reference").logp, rollouts)  # [B], nats
        return Experience(rollouts, logp_ref=logp_ref)

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        return with_counterparts(minibatch, score, self.config, self.context.world)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return pair_loss(batch, score, self.config)


def with_counterparts(minibatch: Experience, score: Score, config: DPOConfig, world: World) -> Experience:
    """A minibatch of pairs with what its AOT losses, if it has any, sort by: of all of it, over all ranks."""
    if not {"aot", "aot_unpaired"} & set(config.losses):
        return minibatch
    logp = sequence_sum(score(minibatch, "policy").logp, minibatch)  # [B], nats
    own = minibatch.sequences.group[::2].contiguous()  # [P], numbers over all ranks
    parts = world.gather([own, logp.view(-1, 2), minibatch["logp_ref"].view(-1, 2)])
    pairs, order = torch.cat([part[0] for part in parts]).sort()
    policy, reference = (torch.cat([part[i] for part in parts])[order] for i in (1, 2))  # [P of all ranks, 2] each
    c, r = (policy - reference).unbind(1)
    met = counterparts(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1])
    crossed = torch.stack([counterparts(c, r), counterparts(r, c)], 1)
    here = torch.searchsorted(pairs, own)  # this rank's among all
    return Experience(minibatch, aot_met=met[here].repeat_interleave(2), aot_crossed=crossed[here].flatten())


def pair_loss(batch: Batch, score: Score, config: DPOConfig) -> Tensor:
    """This micro-batch's part of the loss, of pairs with `logp_ref` [B], and what is logged of it."""
    logp = sequence_sum(score(batch, "policy").logp, batch)  # [B], nats
    c, r = (logp - batch["logp_ref"]).view(-1, 2).unbind(1)  # [P] each, log-ratios
    losses = torch.zeros_like(c)
    for name, weight in config.losses.items():
        losses = losses + weight * _losses(name, logp, c, r, batch, config)
    batch.log("reward/accuracy", group_mean((c > r).float(), batch))
    batch.log("reward/margin", group_mean(config.beta * (c - r), batch))
    batch.log("reward/chosen", group_mean(config.beta * c, batch))
    batch.log("reward/rejected", group_mean(config.beta * r, batch))
    return group_mean(losses, batch)  # divides by the step's pairs


def _losses(name: str, logp: Tensor, c: Tensor, r: Tensor, batch: Batch, config: DPOConfig) -> Tensor:
    """[P], of one name."""
    smoothing, beta = config.label_smoothing or 0.0, config.beta
    n_chosen, n_rejected = batch.lengths.to(logp.device).view(-1, 2).unbind(1)  # [P] each, tokens
    chosen, rejected = logp.view(-1, 2).unbind(1)  # [P] each, nats
    if name == "sft":
        return sft(chosen, n_chosen)
    if name == "aot":
        return aot(chosen - rejected, batch["aot_met"].view(-1, 2)[:, 0], beta, smoothing)
    if name == "aot_unpaired":
        met_by_c, met_by_r = batch["aot_crossed"].view(-1, 2).unbind(1)
        return aot_unpaired(c, r, met_by_c, met_by_r, beta, smoothing)
    if name == "exo_pair" and config.label_smoothing is None:
        smoothing = 1e-3
    c, r = (divergence_score(x, config.divergence, config.alpha) for x in (c, r))
    if name == "discopop":
        return discopop(c, r, beta, n_chosen, n_rejected, tau=config.discopop_tau)
    return LOSSES[name](c, r, beta, n_chosen, n_rejected, smoothing if name in DPO_SMOOTHED else 0.0)
