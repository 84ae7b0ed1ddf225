"""SFT: which tokens are learnt, and that each of them weighs the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.experience import Experience
from rlhf.interfaces import Context
from rlhf.plan import resource
from rlhf.rows import CompletionRow, Message
from rlhf.sequences import Sequences
from rlhf_plugins.algorithms import SFTConfig
from rlhf_plugins.algorithms.sft import SFT
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.codec import HFCodec

Make = Callable[..., Any]


def test_the_mean_is_over_the_learnt_tokens_alone(context: Context, batch: Make, hand: Make) -> None:
    sequences = Sequences.of(
        [torch.tensor([1]), torch.tensor([2])],
        [torch.tensor([3, 4, 5]), torch.tensor([6])],
        masks=[torch.tensor([True, False, True]), None],
    )
    logp = torch.tensor([-1.0, -100.0, -2.0, -6.0], dtype=torch.float64, requires_grad=True)
    loss = SFT(SFTConfig(), context).loss(batch(Experience(sequences)), hand(policy={"logp": logp}))
    assert float(loss.detach()) == 3.0  # (1 + 2 + 6) / 3: not a mean of the sequences' means, 3.75
    loss.backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-1 / 3, 0, -1 / 3, -1 / 3], rel=1e-12)


class Spoken:
    """Ten tokens of a chat, of which the assistant says four in two turns."""

    eos = 0

    def __init__(self, mask: Sequence[int] = (0, 0, 0, 1, 1, 0, 0, 0, 1, 1)) -> None:
        self.mask = torch.tensor(mask, dtype=torch.bool)

    def chat(self, messages: Sequence[Message]) -> tuple[Tensor, Tensor]:
        return torch.arange(10), self.mask

    def prompt(self, prompt: Any) -> Tensor:
        return torch.arange(3)

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        assert end and prompt == "why"
        return torch.tensor([7, 8, 0])


CHAT = CompletionRow("", "", ({"role": "user", "content": "x"},))


def one(config: SFTConfig, context: Context, row: CompletionRow, codec: Any) -> tuple[list[int], list[int], Any]:
    (example,) = SFT(config, context).examples(row, codec)
    mask = None if example.mask is None else example.mask.int().tolist()
    return example.prompt.tolist(), example.response.tolist(), mask


def test_a_completion_is_learnt_with_its_end_and_its_prompt_is_not(context: Context) -> None:
    found = one(SFTConfig(), context, CompletionRow("why", "because"), Spoken())
    assert found == ([0, 1, 2], [7, 8, 0], None)


def test_a_users_turns_in_a_chat_are_context(context: Context) -> None:
    assert one(SFTConfig(), context, CHAT, Spoken()) == ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9], [1, 1, 0, 0, 0, 1, 1])


def test_a_chat_that_the_assistant_opens_keeps_a_token_before_the_first_learnt_one(context: Context) -> None:
    prompt, response, mask = one(SFTConfig(), context, CHAT, Spoken([1, 1, 0, 0, 0, 0, 0, 0, 1, 1]))
    assert prompt == [0] and response == list(range(1, 10)) and mask == [1, 0, 0, 0, 0, 0, 0, 1, 1]


def test_learning_on_all_leaves_out_only_the_first_token(context: Context) -> None:
    config = SFTConfig(loss_on="all")
    assert one(config, context, CompletionRow("why", "because"), Spoken()) == ([0], [1, 2, 7, 8, 0], None)
    assert one(config, context, CHAT, Spoken()) == ([0], list(range(1, 10)), None)


def test_a_real_chat_learns_just_what_the_assistant_says(context: Context) -> None:
    codec = HFCodec(str(resource("rlhf_plugins.starter:model")), HFPolicyConfig())
    messages: list[Message] = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Add 3 and 4."},
        {"role": "assistant", "content": "7"},
    ]
    row = CompletionRow.from_record({"messages": messages})
    (example,) = SFT(SFTConfig(), context).examples(row, codec)
    assert example.mask is not None
    learnt = codec.tokenizer.decode(example.response[example.mask])
    context_ = codec.tokenizer.decode(torch.cat([example.prompt, example.response[~example.mask]]))
    assert "2" in learnt and "7" in learnt and "Add" not in learnt and "1 + 1" not in learnt
    assert "1 + 1" in context_ and "Add 3 and 4." in context_ and "7" not in context_
    ends = [int(token) in codec.stops for token in example.response[example.mask]]
    assert sum(ends) == 2 and ends[-1]  # each turn is learnt with its end
    whole, _ = codec.chat(messages)
    assert torch.equal(torch.cat([example.prompt, example.response]), whole)


def test_rows_are_packed_best_fit_decreasing_and_long_ones_stand_alone(context: Context) -> None:
    algorithm = SFT(SFTConfig(packing=True, pack_length=4), context)
    assert [list(item) for item in algorithm.bundles([3, 4, 1])] == [[1], [0, 2]]
    assert [list(item) for item in algorithm.bundles([5, 3, 9, 1])] == [[1, 3], [0], [2]]
    assert [list(item) for item in algorithm.bundles([])] == []
    assert [list(item) for item in SFT(SFTConfig(), context).bundles([3, 4, 1])] == [[0], [1], [2]]
