"""Process reward modelling: where steps are read, the loss by hand, and what a row becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from worked import close, double

from at_work import Run, plan_of
from rlhf.errors import RowError
from rlhf.experience import Experience
from rlhf.interfaces import Codec, Context
from rlhf.rows import StepRow
from rlhf_plugins.algorithms.prm import PRM
from rlhf_plugins.algorithms.processes import PRMConfig
from rlhf_plugins.steps import encode, split

Make = Callable[..., Any]


class Letters:
    """A codec whose tokens are characters."""

    eos = 0

    def prompt(self, prompt: Any) -> Tensor:
        return torch.tensor([ord(c) for c in prompt])

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        assert prompt == "why" and not end  # a step doesn't end the response
        return torch.tensor([ord(c) for c in text])


LETTERS = cast(Codec, Letters())


def test_a_step_is_closed_by_the_separator_and_read_behind_it() -> None:
    prompt, response, ends = encode(LETTERS, "why", ["ab", "c", "def"], ";;", None)
    assert "".join(map(chr, prompt)) == "why" and "".join(map(chr, response)) == "ab;;c;;def;;"
    assert ends.nonzero().flatten().tolist() == [3, 6, 11]
    assert encode(LETTERS, "why", ["ab"], ";;", 7)[1].tolist() == [97, 98, 59, 59]
    with pytest.raises(RowError, match="longer than the 6 tokens"):
        encode(LETTERS, "why", ["ab"], ";;", 6)


def test_a_step_that_would_be_cut_when_it_is_judged_is_refused() -> None:
    with pytest.raises(RowError, match=r"step 2 holds the separator ';;'"):
        encode(LETTERS, "why", ["ab", "c;;d"], ";;", None)
    with pytest.raises(ValueError, match="separator is empty"):
        PRMConfig(separator="")


def test_a_response_is_cut_into_its_steps() -> None:
    assert split("1 + 1 = 2\n\n so 2\n", "\n") == ["1 + 1 = 2", " so 2"]
    assert split(" \n", "\n") == [] and split("all", "\n") == ["all"]


def test_a_row_becomes_its_steps_with_a_label_each(context: Context) -> None:
    algorithm = PRM(PRMConfig(separator=";"), context)
    algorithm.context.plan = plan_of(algo="prm")
    (found,) = algorithm.examples(StepRow("why", ("ab", "c"), (1.0, 0.25)), LETTERS)
    assert found.mask is not None and found.mask.tolist() == [False, False, True, False, True]
    assert found.token_fields["label"].tolist() == [0.0, 0.0, 1.0, 0.0, 0.25]


def test_worked_steps(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    """Three steps in two responses. Log odds 1 of a right one, -2 of a wrong one, and 0.5 of one that is right by a
    quarter: log(1 + e^-1) = .313262, log(1 + e^-2) = .126928, .25 x .474077 + .75 x .974077 = .849077."""
    values = double([9.0, 9.0, 1.0, 9.0, 9.0], gradient=True)  # before each token: the first step ends at the second
    last = double([-2.0, 0.5], gradient=True)
    mask = [torch.tensor([False, True, True]), torch.tensor([False, True])]
    made = rollouts([3, 2], [0.0, 0.0], masks=mask)
    given = batch(Experience(made, {"label": double([0.0, 1.0, 0.0, 0.0, 0.25])}))
    loss = PRM(PRMConfig(), context).loss(given, hand(prm={"values": values, "score": last}))
    assert float(loss.detach()) == pytest.approx((0.313262 + 0.126928 + 0.849077) / 3, abs=1e-6)
    assert {name: float(part) for name, part in given.logged.items()} == pytest.approx(
        {"step/accuracy": 2 / 3, "step/right": 1.25 / 3, "step/taken_for_right": 2 / 3}, rel=1e-6
    )
    loss.backward()

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert values.grad is not None and last.grad is not None
    close(values.grad, [0.0, 0.0, (s(1) - 1) / 3, 0.0, 0.0])
    close(last.grad, [s(-2) / 3, (s(0.5) - 0.25) / 3])


def test_a_run_goes_down(tmp_path: Path) -> None:
    summary = Run(tmp_path, plan_of(algo="prm", max_steps=8, batch_size=32, eval_rows=32)).go()
    assert summary["heldout_after"]["loss"] < summary["heldout_before"]["loss"] - 0.05


@pytest.mark.matrix
def test_a_run_learns_which_steps_are_right(tmp_path: Path) -> None:
    """Half of the steps are right, so that whoever knows nothing loses log 2 and is right by half."""
    summary = Run(tmp_path, plan_of(algo="prm", max_steps=64, batch_size=64, eval_rows=256)).go()
    before, after = summary["heldout_before"], summary["heldout_after"]
    assert after["loss"] < min(math.log(2), before["loss"]) - 0.1 and after["step/accuracy"] > 0.65
