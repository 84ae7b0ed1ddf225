"""SimPO, ORPO and CPO through their classes: a worked pair, its gradient, how pairs are averaged, what is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import Words

from rlhf.interfaces import Algorithm, Context
from rlhf.rows import PreferenceRow
from rlhf_plugins.algorithms.cpo import CPO
from rlhf_plugins.algorithms.orpo import ORPO
from rlhf_plugins.algorithms.preferences import CPOConfig, ORPOConfig, SimPOConfig
from rlhf_plugins.algorithms.simpo import SimPO

Make = Callable[..., Any]

# The worked pair: chosen -10 nats over 5 tokens, rejected -12 over 4. A second one is the same the other way round.
# value, value of the second; gradient a token of the chosen and the rejected; the rewards logged of the first.
CASES: dict[str, tuple[type[Algorithm], Any, float, float, float, float, tuple[float, float]]] = {
    # -log s(+-2 - 1); s(-1) = .268941 by 2/5, 2/4.
    "simpo": (SimPO, SimPOConfig(), 0.313262, 3.048587, -0.1075766, 0.1344707, (-4.0, -6.0)),
    # and half of 2, or of 3, nats a token; .5/5 more for the chosen
    "simpo, sft": (SimPO, SimPOConfig(sft_coef=0.5), 1.313262, 4.548587, -0.2075766, 0.1344707, (-4.0, -6.0)),
    # 2 + .1 x .28875, 3 + .1 x (.28875 + 1.094344); -1/5 - .1 x .0580112, .1 x .0659855
    "orpo": (ORPO, ORPOConfig(), 2.028875, 3.138309, -0.2058011, 0.0065986, (-1.854586, -2.948931)),
    # .598139 + 2, .798139 + 3; -.1 s(-.2) - 1/5, .1 s(-.2)
    "cpo": (CPO, CPOConfig(), 2.598139, 3.798139, -0.2450166, 0.0450166, (-1.0, -1.2)),
    "cpo, options": (CPO, CPOConfig(sft_coef=0.5, label_smoothing=0.1), 1.618139, 2.278139, -0.1350166, 0.0350166,
                     (-1.0, -1.2)),
}  # fmt: skip


def flat(*sums: tuple[float, int]) -> Tensor:
    """Log-probs of sequences of such sums and lengths, uneven within each."""
    weights = [torch.arange(1.0, n + 1, dtype=torch.float64) for _, n in sums]
    return torch.cat([total * w / w.sum() for (total, _), w in zip(sums, weights, strict=True)]).requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_a_worked_pair(context: Context, pairs: Make, batch: Make, hand: Make, name: str) -> None:
    kind, config, value, _, by_chosen, by_rejected, rewards = CASES[name]
    logp = flat((-10.0, 5), (-12.0, 4))
    given = batch(pairs([5, 4]))
    score = hand(policy={"logp": logp})
    loss = kind(config, context).loss(given, score)
    assert [role for role, _ in score.asked] == ["policy"]
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)  # the value's own rounding
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([by_chosen] * 5 + [by_rejected] * 4, abs=5e-7)
    logged = {name: float(part) for name, part in given.logged.items()}
    assert (logged["reward/chosen"], logged["reward/rejected"]) == pytest.approx(rewards, abs=1e-6)
    assert logged["reward/margin"] == pytest.approx(rewards[0] - rewards[1], abs=2e-6)
    assert logged["reward/accuracy"] == 1.0


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_over_the_pairs_of_the_step(
    context: Context, pairs: Make, batch: Make, hand: Make, name: str
) -> None:
    kind, config, value, other, *_ = CASES[name]
    given = batch(pairs([5, 4, 5, 4, 4, 5]))
    score = hand(policy={"logp": flat(*[(-10.0, 5), (-12.0, 4)] * 2, (-12.0, 4), (-10.0, 5))})
    loss = kind(config, context).loss(given, score)
    assert float(loss.detach()) == pytest.approx((2 * value + other) / 3, abs=1e-6)
    assert float(given.logged["reward/accuracy"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [SimPO, ORPO, CPO])
def test_a_row_becomes_the_chosen_and_then_the_rejected(context: Context, kind: type[Algorithm]) -> None:
    row = PreferenceRow("why", chosen="good", rejected="x")
    chosen, rejected = kind(None, context).examples(row, Words())  # type: ignore[arg-type]
    assert chosen.prompt.tolist() == rejected.prompt.tolist() == [3]
    assert (chosen.response.tolist(), rejected.response.tolist()) == ([4, 0], [1, 0])
    assert kind.unit == "group"  # or a pair could be cut in two
