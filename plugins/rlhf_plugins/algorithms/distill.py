"""Distillation by whole distributions (Hinton et al. 2015; on-policy: GKD, Agarwal et al. 2024, arXiv:2306.13649).

    L = (1/T) sum_t D(teacher(. | x, y_<t), pi(. | x, y_<t))      T: the step's own tokens
    D: KL(teacher || pi), KL(pi || teacher), or GKD's generalised Jensen-Shannon divergence: `functional.divergence`

`distill` samples y from the policy itself, so it is corrected where it goes wrong; no gradient runs through sampling.
`distill-offline` takes y from the data. D is over the whole vocabulary, a chunk of tokens at a time: neither model's
logits are ever held whole. The teacher must have the policy's tokenizer, which is seen before weights are loaded; with
`--reward`, held-out samples are judged too, and are otherwise compared with the teacher.

Left out: mixing both sources of y (GKD's lambda), a reward in the loss, and teachers with other tokenizers.

    rlhf run --algo distill --model MODEL --model teacher=LARGER --data prompts.jsonl
    rlhf run --algo distill-offline --model MODEL --model teacher=LARGER --data rows.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor

from rlhf.api import (
    Algorithm,
    Batch,
    Codec,
    CompletionRow,
    Context,
    Divergence,
    Example,
    Problem,
    RequestError,
    Score,
    completion_example,
    token_mean,
)
from rlhf_plugins.algorithms.distillation import DistillConfig
from rlhf_plugins.vocabulary import same_vocabulary


class Distill(Algorithm):
    """See the module.

    Raises:
        RequestError: on construction, where the teacher has another tokenizer than the policy.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.policy is None:  # its numbers alone are looked at
            return
        paths = [context.plan.role(name).model.path for name in ("policy", "teacher")]
        if not same_vocabulary(*(context.policy.codec(path) for path in paths)):
            what = f"--model teacher={paths[1]}: has another tokenizer than the policy, {paths[0]}"
            raise RequestError(Problem(what, "give a teacher of the policy's own family: one tokenizer for both"))

    def examples(self, row: CompletionRow, codec: Codec) -> Iterable[Example]:
        yield completion_example(row, codec)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        kind = cast(Divergence, config.divergence)
        found = score.divergence(
            batch, "policy", "teacher", kind=kind, beta=config.beta, temperature=config.temperature
        )  # [N], nats
        return token_mean(found, batch)  # divides by the step's own tokens
