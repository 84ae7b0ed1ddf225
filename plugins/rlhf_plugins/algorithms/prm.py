"""Process reward modelling (Lightman et al. 2023, arXiv:2305.20050; Uesato et al. 2022): each step right or wrong.

    L = mean over steps k of BCE(sigmoid(r(x, s_1 .. s_k)), label_k)        label: 0, 1, or a share between

r is a scalar head read at the last token of a step's separator, started at N(0, 1/sqrt(d+1)); all steps of a completion
are read in one forward. The mean is over the optimiser step's judged steps, so a long completion weighs more. Give
`--reward prm`, which judges rollouts by it, the same separator.

Left out: a separator token of its own with a vocabulary head's two words in place of the scalar head, and labels that
are made by roll-outs from each step (Math-Shepherd), which are the data's to bring.

    rlhf run --algo prm --model MODEL --data steps.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.api import Algorithm, Batch, Codec, Example, Score, StepRow, token_mean
from rlhf_plugins import steps
from rlhf_plugins.algorithms.processes import PRMConfig
from rlhf_plugins.functional.ragged import after_tokens


class PRM(Algorithm):
    config: PRMConfig

    def examples(self, row: StepRow, codec: Codec) -> Iterable[Example]:
        longest = self.context.plan.role("prm").model.context
        prompt, response, ends = steps.encode(codec, row.prompt, row.steps, self.config.separator, longest)
        labels = torch.zeros(len(response)).masked_scatter(ends, torch.tensor(row.labels))  # [R]
        yield Example(prompt, response, ends, token_fields={"label": labels})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        found, label = score(batch, "prm"), batch["label"]
        logits = after_tokens(found.values, found.score, batch.lengths)  # [N], log odds that all is right up to here
        losses = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        batch.log("step/accuracy", token_mean(((logits > 0) == (label > 0.5)).float(), batch))
        batch.log("step/right", token_mean(label, batch))
        batch.log("step/taken_for_right", token_mean((logits > 0).float(), batch))
        return token_mean(losses, batch)  # own tokens are the steps' ends: divides by the step's judged steps
