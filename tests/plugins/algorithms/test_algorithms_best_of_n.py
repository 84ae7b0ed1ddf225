"""Best of n: which responses are kept, what is counted, and the loss of those kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from worked import close, double

from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.sequences import Prompt
from rlhf.world import World
from rlhf_plugins.algorithms.best_of_n import BestOfN
from rlhf_plugins.algorithms.samples import BestOfNConfig

Make = Callable[..., Any]
# Three prompts with three responses each: one best, two that share the best place, three alike.
REWARDS = [0.2, 0.9, 0.5, 0.4, 0.1, 0.4, 0.3, 0.3, 0.3]
GROUP = [0, 0, 0, 1, 1, 1, 2, 2, 2]
LENGTHS = [1, 2, 1, 3, 1, 1, 1, 1, 1]


def kept(context: Context, rollouts: Make, hand: Make, **options: Any) -> list[int]:
    """Places of the rollouts that are learnt."""
    algorithm = BestOfN(BestOfNConfig(group_size=3, **options), context)
    score = hand()
    found = algorithm.experience(rollouts(LENGTHS, REWARDS, group=GROUP), score)
    assert not score.asked and found.places is not None  # it costs no forward
    return found.places.tolist()


def test_several_responses_are_asked_for(context: Context) -> None:
    prompt = Prompt(torch.tensor([1]), None, 0)
    assert [s.count for s in BestOfN(BestOfNConfig(group_size=5), context).requests([prompt, prompt])] == [5, 5]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, [1, 3]),  # of two that share the best place the first; none of the flat group
        ({"keep": 2}, [1, 2, 3, 5]),
        ({"keep_flat": True}, [1, 3, 6]),
        ({"threshold": 0.4}, [1, 3]),  # at least, not more than
        ({"threshold": 0.41}, [1]),
        ({"keep": 2, "threshold": 0.6}, [1]),
        ({"threshold": 1.0}, []),
    ],
    ids=str,
)
def test_the_best_are_kept(
    context: Context, rollouts: Make, hand: Make, options: dict[str, Any], places: list[int]
) -> None:
    assert kept(context, rollouts, hand, **options) == places


def test_what_is_left_out_is_counted(context: Context, rollouts: Make, hand: Make) -> None:
    kept(context, rollouts, hand, threshold=0.5)
    assert context.metrics.drain(World()) == pytest.approx(
        {"group/flat": 1 / 3, "group/tied": 1 / 3, "group/below_threshold": 1 / 2, "group/kept": 1 / 9,
         "reward/kept": 0.9}, rel=1e-12,
    )  # fmt: skip


def test_the_loss_is_the_mean_over_the_tokens_that_are_kept(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    algorithm = BestOfN(BestOfNConfig(group_size=3), context)
    given = batch(algorithm.experience(rollouts(LENGTHS, REWARDS, group=GROUP), hand()))
    logp = double([-1.0, -2.0, -0.5, -0.25, -3.0], gradient=True)  # 2 tokens of the one, 3 of the other
    loss = algorithm.loss(given, hand(policy={"logp": logp}))
    assert float(loss.detach()) == pytest.approx(6.75 / 5, rel=1e-12)
    loss.backward()
    assert logp.grad is not None
    close(logp.grad, [-0.2] * 5)


def test_keeping_all_is_refused() -> None:
    config, problems = structure(BestOfNConfig, {"group_size": 4, "keep": 4}, "--algo.")
    assert config is None and "leaves none out" in str(problems[0])
