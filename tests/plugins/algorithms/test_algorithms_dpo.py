"""DPO through its class: each loss at one worked pair, its gradient, the first step, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from worked import Words

from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.rows import PreferenceRow
from rlhf.world import World
from rlhf_plugins.algorithms.dpo import DPO
from rlhf_plugins.algorithms.preferences import DPOConfig

Make = Callable[..., Any]


def dpo(context: Context, **options: Any) -> DPO:
    return DPO(DPOConfig(**options), context)


def flat(*sums: tuple[float, int]) -> Tensor:
    """Log-probs of sequences of such sums and lengths, uneven within each, so that a mean isn't taken for a sum."""
    parts = []
    for total, n in sums:
        weights = torch.arange(1.0, n + 1, dtype=torch.float64)
        parts.append(total * weights / weights.sum())
    return torch.cat(parts).requires_grad_()


def learnt(algorithm: DPO, pairs: Make, batch: Make, hand: Make, *of_pairs: Any) -> tuple[Tensor, Any, Tensor]:
    """(loss, batch, log-probs): each pair is (chosen, rejected) of (policy's sum, reference's sum, tokens)."""
    members = [member for pair in of_pairs for member in pair]
    logp = flat(*((policy, n) for policy, _, n in members))
    score = hand(policy={"logp": logp}, reference={"logp": flat(*((ref, n) for _, ref, n in members)).detach()})
    experience = algorithm.experience(pairs([n for _, _, n in members]), score)
    assert [role for role, _ in score.asked] == ["reference"]
    given = batch(algorithm.prepare(experience, score))
    score.asked.clear()
    loss = algorithm.loss(given, score)
    assert [role for role, _ in score.asked] == ["policy"]  # the reference is not run again
    return loss, given, logp


# c = policy - reference of the chosen = 1 over 5 tokens, r of the rejected = -.5 over 4: D = 1.5, beta .1.
PAIR = ((-10.0, -11.0, 5), (-12.0, -11.5, 4))


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, 0.620957),  # -log s(.15)
        ({"loss": "hinge"}, 0.85),  # 1 - .15
        ({"loss": "ipo"}, 21.855625),  # (1/5 + .5/4 - 5)^2 = 4.675^2
        ({"label_smoothing": 0.1}, 0.635957),  # .9 x .620957 + .1 x .770957
        ({"loss": "exo_pair"}, 2.505517),  # eps .001, unless another is given
        ({"loss": "robust", "label_smoothing": 0.1}, 0.602207),
        ({"loss": "nca_pair"}, 1.350825),
        ({"loss": "bco_pair"}, 1.312856),
        ({"loss": "sppo_hard"}, 36.25),
        ({"loss": "apo_zero"}, 0.962523),
        ({"loss": "apo_down"}, 0.987549),
        ({"loss": "discopop"}, 0.849338),
        ({"loss": "discopop", "discopop_tau": 1e9}, 0.7408325),  # (.620957 + .860708) / 2
        ({"loss": "sigmoid_norm"}, 0.677029),
        ({"loss": "sft"}, 2.0),  # 10 nats over 5 tokens
        ({"loss": "sigmoid:0.8,sft:0.2"}, 0.896766),  # .8 x .620957 + .2 x 2
        ({"loss": "sigmoid,hinge", "label_smoothing": 0.1}, 1.485957),  # .635957 + .85: hinge has no smoothing
        ({"divergence": "forward_kl"}, 0.631154),
        ({"divergence": "js"}, 0.660652),
        ({"divergence": "alpha"}, 0.627691),
        ({"divergence": "alpha", "alpha": 0.3, "loss": "sigmoid:0.5,sft:0.5"}, 1.312719),  # (.625438 + 2) / 2
        ({"loss": "aot"}, 0.620957),  # one pair meets itself
        ({"loss": "aot_unpaired", "label_smoothing": 0.1}, 0.635957),
    ],
    ids=str,
)
def test_loss_of_a_worked_pair(
    context: Context, pairs: Make, batch: Make, hand: Make, options: dict[str, Any], value: float
) -> None:
    loss, _, _ = learnt(dpo(context, beta=0.1, **options), pairs, batch, hand, PAIR)
    assert float(loss.detach()) == pytest.approx(value, abs=5e-7)  # the value's own rounding, to six digits


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"loss": "hinge"}, {"loss": "ipo"}], ids=str)
def test_gradient_raises_the_chosen_and_lowers_the_rejected(
    context: Context, pairs: Make, batch: Make, hand: Make, options: dict[str, Any]
) -> None:
    loss, _, logp = learnt(dpo(context, beta=0.1, **options), pairs, batch, hand, PAIR)
    loss.backward()
    s = 1 / (1 + math.exp(-0.15))
    slopes = {"": -0.1 * (1 - s), "label_smoothing": -0.1 * (0.9 * (1 - s) - 0.1 * s), "hinge": -0.1, "ipo": 0.0}
    slope = slopes[options.get("loss", next(iter(options), ""))]
    chosen, rejected = slope, -slope
    if options.get("loss") == "ipo":  # 2 (c/5 - r/4 - 5) / n
        chosen, rejected = 2 * -4.675 / 5, 2 * 4.675 / 4
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([chosen] * 5 + [rejected] * 4, rel=1e-9)


