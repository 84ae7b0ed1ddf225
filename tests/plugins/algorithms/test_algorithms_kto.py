"""KTO through its class: worked rows, the baseline over ranks, and what a row becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from worked import Words

from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Context
from rlhf.rows import LabelledRow
from rlhf.scores import Scores
from rlhf.sequences import Sequences
from rlhf.world import World
from rlhf_plugins.algorithms.kto import KTO
from rlhf_plugins.algorithms.preferences import KTOConfig

Make = Callable[..., Any]


class Sums:
    """A score by hand: each token's log-prob is its id times the role's, so that a log-ratio is the tokens' sum times
    the difference. Knows what it was asked for."""

    def __init__(self, policy: float, reference: float) -> None:
        self.factors = {"policy": policy, "reference": reference}
        self.asked: list[tuple[str, list[list[int]], list[list[int]]]] = []

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        s: Sequences = of if isinstance(of, Sequences) else of.sequences
        responses = [part.tolist() for part in s.tokens.split(s.lengths.tolist())]
        self.asked.append((role, [s.prompts[i].tolist() for i in s.prompt_of.tolist()], responses))
        return Scores(role, logp_=s.tokens.float() * self.factors[role])


ROWS = [([7], [1]), ([7, 7], [2]), ([8], [3, 4]), ([9] * 4, [5, 6, 7])]
"""(prompt, completion). Log-ratios of the completions, at a difference of 0.1: .1, .2, .7, 1.8."""


def experience(which: list[int], labels: list[float]) -> Experience:
    s = Sequences.of([torch.tensor(ROWS[i][0]) for i in which], [torch.tensor(ROWS[i][1]) for i in which], group=which)
    return Experience(s, label=torch.tensor(labels))


def kto(context: Context, **options: Any) -> KTO:
    return KTO(KTOConfig(**options), context)


def test_worked_rows(context: Context, batch: Make) -> None:
    """x = .1 and .7, z = .4, their mean."""
    algorithm = kto(context, kl_baseline="matched", desirable_weight=0.5, undesirable_weight=0.9)
    score = Sums(0.1, 0.0)
    rows = algorithm.experience(experience([0, 2], [1.0, 0.0]), score)  # type: ignore[arg-type]
    given = batch(algorithm.prepare(rows, score))  # type: ignore[arg-type]
    loss = algorithm.loss(given, score)  # type: ignore[arg-type]
    # .5 / (1 + e^-.03) = .253750 of the good, which is below z; .9 x .507499 of the bad, above it
    assert float(loss) == pytest.approx((0.2537497 + 0.4567495) / 2, abs=1e-6)
    assert float(given.logged["reward/accuracy"]) == 0.0
    assert float(given.logged["reward/margin"]) == pytest.approx(-0.03, abs=1e-6)
    assert context.metrics.drain(World())["kl/baseline"] == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize(("kind", "z"), [("mismatched", 0.7), ("matched", 0.7), ("none", 0.0)])
@pytest.mark.parametrize("ranks", [[[0, 1, 2, 3]], [[2, 0], [3, 1]], [[], [1, 3, 0, 2]]], ids=str)
def test_the_baseline_is_of_the_whole_minibatch(
    context: Context, fake_ranks: Make, ranks: list[list[int]], kind: str, z: float
) -> None:
    """Mismatched: each prompt with the completion of the row after it, the last one's with the first's; none is cut,
    since the longest sequence has 7 tokens. Both means are (.1 + .2 + .7 + 1.8) / 4."""

    def one(which: list[int]) -> Callable[[World], Any]:
        def work(world: World) -> Any:
            algorithm = kto(attrs.evolve(context, world=world), kl_baseline=kind)
            score = Sums(0.1, 0.0)
            rows = algorithm.experience(experience(which, [1.0] * len(which)), score)  # type: ignore[arg-type]
            score.asked.clear()
            return algorithm.prepare(rows, score)["baseline"].tolist(), score.asked  # type: ignore[arg-type]

        return work

    found = fake_ranks(*(one(which) for which in ranks))
    for which, (baseline, asked) in zip(ranks, found, strict=True):
        assert baseline == pytest.approx([z] * len(which), abs=1e-6)
        assert [role for role, *_ in asked] == {"mismatched": ["policy", "reference"], "matched": ["policy"]}.get(
            kind, []
        )
        if kind == "mismatched":
            for _, prompts, responses in asked:
                assert prompts == [ROWS[i][0] for i in which]
                assert responses == [ROWS[(i + 1) % 4][1] for i in which]


def test_a_mismatched_completion_is_cut_at_the_longest_sequence(context: Context) -> None:
    """A prompt of 4 with the next row's completion of 3, where no sequence is longer than 5: one token of it."""
    s = Sequences.of([torch.tensor([9] * 4), torch.tensor([7])], [torch.tensor([5]), torch.tensor([1, 2, 3])])
    score = Sums(0.1, 0.0)
    rows = Experience(s, label=torch.ones(2), logp_ref=torch.zeros(2))
    found = kto(context).prepare(rows, score)  # type: ignore[arg-type]
    assert score.asked[0][2] == [[1], [5]]
    assert found["baseline"].tolist() == pytest.approx([0.3, 0.3], abs=1e-6)  # (.1 + .5) / 2


def test_the_baseline_is_never_below_0_and_of_one_row_0(context: Context) -> None:
    rows = Experience(experience([0, 3], [1.0, 1.0]), logp_ref=torch.zeros(2))
    assert kto(context).prepare(rows, Sums(-0.1, 0.0))["baseline"].tolist() == [0.0, 0.0]  # type: ignore[arg-type]
    alone = Experience(experience([3], [1.0]), logp_ref=torch.zeros(1))
    assert kto(context).prepare(alone, Sums(0.1, 0.0))["baseline"].tolist() == [0.0]  # type: ignore[arg-type]


def test_the_mean_is_over_the_completions_of_the_step(context: Context) -> None:
    rows = Experience(experience([0, 2], [1.0, 0.0]), logp_ref=torch.zeros(2), baseline=torch.zeros(2))
    loss = kto(context).loss(Batch(rows, Totals(30, 10, 10)), Sums(0.0, 0.0))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(1 / 10)  # two halves over ten


def test_what_a_row_becomes(context: Context) -> None:
    for label in (True, False):
        (found,) = kto(context).examples(LabelledRow("why", "good", label), Words())  # type: ignore[arg-type]
        assert (found.prompt.tolist(), found.response.tolist()) == ([3], [4, 0])
        assert found.fields == {"label": float(label)}
