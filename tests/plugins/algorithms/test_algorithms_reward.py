"""Reward modelling through its class: values and gradients worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import Context
from rlhf.rows import PreferenceRow
from rlhf_plugins.algorithms import RewardConfig
from rlhf_plugins.algorithms.reward import RewardModelling

Make = Callable[..., Any]


def test_loss_and_gradient_by_hand(context: Context, pairs: Make, batch: Make, hand: Make) -> None:
    algorithm = RewardModelling(RewardConfig(centre_coef=0.01), context)
    score = torch.tensor([1.5, 0.2, -0.3, 0.4], dtype=torch.float64, requires_grad=True)  # two pairs
    margin = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    given = batch(pairs([3, 2, 2, 4], margin=margin))
    loss = algorithm.loss(given, hand(reward={"score": score}))
    first = math.log1p(math.exp(-(1.5 - 0.2 - 0.5))) + 0.01 * 1.7**2
    second = math.log1p(math.exp(0.7)) + 0.01 * 0.1**2
    assert float(loss.detach()) == pytest.approx((first + second) / 2, rel=1e-12)  # a mean over pairs, in float64

    loss.backward()
    s1, s2 = 1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.7))  # 1 - s(difference)
    assert score.grad is not None
    assert score.grad.tolist() == pytest.approx(
        [(-s1 + 0.034) / 2, (s1 + 0.034) / 2, (-s2 + 0.002) / 2, (s2 + 0.002) / 2], rel=1e-9
    )
    assert {name: float(part) for name, part in given.logged.items()} == pytest.approx(
        {"reward/accuracy": 0.5, "reward/margin": 0.3, "reward/chosen": 0.6, "reward/rejected": 0.3},
        rel=1e-6,  # logged in float32
    )


def test_equal_scores_cost_log_2_and_no_pair_is_right(context: Context, pairs: Make, batch: Make, hand: Make) -> None:
    given = batch(pairs([1, 1], margin=torch.zeros(2, dtype=torch.float64)))
    score = hand(reward={"score": torch.zeros(2, dtype=torch.float64)})
    assert float(RewardModelling(RewardConfig(), context).loss(given, score)) == math.log(2)
    assert float(given.logged["reward/accuracy"]) == 0.0


class Words:
    eos = 0

    def prompt(self, prompt: Any) -> Tensor:
        return torch.tensor([len(prompt)])

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        assert end  # the score is read at EOS
        return torch.tensor([len(text), 0])


@pytest.mark.parametrize(("use_margin", "margin", "expected"), [(True, 2.5, 2.5), (True, None, 0.0), (False, 2.5, 0.0)])
def test_a_row_becomes_the_chosen_and_then_the_rejected_with_its_margin(
    context: Context, use_margin: bool, margin: float | None, expected: float
) -> None:
    algorithm = RewardModelling(RewardConfig(use_margin=use_margin), context)
    row = PreferenceRow("why", "good", "x", margin)
    chosen, rejected = algorithm.examples(row, Words())  # type: ignore[arg-type]
    assert (chosen.response.tolist(), rejected.response.tolist()) == ([4, 0], [1, 0])
    assert chosen.fields == rejected.fields == {"margin": expected}
    assert RewardModelling.unit == "group"  # or a pair could be cut in two
