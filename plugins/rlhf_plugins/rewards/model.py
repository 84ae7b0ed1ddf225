"""A reward model: a sequence classifier with one label, read at the response's last token.

Where its tokenizer and chat template are the policy's, it scores the very tokens that were sampled. Where they are
not, it gets text: the row's own prompt and the response's text, encoded by its own tokenizer and template; a response
that ended by itself is closed as its own template closes turns, one that ran into the length limit stays open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rlhf.api import (
    Codec,
    Context,
    Failed,
    Problem,
    RequestError,
    Reward,
    Rollouts,
    RowError,
    Score,
)
from rlhf_plugins.rewards import samples
from rlhf_plugins.vocabulary import same_vocabulary

Encoded = tuple[Tensor, Tensor] | Failed
"""A sample as the reward model reads it: int64 [P] prompt and int64 [R] response; or why it can't be."""


class RewardModel(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where `template same` is asked for and the tokenizers differ.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        plan, policy = context.plan, context.policy
        assert policy is not None  # rewards are made after it
        component = next(reward for reward in plan.rewards if reward.key == context.label)
        self._role = plan.role(component.label or "reward")  # a labelled reward's role has its label's name
        self._codec = policy.codec(self._role.model.path)
        sampled = policy.codec(plan.role("policy").model.path)
        readable = same_vocabulary(sampled, self._codec)
        if config.template == "same" and not readable:
            what = (
                f"--reward.{component.key}.template same: {self._role.model.path} has another tokenizer than the policy"
            )
            raise RequestError(Problem(what, f"--reward.{component.key}.template own gives it text"))
        self._encodes = config.template == "own" or (
            config.template == "auto" and not (readable and same_template(sampled, self._codec))
        )

    def judge(self, rollouts: Rollouts, score: Score) -> list[float | Failed]:
        """B scores; Failed where a sample is longer than the reward model can read."""
        encoded = list(self._encode(rollouts) if self._encodes else self._sampled(rollouts))
        longest = self._role.model.context
        for i, one in enumerate(encoded):
            if longest is not None and not isinstance(one, Failed) and len(one[0]) + len(one[1]) > longest:
                encoded[i] = Failed(f"{len(one[0]) + len(one[1])} tokens; the reward model reads at most {longest}")
        readable = [one for one in encoded if not isinstance(one, Failed)]
        in_order = iter(score(samples.sequences(rollouts, readable), self._role.name).score.tolist())
        return [one if isinstance(one, Failed) else next(in_order) for one in encoded]

    @staticmethod
    def _sampled(rollouts: Rollouts) -> Iterable[Encoded]:
        """The tokens as they were sampled."""
        responses = rollouts.sequences.responses()
        return ((rollouts.sequences.prompt(i), response) for i, response in enumerate(responses))

    def _encode(self, rollouts: Rollouts) -> Iterable[Encoded]:
        """The texts, by the reward model's own tokenizer and template."""
        prompts: dict[int, Tensor] = {}  # by row: a group's is encoded once
        return (self._encode_one(rollouts, i, prompts) for i in range(len(rollouts)))

    def _encode_one(self, rollouts: Rollouts, i: int, prompts: dict[int, Tensor]) -> Encoded:
        row, prompt = id(rollouts.rows[i]), samples.prompt(rollouts, i)
        try:
            if row not in prompts:
                prompts[row] = self._codec.prompt(prompt)
            response = self._codec.response(rollouts.texts[i], prompt, end=rollouts.finish[i] == "stop")
        except RowError as error:
            return Failed(f"the reward model can't read it: {error}")
        return prompts[row], response


def same_template(policy: Codec, other: Codec) -> bool:
    """Whether `other` has the policy's chat template, or none that could differ."""
    ours, theirs = (getattr(getattr(codec, "tokenizer", None), "chat_template", None) for codec in (policy, other))
    return theirs is None or theirs == ours
