"""Online DPO: which responses become pairs, what is counted, and that the losses are those of DPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from worked import double

from rlhf.interfaces import Context
from rlhf.sequences import Prompt
from rlhf.world import World
from rlhf_plugins.algorithms.online_dpo import OnlineDPO
from rlhf_plugins.algorithms.samples import OnlineDPOConfig

Make = Callable[..., Any]
# Three prompts: the second response is the better; all alike; the first of four is the worst, the third the best.
REWARDS = [0.0, 1.0, 0.5, 0.5, -1.0, 0.0, 2.0, 0.5]
GROUP = [0, 0, 1, 1, 2, 2, 2, 2]
LENGTHS = [4, 5, 1, 1, 2, 1, 3, 1]
PAIRS = [5, 4, 3, 2]  # lengths of the chosen and the rejected, pair by pair


def online_dpo(context: Context, **options: Any) -> OnlineDPO:
    return OnlineDPO(OnlineDPOConfig(**options), context)


def test_two_responses_are_asked_for_or_more(context: Context) -> None:
    prompt = Prompt(torch.tensor([1]), None, 0)
    assert [s.count for s in online_dpo(context).requests([prompt, prompt])] == [2, 2]
    assert [s.count for s in online_dpo(context, group_size=4).requests([prompt])] == [4]


def test_the_better_is_chosen_and_ties_are_left_out_and_counted(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    reference = torch.arange(1.0, 15.0, dtype=torch.float64)
    score = hand(reference={"logp": -reference})
    made = attrs.evolve(rollouts(LENGTHS, REWARDS, group=GROUP), temperature=0.7)
    found = online_dpo(context).experience(made, score)
    assert score.asked == [("reference", False)]
    assert found.places is not None and found.places.tolist() == [1, 0, 6, 4]
    assert found.lengths.tolist() == PAIRS and found.sequences.group.tolist() == [0, 0, 2, 2]
    assert found["logp_ref"].tolist() == [-15.0, -30.0, -33.0, -27.0]  # sums of 1..5, 6..9, 10..12, 13..14
    assert found.temperature == 0.7 and OnlineDPO.unit == "group"
    assert context.metrics.drain(World()) == {"group/flat": 0.25, "group/gap": 2.0}


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, (math.log1p(math.exp(-0.15)) + math.log1p(math.exp(0.3))) / 2),  # D = 1.5 and -3, beta .1
        ({"loss": "hinge"}, (0.85 + 1.3) / 2),
        ({"loss": "sigmoid:0.5,sft:0.25"}, (math.log1p(math.exp(-0.15)) + math.log1p(math.exp(0.3))) / 4
                                           + 0.25 * (10 / 5 + 6 / 3) / 2),
        ({"loss": "aot"}, (math.log1p(math.exp(0.15)) + math.log(2)) / 2),  # 2 and -1 meet 2 and .5
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_is_that_of_dpo(
    context: Context, rollouts: Make, batch: Make, hand: Make, options: dict[str, Any], value: float
) -> None:
    """Sums of the policy -10, -12 and -6, -5; of the reference -11, -11.5 and -5, -7."""
    sums = {"policy": [-10.0, -12.0, -6.0, -5.0], "reference": [-11.0, -11.5, -5.0, -7.0]}
    logp = {role: torch.cat([double([s / n] * n) for s, n in zip(of, PAIRS, strict=True)]) for role, of in sums.items()}
    algorithm = online_dpo(context, beta=0.1, **options)
    score = hand(**{role: {"logp": of} for role, of in logp.items()})
    experience = algorithm.experience(rollouts(LENGTHS, REWARDS, group=GROUP), score)
    given = batch(algorithm.prepare(experience, score))
    assert float(algorithm.loss(given, score)) == pytest.approx(value, rel=1e-12)
    assert float(given.logged["reward/accuracy"]) == 0.5


def test_a_step_of_ties_alone_teaches_nothing(context: Context, rollouts: Make, hand: Make) -> None:
    score = hand(reference={"logp": torch.zeros(0)})
    found = online_dpo(context).experience(rollouts([1, 2], [1.0, 1.0], group=[0, 0]), score)
    assert len(found) == 0 and context.metrics.drain(World()) == {"group/flat": 1.0}