def test_the_mean_is_over_the_pairs_of_the_step(context: Context, pairs: Make, batch: Make, hand: Make) -> None:
    other = ((-8.0, -6.0, 3), (-4.0, -5.0, 2))  # c = -2, r = 1: D = -3
    loss, given, _ = learnt(dpo(context, beta=0.1), pairs, batch, hand, PAIR, other)
    first, second = math.log1p(math.exp(-0.15)), math.log1p(math.exp(0.3))
    assert float(loss.detach()) == pytest.approx((first + second) / 2, rel=1e-9)
    assert {name: float(part) for name, part in given.logged.items()} == pytest.approx(
        {
            "reward/accuracy": 0.5,
            "reward/margin": 0.1 * (1.5 - 3.0) / 2,
            "reward/chosen": 0.1 * (1.0 - 2.0) / 2,
            "reward/rejected": 0.1 * (-0.5 + 1.0) / 2,
        },
        rel=1e-6,  # logged in float32
    )


def test_before_the_first_step_the_loss_is_log_2(context: Context, pairs: Make, batch: Make, hand: Make) -> None:
    same = ((-10.0, -10.0, 5), (-12.0, -12.0, 4))
    loss, given, _ = learnt(dpo(context), pairs, batch, hand, same)
    assert float(loss.detach()) == math.log(2)
    assert float(given.logged["reward/margin"]) == 0.0


def test_a_row_becomes_the_chosen_and_then_the_rejected(context: Context) -> None:
    row = PreferenceRow("why", chosen="good", rejected="x")
    chosen, rejected = dpo(context).examples(row, Words())  # type: ignore[arg-type]
    assert chosen.prompt.tolist() == rejected.prompt.tolist() == [3]
    assert (chosen.response.tolist(), rejected.response.tolist()) == ([4, 0], [1, 0])
    assert DPO.unit == "group"  # or a pair could be cut in two


@pytest.mark.parametrize("wrong", [{"label_smoothing": 0.1, "loss": "ipo"}, {"beta": 0.0}, {"label_smoothing": 0.5}])
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    config, problems = structure(DPOConfig, wrong, "--algo.")
    assert config is None and next(iter(wrong)) in str(problems[0]).replace("-", "_")


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        ("sigmoit", "not 'sigmoit'"),
        ("sigmoid:0.8,sigmoid:0.2", "names sigmoid twice"),
        ("sigmoid:x", "not 'x'"),
        ("sigmoid:0", "not '0'"),
        ("sigmoid:inf", "not 'inf'"),
        ("sigmoid:", "not ''"),
        ("", "not ''"),
    ],
)
def test_losses_that_cannot_be_read(loss: str, why: str) -> None:
    config, problems = structure(DPOConfig, {"loss": loss}, "--algo.")
    assert config is None and why in str(problems[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "sft", "divergence": "js", "label_smoothing": 0.1},
        {"loss": "aot", "divergence": "js"},
        {"loss": "sigmoid,nca_pair", "divergence": "alpha"},
        {"loss": "exo_pair", "label_smoothing": 0.0},
    ],
    ids=str,
)
def test_losses_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    config, _ = structure(DPOConfig, wrong, "--algo.")
    assert config is None


def test_no_other_forward_than_the_losses_need(context: Context, pairs: Make, hand: Make) -> None:
    score = hand(policy={"logp": flat((-1.0, 1), (-2.0, 1))})
    experience = pairs([1, 1], logp_ref=torch.zeros(2))
    assert dpo(context, loss="sigmoid,sft").prepare(experience, score) is experience and not score.asked


# Differences of the policy: 2, -1, .5; of the reference: 0, 1, -2. Sorted: -1 meets -2, .5 meets 0, 2 meets 1.
# Log-ratios c = 1, -2, .5 and r = -1, 0, -2 meet as 1-0, -2--2, .5--1.
THREE = [((-1.0, -2.0), (-3.0, -2.0)), ((-4.0, -2.0), (-3.0, -3.0)), ((-2.5, -3.0), (-3.0, -1.0))]
"""(policy's, reference's) of the chosen, then of the rejected."""
AOT = {"aot": (1.0, 1.0, 0.5), "aot_unpaired": (1.0, 0.0, 1.5)}


@pytest.mark.parametrize("loss", AOT)
def test_aot_sorts_over_ranks_and_micro_batches(
    context: Context, pairs: Make, hand: Make, fake_ranks: Make, loss: str
) -> None:
    """Two ranks, the first with the pairs 2 and 0, the second with 1; each pair a micro-batch of its own."""

    def one(which: list[int]) -> Callable[[World], list[tuple[int, float]]]:
        def work(world: World) -> list[tuple[int, float]]:
            algorithm = dpo(attrs.evolve(context, world=world), loss=loss, beta=1.0)
            found = []
            policy = torch.tensor([p for i in which for p, _ in THREE[i]])
            reference = torch.tensor([q for i in which for _, q in THREE[i]])
            base = pairs([1, 1] * len(which), logp_ref=reference)
            group = torch.tensor(which).repeat_interleave(2)
            experience = Experience(attrs.evolve(base.sequences, group=group), logp_ref=reference)
            prepared = algorithm.prepare(experience, hand(policy={"logp": policy}))
            for j, i in enumerate(which):
                rows = torch.tensor([2 * j, 2 * j + 1])
                part = Batch(prepared.select(rows), Totals(6, 6, 3))
                found.append((i, float(algorithm.loss(part, hand(policy={"logp": policy[rows]})))))
            return found

        return work

    found = dict(pair for rank in fake_ranks(one([2, 0]), one([1])) for pair in rank)
    wanted = [math.log1p(math.exp(-d)) / 3 for d in AOT[loss]]
    assert [found[i] for i in range(3)] == pytest.approx(wanted, rel=1e-6)  # float32
