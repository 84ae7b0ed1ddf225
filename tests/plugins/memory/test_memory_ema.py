"""The moving average: by hand, where it stands in, and over a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf import checkpoint
from rlhf.cli import main
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.interfaces import Context, TrainedParameter
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf_plugins.memory import EmaConfig
from rlhf_plugins.memory.ema import Ema


def ema_of(*parameters: nn.Parameter, **options: Any) -> Ema:
    strategy = Ema(EmaConfig(**options), Context(plan=cast(Plan, None)))
    strategy.settled([TrainedParameter(f"p{i}", p, "policy", None) for i, p in enumerate(parameters)])
    return strategy


def test_by_hand() -> None:
    """decay .75: it starts at 1; of 5, 1 + (5 - 1) / 4 = 2; of -2, 2 + (-2 - 2) / 4 = 1."""
    weight = nn.Parameter(torch.tensor([1.0]))
    strategy = ema_of(weight, decay=0.75)
    for value, expected in ((5.0, 2.0), (-2.0, 1.0)):
        with torch.no_grad():
            weight.fill_(value)
        strategy.stepped()
        assert strategy.state()["average"]["p0"].tolist() == [expected]
        assert weight.tolist() == [value]


def test_half_of_it_is_older_than_its_half_life() -> None:
    """A weight that jumps from 0 to 1 and stays: the average is half way after ln 2 / (1 - decay) steps."""
    weight = nn.Parameter(torch.zeros(1))
    strategy = ema_of(weight, decay=0.99)
    nn.init.ones_(weight)
    for _ in range(69):
        strategy.stepped()
    # 1 - .99^69 = .50012; float32 rounds each of 69 steps by 6e-8 at most
    assert float(strategy.state()["average"]["p0"]) == pytest.approx(1 - 0.99**69, abs=5e-6)
    assert float(strategy.state()["average"]["p0"]) == pytest.approx(0.5, abs=1e-3)


def test_no_decay_is_the_weights_themselves() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    strategy = ema_of(weight, decay=0.0)
    nn.init.constant_(weight, 7.0)
    strategy.stepped()
    assert strategy.state()["average"]["p0"].tolist() == [7.0]


def test_it_is_float32_whatever_the_weights_are() -> None:
    """An update of 2^-9 of a weight, times 1 - decay, is far below what bfloat16 keeps."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    strategy = ema_of(weight, decay=0.99)
    with torch.no_grad():
        weight.fill_(1.0078125)  # bfloat16's next number
    strategy.stepped()
    average = strategy.state()["average"]["p0"]
    assert average.dtype == torch.float32 and float(average) == pytest.approx(1 + 0.01 / 128, rel=1e-6)


def test_it_stands_in_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    strategy = ema_of(weight, decay=0.5, save=False)
    nn.init.constant_(weight, 3.0)
    strategy.stepped()
    assert strategy.stand_in("save") is None
    same = weight
    evaluated = strategy.stand_in("evaluate")
    assert evaluated is not None
    with pytest.raises(ValueError), evaluated:
        assert weight.tolist() == [2.0] and weight is same
        raise ValueError
    assert weight.tolist() == [3.0]
    assert strategy.state()["average"]["p0"].tolist() == [2.0]


def test_its_state_comes_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    strategy, other = ema_of(weight, decay=0.5), ema_of(nn.Parameter(torch.tensor([9.0])), decay=0.5)
    nn.init.constant_(weight, 3.0)
    strategy.stepped()
    other.load_state(strategy.state())
    assert other.state()["average"]["p0"].tolist() == [2.0]


# Whole runs

WORDS = ("--algo", "sft", "--track", "none", "--batch-size", "8", "--eval-rows", "8", "--mem", "fp32,ema")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["run", *WORDS, *words])
    return int(cast(Any, left.value.code))


def test_a_run_resumes_its_average_to_the_bit_and_saves_it(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fast = ("--mem.ema.decay", "0.5")
    assert run("--max-steps", "3", "--output", str(whole), *fast) == 0
    assert run("--max-steps", "2", "--output", str(halves), *fast) == 0
    assert run("--max-steps", "3", "--output", str(halves), "--resume", *fast) == 0
    one, other = (checkpoint.load(way / "checkpoints" / "step-000003") for way in (whole, halves))
    averages, others = (state["memory"]["policy"]["ema"]["average"] for state in (one, other))
    assert all(torch.equal(average, others[name]) for name, average in averages.items())
    saved, weights = load_file(whole / "model" / "model.safetensors"), one["backend"]["parameters"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(saved[name], averages[f"bodies.policy.{name}"])
    assert not torch.equal(saved[name], weights[f"bodies.policy.{name}"])
    summary = json.loads((whole / "summary.json").read_text())
    # the held-out loss is the average's, which hasn't gone as far as the weights
    assert run("--max-steps", "3", "--output", str(tmp_path / "live"), *fast, "--mem.ema.evaluate", "false") == 0
    live = json.loads((tmp_path / "live" / "summary.json").read_text())
    start = summary["heldout_before"]["loss"]
    assert start == live["heldout_before"]["loss"]
    assert 0 < abs(summary["heldout_after"]["loss"] - start) < abs(live["heldout_after"]["loss"] - start)


def test_it_has_a_use(typed: Callable[..., Recipe], installed: Registry, machine: Machine) -> None:
    neither = ("--mem.ema.evaluate", "false", "--mem.ema.save", "false")
    with pytest.raises(RequestError, match="nobody would see the average"):
        compose(typed("--algo", "sft", "--mem", "ema", *neither), installed, machine)
    with pytest.raises(RequestError, match="the role reference isn't trained"):
        compose(typed("--algo", "dpo", "--mem", "reference=ema"), installed, machine)
