"""Supervised fine-tuning (Ouyang et al. 2022): the mean negative log-likelihood of the tokens to be learnt.

    L = - (1/T) sum_t log pi(y_t | x, y_<t)        T: the step's tokens that are learnt, over all sequences

A chat's tokens between assistant turns are context, not learnt. Left out: NEFTune noise, and any loss weights.

    rlhf run --algo sft --model MODEL --data rows.jsonl --algo.packing
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, CompletionRow, Example, Score, completion_example, token_mean
from rlhf_plugins.algorithms import SFTConfig
from rlhf_plugins.functional.packing import pack


class SFT(Algorithm):
    config: SFTConfig

    def examples(self, row: CompletionRow, codec: Codec) -> Iterable[Example]:
        example = completion_example(row, codec)
        if self.config.loss_on == "all":
            whole = torch.cat([example.prompt, example.response])
            example = Example(whole[:1], whole[1:])
        yield example

    def bundles(self, lengths: Sequence[int]) -> Iterable[Sequence[int]]:
        if not self.config.packing:
            return super().bundles(lengths)
        short = [i for i, n in enumerate(lengths) if n <= self.config.pack_length]
        alone = [[i] for i, n in enumerate(lengths) if n > self.config.pack_length]
        packed = pack([lengths[i] for i in short], self.config.pack_length)
        return [[short[i] for i in item] for item in packed] + alone

    def loss(self, batch: Batch, score: Score) -> Tensor:
        logp = score(batch, "policy").logp  # [N], nats
        return token_mean(-logp, batch)  # divides by the step's learnt tokens
