"""What algorithms on preference pairs without a reference have in common: two sequences a row, their log-probs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Batch, Codec, Example, PreferenceRow, Score, group_mean, sequence_sum


def pair_examples(row: PreferenceRow, codec: Codec) -> Iterable[Example]:
    """The chosen, then the rejected."""
    prompt = codec.prompt(row.prompt)
    for text in (row.chosen, row.rejected):
        yield Example(prompt, codec.response(text, row.prompt))


def pair_logps(batch: Batch, score: Score) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs summed over the chosen's tokens, the rejected's, nats; tokens of the chosen, of the rejected): [P]."""
    logp = sequence_sum(score(batch, "policy").logp, batch)  # [B], nats
    chosen, rejected = logp.view(-1, 2).unbind(1)
    n_chosen, n_rejected = batch.lengths.to(logp.device).view(-1, 2).unbind(1)
    return chosen, rejected, n_chosen, n_rejected


def log_rewards(batch: Batch, chosen: Tensor, rejected: Tensor) -> None:
    """Report what takes the place of a pair's rewards: [P] each."""
    batch.log("reward/accuracy", group_mean((chosen > rejected).float(), batch))
    batch.log("reward/margin", group_mean(chosen - rejected, batch))
    batch.log("reward/chosen", group_mean(chosen, batch))
    batch.log("reward/rejected", group_mean(rejected, batch))
