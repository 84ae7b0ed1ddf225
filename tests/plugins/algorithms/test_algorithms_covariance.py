"""Clip-Cov and KL-Cov as options: which tokens are held, the same however a step is cut; what it does to the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from worked import EXACT, NEW, OLD, RHO, close, double

from at_work import Run, plan_of
from rlhf.experience import Batch, Experience
from rlhf.interfaces import Context
from rlhf.options import structure
from rlhf.plan import Plan
from rlhf.world import World
from rlhf_plugins.algorithms.dapo import DAPO
from rlhf_plugins.algorithms.grpo import GRPO
from rlhf_plugins.algorithms.without_critic_options import DAPOConfig, GRPOConfig

Make = Callable[..., Any]
LENGTHS = [3, 2, 1, 4]
LOGP = [-1.0, -0.5, -2.0, -0.7, -1.2, -0.3, -0.9, -1.1, -0.4, -2.2]
ADVANTAGES = [1.0, -1.0, 2.0, -0.5]


def held(config: GRPOConfig, context: Context, made: Any, logp: list[float], advantages: list[float]) -> Tensor:
    class Score:
        def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Any:
            return type("Scores", (), {"logp": double(logp)})

    experience = Experience(made, {"logp_old": double(logp)}, advantages=double(advantages))
    algorithm = GRPO(config, context)
    algorithm.step = 3
    return algorithm.prepare(experience, cast(Any, Score()))["held"] > 0


def covariances() -> Tensor:
    a = torch.repeat_interleave(double(ADVANTAGES), torch.tensor(LENGTHS))
    logp = double(LOGP)
    return (logp - logp.mean()) * (a - a.mean())


def test_the_highest_are_pulled_back(context: Context, rollouts: Make) -> None:
    config = GRPOConfig(covariance="kl", covariance_share=0.35)  # 3 of 10
    found = held(config, context, rollouts(LENGTHS, [0.0] * 4, group=[0, 0, 1, 1]), LOGP, ADVANTAGES)
    assert sorted(found.nonzero().flatten().tolist()) == sorted(covariances().topk(3).indices.tolist())
    assert context.metrics.drain(World())["policy/covariance"] == pytest.approx(float(covariances().mean()), **EXACT)


def test_those_within_the_bounds_are_drawn_from(context: Context, rollouts: Make) -> None:
    made = rollouts(LENGTHS, [0.0] * 4, group=[0, 0, 1, 1])
    cov = covariances()
    inside = ((cov > -0.4) & (cov < 0.3)).nonzero().flatten().tolist()
    assert 3 < len(inside) < 10
    drawn = set[tuple[int, ...]]()
    for seed in range(20):
        context.seed = seed
        config = GRPOConfig(covariance="clip", covariance_share=0.3, covariance_low=-0.4, covariance_high=0.3)
        found = held(config, context, made, LOGP, ADVANTAGES).nonzero().flatten().tolist()
        assert len(found) == 3 and set(found) <= set(inside)
        drawn.add(tuple(found))
        assert held(config, context, made, LOGP, ADVANTAGES).nonzero().flatten().tolist() == found  # of the seed alone
    assert len(drawn) > 5
    few = GRPOConfig(covariance="clip", covariance_low=-0.4, covariance_high=0.3)
    assert int(held(few, context, made, LOGP, ADVANTAGES).sum()) == 1  # one at least
    none = GRPOConfig(covariance="clip", covariance_low=90.0, covariance_high=99.0)
    assert not held(none, context, made, LOGP, ADVANTAGES).any()


def test_another_pass_draws_others_and_every_run_the_same(context: Context, rollouts: Make) -> None:
    made = rollouts([40], [0.0], group=[0])
    logp = torch.linspace(-2, 0, 40, dtype=torch.float64)
    fields = {"logp_old": logp, "advantages": torch.linspace(0, 1, 40, dtype=torch.float64)}
    minibatch = Experience(made, fields)
    config = GRPOConfig(covariance="clip", covariance_share=0.1, covariance_low=0.0, covariance_high=9.0)
    score = cast(Any, lambda of, role: type("Scores", (), {"logp": logp}))

    def drawn() -> list[tuple[int, ...]]:
        algorithm, found = GRPO(config, context), []
        for algorithm.step in (3, 3, 3, 4, 4):
            held = algorithm.prepare(minibatch, score)["held"]
            found.append(tuple(held.nonzero().flatten().tolist()))
        return found

    first = drawn()
    assert len(set(first)) == 5 and all(len(tokens) == 4 for tokens in first)
    assert drawn() == first


@pytest.mark.parametrize("how", ["kl", "clip"])
def test_tools_tokens_are_never_held(context: Context, rollouts: Make, how: str) -> None:
    masks = [torch.tensor([False, True, True]), None, None, torch.tensor([True, False, True, True])]
    made = rollouts(LENGTHS, [0.0] * 4, group=[0, 0, 1, 1], masks=masks)
    wild = [500.0 if i in (0, 7) else x for i, x in enumerate(LOGP)]
    config = GRPOConfig(covariance=how, covariance_share=1.0, covariance_low=-99.0, covariance_high=99.0)
    found = held(config, context, made, wild, ADVANTAGES)
    assert found.nonzero().flatten().tolist() == [i for i in range(10) if i not in (0, 7)]


@pytest.mark.parametrize("how", ["kl", "clip"])
def test_two_ranks_hold_what_one_does(rollouts: Make, fake_ranks: Make, how: str) -> None:
    config = GRPOConfig(covariance=how, covariance_share=0.4, covariance_low=-0.6, covariance_high=0.6)

    def work(tokens: slice, rows: slice, groups: list[int]) -> Callable[[World], Tensor]:
        def of(world: World) -> Tensor:
            context = Context(plan=cast(Plan, None), world=world, seed=5)
            made = rollouts(LENGTHS[rows], [0.0] * len(groups), group=groups)
            return held(config, context, made, LOGP[tokens], ADVANTAGES[rows])

        return of

    first, second = fake_ranks(work(slice(0, 5), slice(0, 2), [0, 0]), work(slice(5, 10), slice(2, 4), [1, 1]))
    alone = work(slice(0, 10), slice(0, 4), [0, 0, 1, 1])(World())
    assert torch.cat([first, second]).tolist() == alone.tolist()
    assert int(alone.sum()) == 4


def of_two(rollouts: Make, batch: Make, flags: list[float]) -> Batch:
    """The worked group of two, of 3 and 1 tokens; advantages 1 and -2."""
    made = rollouts([3, 1], [1.0, 0.0], group=[0, 0])
    fields = {"logp_old": double(OLD), "held": double(flags)}
    found: Batch = batch(Experience(made, fields, advantages=double([1.0, -2.0])))
    return found


def test_a_held_token_has_no_gradient(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    logp = double(NEW, True)
    config = DAPOConfig(covariance="clip", clip_high=0.2)
    given = of_two(rollouts, batch, [0.0, 1.0, 0.0, 1.0])
    loss = DAPO(config, context).loss(given, hand(policy={"logp": logp}))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((-1.2 - RHO[2]) / 4, **EXACT)  # held ones count in the mean
    assert logp.grad is not None
    close(logp.grad, [0.0, 0.0, -RHO[2] / 4, 0.0])
    assert float(given.logged["policy/held"]) == 0.5


def test_a_token_is_pulled_back_and_nothing_is_clipped(
    context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    logp = double(NEW, True)
    config = GRPOConfig(covariance="kl", covariance_coef=0.5, mean="token")
    given = of_two(rollouts, batch, [1.0, 0.0, 1.0, 0.0])
    loss = GRPO(config, context).loss(given, hand(policy={"logp": logp}))
    loss.backward()
    away = [n - o for n, o in zip(NEW, OLD, strict=True)]
    losses = [-RHO[0] + 0.5 * abs(away[0]), -RHO[1], -RHO[2] + 0.5 * abs(away[2]), 2 * RHO[3]]
    assert float(loss.detach()) == pytest.approx(sum(losses) / 4, **EXACT)
    assert logp.grad is not None  # the first is above, the third below where it was
    close(logp.grad, [(-RHO[0] + 0.5) / 4, -RHO[1] / 4, (-RHO[2] - 0.5) / 4, 2 * RHO[3] / 4])
    assert float(given.logged["policy/clip_fraction"]) == 0.0


def test_nothing_is_looked_at_where_nothing_is_asked_for(context: Context, rollouts: Make) -> None:
    experience = Experience(rollouts(LENGTHS, [0.0] * 4), None, advantages=double(ADVANTAGES))
    assert GRPO(GRPOConfig(), context).prepare(experience, cast(Any, None)) is experience


@pytest.mark.parametrize("how", ["kl", "clip"])
def test_it_runs_the_same_however_a_step_is_cut(tmp_path: Path, how: str) -> None:
    algo = {"name": "grpo", "group_size": 4, "minibatches": 2, "epochs": 2, "covariance": how, "covariance_share": 0.2}
    optim = {"name": "adamw", "eps": 1e-3}  # or rounding is a step of the whole learning rate where a gradient is 0
    runs = []
    for budget in (1, 1_000_000):
        more = {"covariance_low": -5.0, "covariance_coef": 0.1}
        plan = plan_of(algo={**algo, **more}, batch_size=4, optim=optim, micro_batch_tokens=budget)
        runs.append(Run(tmp_path / str(budget), plan))
        runs[-1].go()
    fine, coarse = (run.metrics() for run in runs)
    for a, b in zip(fine, coarse, strict=True):
        assert 0.1 < a["policy/held"] < 0.25
        # float32 sums in another order: 2^-24 x some dozen roundings, in numbers of the order of 1
        assert a == pytest.approx(b, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"covariance": "both"}, {"covariance_share": 0.0}, {"covariance_low": 5.0, "covariance_high": 5.0}],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    config, problems = structure(GRPOConfig, wrong, "--algo.")
    assert config is None and next(reversed(wrong)) in str(problems[0]).replace("-", "_")
