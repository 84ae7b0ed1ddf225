"""What fits, and the nearest change after which a plan does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
from fake_plans import CONFIG, GIB, LONG, Make, entries, strategy

from rlhf.api import recomputed
from rlhf.compose import compose
from rlhf.draft import Ask
from rlhf.facts import Gpu, Machine
from rlhf.plan import Plan
from rlhf.planning import fit as fitting
from rlhf.planning.fit import nearest_fit
from rlhf.planning.prediction import prediction
from rlhf.recipe import Recipe


@pytest.fixture
def asked(
    folder: Path, typed: Callable[..., Recipe], make_registry: Make, machine: Machine
) -> Callable[..., tuple[Ask, Plan]]:
    def make(memory: float, *words: str, of: tuple[Any, ...] = ()) -> tuple[Ask, Plan]:
        there = attrs.evolve(machine, gpus=(Gpu("fake-gpu", int(memory), (9, 0)),))
        recipe = typed("--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), *words)
        registry = make_registry(*(of or entries(strategy("fake-again", recomputed, phase="wrap"))))
        return Ask(recipe, registry, there), compose(recipe, registry, there)

    return make


def test_a_model_that_cant_be_counted_never_fits(planned: Callable[..., Plan], folder: Path) -> None:
    (folder / "model" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "of-another-kind"}))
    found = prediction(planned(gpus=1))
    assert not found.fits
    assert found.duration is None
    assert any("can't be counted" in note for note in found.memory.notes)


def test_smaller_micro_batches_come_first_and_no_smaller_than_needed(asked: Callable[..., tuple[Ask, Plan]]) -> None:
    needed = {
        tokens: prediction(asked(GIB, "--micro-batch-tokens", str(tokens))[1], LONG).memory.needed
        for tokens in (16384, 8192, 4096)
    }
    assert needed[16384] > needed[8192] > needed[4096]
    between = (needed[8192] + needed[4096]) / 2
    fit = nearest_fit(*asked(between, "--micro-batch-tokens", "16384"), LONG)
    assert fit is not None
    assert fit.words == "--micro-batch-tokens 4096"
    assert fit.prediction.memory.needed == needed[4096] <= between


def test_two_changes_where_one_is_not_enough(asked: Callable[..., tuple[Ask, Plan]]) -> None:
    of = entries(strategy("fake-again", recomputed, phase="wrap"))
    least = prediction(asked(GIB, "--micro-batch-tokens", "256", "--mem", "fake-again", of=of)[1], LONG).memory.needed
    alone = prediction(asked(GIB, "--micro-batch-tokens", "256", of=of)[1], LONG).memory.needed
    fit = nearest_fit(*asked((least + alone) / 2, of=of), LONG)
    assert fit is not None
    assert "--mem fake-again" in fit.words
    assert "--micro-batch-tokens" in fit.words
    assert nearest_fit(*asked(1 << 20, of=of), LONG) is None  # nothing makes a process that small


@pytest.mark.parametrize(
    ("fits", "nearest"),
    [
        ({"ab": 3, "d": 1}, "ab"),  # changes nothing of what is learnt
        ({"d": 1, "cd": 3, "abc": 2}, "abc"),  # changes less
        ({"a": 1, "ab": 2, "b": 2}, "b"),  # the fewest, and of those the one that leaves least memory idle
        ({"d": 1}, "d"),
        ({}, None),
    ],
)
def test_what_changes_least_of_what_is_learnt_is_nearest(
    fits: dict[str, float], nearest: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": 0, "b": 0, "c": 2, "d": 3}
    changes = [fitting.Change(name, weight, (fitting.Step(name, Recipe()),)) for name, weight in weights.items()]

    def gentlest(ask: Any, chosen: Sequence[Any], lengths: Any) -> Any:
        name = "".join(change.sort for change in chosen)
        memory = SimpleNamespace(memory=SimpleNamespace(needed=fits.get(name)))
        weight = sum(change.weight for change in chosen)
        return fitting.Fit(name, weight, Recipe(), cast(Any, memory)) if name in fits else None

    monkeypatch.setattr(fitting, "_changes", lambda ask, plan: changes)
    monkeypatch.setattr(fitting, "_gentlest", gentlest)
    found = nearest_fit(cast(Any, None), cast(Any, None), LONG)
    assert (found and found.words) == nearest


def test_a_plan_never_fits_by_the_bytes_of_its_tensors_alone(planned: Callable[..., Plan]) -> None:
    """The process and what the allocator loses are counted in."""
    plan = planned(gpus=1)
    found = prediction(plan)
    tight = attrs.evolve(found, device_bytes=int(found.memory.peak.total) + 1)
    assert not tight.fits
    assert attrs.evolve(found, device_bytes=int(found.memory.needed) + 1).fits
