"""What holds for every algorithm without a critic, whatever its loss: each entry of the manifest is put to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from rlhf.compose import compose
from rlhf.entries import AlgorithmEntry
from rlhf.experience import Batch, Experience, Totals
from rlhf.facts import Machine
from rlhf.interfaces import Algorithm, Context
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf.sequences import Rollouts
from rlhf.world import World
from rlhf_plugins.algorithms.without_critic import entries

Make = Callable[..., Any]
ENTRIES = {entry.name: entry for entry in entries()}
EXACT: dict[str, Any] = {"rel": 1e-12, "abs": 1e-12}  # float64 after a few operations
WILD = 500.0  # e^500 overflows: seen in any number that it reaches


def double(values: list[float], gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


@pytest.fixture(params=ENTRIES)
def entry(request: pytest.FixtureRequest) -> AlgorithmEntry:
    return ENTRIES[request.param]


def fields_of(entry: AlgorithmEntry) -> set[str]:
    assert entry.config is not None
    return {field.name for field in attrs.fields(entry.config)}


def algorithm(entry: AlgorithmEntry, context: Context, **options: Any) -> Algorithm:
    """With a limit of 8 tokens where one is counted with, since there is no engine to ask."""
    assert entry.config is not None
    known = fields_of(entry)
    module, _, name = entry.impl.partition(":")
    made = getattr(importlib.import_module(module), name)(
        entry.config(**{**({"max_length": 8} if "max_length" in known else {}), **options}), context
    )
    assert isinstance(made, Algorithm)
    return made


def rolled(
    entry: AlgorithmEntry, rollouts: Make, lengths: list[int], rewards: list[float], masks: Any = None
) -> Rollouts:
    """Two responses a group, the better one first; ReMax's greedy ones, behind them all, have the group's mean."""
    group = [i // 2 for i in range(len(lengths))]
    tags = [""] * len(lengths)
    if entry.name == "remax":
        means = [(a + b) / 2 for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
        n = len(means)
        lengths, rewards = [*lengths, *[1] * n], [*rewards, *means]
        group, tags = [*group, *range(n)], [*tags, *["baseline"] * n]
        masks = masks and [*masks, *[None] * n]
    made: Rollouts = rollouts(lengths, rewards, group=group, masks=masks)
    return attrs.evolve(made, tags=tuple(tags))


LENGTHS, REWARDS = [2, 3, 1, 4], [1.0, 0.0, 2.0, 1.5]
OLD = [-1.0, -0.5, -2.0, -0.7, -1.2, -0.3, -0.9, -1.1, -0.4, -2.2]
NEW = [-0.9, -0.52, -2.1, -0.72, -1.1, -0.31, -0.93, -1.0, -0.45, -2.15]


def experienced(made: Algorithm, rollouts: Rollouts, hand: Make, logp: list[float] = OLD) -> Experience:
    ref = [x - 0.1 for x in logp]
    return made.experience(rollouts, hand(policy={"logp": double(logp)}, reference={"logp": double(ref)}))


def whole(batch: Make, experience: Experience) -> Batch:
    made: Batch = batch(experience)
    return made


def test_masked_tokens_get_exactly_no_gradient(
    entry: AlgorithmEntry, context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    masks = [
        torch.tensor([True, False]),
        torch.tensor([False, True, True]),
        None,
        torch.tensor([True, True, False, True]),
    ]
    hidden = [1, 2, 8]
    wide = {"clip_low": 0.9, "clip_high": 9.0} if "clip_low" in fields_of(entry) else {}  # or a clip takes the gradient
    for options in ({}, {"kl_coef": 0.1}):
        made = algorithm(entry, context, **wide, **options)
        old = [WILD if i in hidden else x for i, x in enumerate(OLD)]
        experience = experienced(made, rolled(entry, rollouts, LENGTHS, REWARDS, masks=masks), hand, old)
        new = double([-WILD if i in hidden else x for i, x in enumerate(NEW)], True)
        loss = made.loss(whole(batch, experience), hand(policy={"logp": new}))
        loss.backward()
        assert loss.isfinite() and new.grad is not None
        assert [float(new.grad[i]) for i in hidden] == [0.0, 0.0, 0.0]
        assert all(float(x) != 0.0 for i, x in enumerate(new.grad) if i not in hidden)


def test_parts_of_micro_batches_add_up(
    entry: AlgorithmEntry, context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    made = algorithm(entry, context, kl_coef=0.1, entropy_coef=0.01)
    experience = experienced(made, rolled(entry, rollouts, LENGTHS, REWARDS), hand)
    entropy = [abs(x) for x in NEW]

    def policy(index: Tensor) -> Any:
        return hand(policy={"logp": double(NEW)[index], "entropy": double(entropy)[index]})

    everything = whole(batch, experience)
    at_once = float(made.loss(everything, policy(torch.arange(10))))
    totals = Totals(10, 4, 2)
    parts, logged = 0.0, dict[str, float]()
    for rows in ([0], [3, 1], [2]):
        picked = torch.tensor(rows)
        piece = Batch(experience.select(picked), totals)
        parts += float(made.loss(piece, policy(experience.sequences.token_index(picked))))
        for name, value in piece.logged.items():
            logged[name] = logged.get(name, 0.0) + float(value)
    assert parts == pytest.approx(at_once, **EXACT)
    # logged parts are float32
    assert logged == pytest.approx({n: float(v) for n, v in everything.logged.items()}, rel=1e-6, abs=1e-6)


def test_the_better_response_becomes_likelier(
    entry: AlgorithmEntry, context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    made = algorithm(entry, context)
    experience = experienced(made, rolled(entry, rollouts, LENGTHS, [1.0, 0.0, 1.0, 0.0]), hand)
    logp = double([float(x) for x in experience["logp_old"]], True)
    made.loss(whole(batch, experience), hand(policy={"logp": logp})).backward()
    assert logp.grad is not None
    better = torch.repeat_interleave(torch.tensor([True, False, True, False]), torch.tensor(LENGTHS))
    assert (logp.grad[better] < 0).all() and (logp.grad[~better] > 0).all()  # a minimiser goes against it


def test_equal_rewards_teach_nothing(
    entry: AlgorithmEntry, context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    made = algorithm(entry, context, kl_coef=0.0)
    experience = experienced(made, rolled(entry, rollouts, LENGTHS, [3.0] * 4), hand)
    logp = double([float(x) for x in experience["logp_old"]], True)
    made.loss(whole(batch, experience), hand(policy={"logp": logp})).backward()
    assert logp.grad is not None and not logp.grad.any()


def test_a_tokens_gradient_is_multiplied_by_its_importance(
    entry: AlgorithmEntry, context: Context, rollouts: Make, batch: Make, hand: Make
) -> None:
    made = algorithm(entry, context, kl_coef=0.1)
    weights = [0.5, 2.0, 1.0, 0.0, 1.5, 0.25, 1.25, 0.75, 1.0, 2.0]
    found = []
    for importance in (None, weights):
        experience = experienced(made, rolled(entry, rollouts, LENGTHS, REWARDS), hand)
        if importance:
            experience.of_tokens["importance"] = double(importance)
        given, logp = whole(batch, experience), double([float(x) for x in experience["logp_old"]], True)
        made.loss(given, hand(policy={"logp": logp})).backward()
        assert given.corrected and logp.grad is not None
        found.append(logp.grad)
    assert found[1].tolist() == pytest.approx((found[0] * double(weights)).tolist(), **EXACT)


def test_two_fake_ranks_see_what_one_sees(entry: AlgorithmEntry, rollouts: Make, hand: Make, fake_ranks: Make) -> None:
    options: dict[str, Any] = {"kl_coef": 0.1, **({"scale": "batch"} if "scale" in fields_of(entry) else {})}

    def work(tokens: slice, rows: slice) -> Callable[[World], Any]:
        def experience(world: World) -> Any:
            context = Context(plan=None, world=world)  # type: ignore[arg-type]
            made = algorithm(entry, context, **options)
            mine = rolled(entry, rollouts, LENGTHS[rows], REWARDS[rows])
            found = experienced(made, mine, hand, OLD[tokens])
            return found.per_token("advantages"), context.metrics.drain(world)

        return experience

    first, second = fake_ranks(work(slice(0, 5), slice(0, 2)), work(slice(5, 10), slice(2, 4)))
    alone = work(slice(0, 10), slice(0, 4))(World())
    assert torch.cat([first[0], second[0]]).tolist() == pytest.approx(alone[0].tolist(), **EXACT)
    assert first[1] == second[1] and first[1] == pytest.approx(alone[1], **EXACT)


def test_a_rank_without_rollouts_has_an_empty_experience(
    entry: AlgorithmEntry, context: Context, rollouts: Make, hand: Make
) -> None:
    made = algorithm(entry, context, kl_coef=0.1)
    assert len(experienced(made, rolled(entry, rollouts, [], []), hand, [])) == 0


def test_flat_groups_are_left_out_and_so_replaced_by_all_that_compare_a_group(
    entry: AlgorithmEntry, context: Context, rollouts: Make
) -> None:
    if "drop_flat" not in fields_of(entry):
        assert algorithm(entry, context).keep(rolled(entry, rollouts, LENGTHS, REWARDS)) is None
        return
    made = algorithm(entry, context, drop_flat=True, sampling_rounds=4)
    assert made.sampling_rounds == 4
    kept = made.keep(rolled(entry, rollouts, LENGTHS, [1.0, 1.0, 2.0, 1.5]))
    assert kept is not None and kept.tolist() == [False, False, True, True]
    none = made.keep(rolled(entry, rollouts, [], []))  # of a rank without any
    assert none is not None and none.tolist() == [] and none.dtype == torch.bool


def test_it_plans_with_nothing_else_named(
    entry: AlgorithmEntry, typed: Callable[..., Recipe], installed: Registry, machine: Machine
) -> None:
    plan = compose(typed("--algo", entry.name), installed, machine)
    assert plan.algo.name == entry.name and {role.name for role in plan.roles} >= {"policy"}
    assert any("the starter" in note for note in plan.notes)
    assert entry.defaults["optim.learning_rate"] <= 1e-5 and entry.defaults["batch_size"] >= 16
    assert entry.footprint is not None and entry.config is not None
    assert entry.footprint(entry.config()).responses == getattr(entry.config(), "group_size", 1)
