"""The process reward model as a reward: what it reads, and what becomes of its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from built import parts_of, rollouts_of, some
from rlhf.interfaces import Failed
from rlhf.rows import PromptRow
from rlhf.scores import Scores
from rlhf.sequences import Rollouts, Sequences
from rlhf_plugins.rewards import ProcessConfig
from rlhf_plugins.rewards.process import ProcessRewardModel, aggregate


@pytest.mark.parametrize(
    ("how", "value"), [("min", 0.25), ("mean", 0.5), ("last", 0.75), ("product", 0.09375)], ids=str
)
def test_the_scores_of_steps_become_one_number(how: str, value: float) -> None:
    assert aggregate(torch.tensor([0.5, 0.25, 0.75]), how) == value
    assert aggregate(torch.tensor([0.5]), how) == 0.5


def test_another_way_is_refused() -> None:
    with pytest.raises(ValueError, match="given median"):
        aggregate(torch.tensor([0.5]), "median")
    with pytest.raises(ValueError, match="separator is empty"):
        ProcessConfig(separator="")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a scalar head."""
    folder = tmp_path_factory.mktemp("prm")
    parts_of(algo="prm", model=str(tiny_model)).models.save(folder)
    return str(folder / "prm")


class Counts:
    """A score by hand: the log odds after the n-th token of a sequence's response are n."""

    def __init__(self) -> None:
        self.asked: list[Sequences] = []

    def __call__(self, of: Sequences, role: str, *, entropy: bool = False) -> Scores:
        assert role == "prm"
        self.asked.append(of)
        values = torch.cat([torch.zeros(0), *(torch.arange(float(n)) for n in of.lengths.tolist())])
        return Scores(role, values_=values, score_=of.lengths.float())


def judged(reward: Any, score: Any, *texts: str) -> Any:
    rows = tuple(PromptRow("Question: What is 2 + 3?\nAnswer:") for _ in texts)
    made: Rollouts = attrs.evolve(rollouts_of(some(len(texts)), None), texts=texts, rows=rows)
    return reward.judge(made, score)


def s(x: float) -> float:
    return float(torch.sigmoid(Tensor([x])))


@pytest.mark.parametrize("how", ["min", "last"])
def test_each_step_is_scored_behind_its_separator(trained: str, tiny_model: Path, how: str) -> None:
    parts = parts_of(
        algo="grpo", model=str(tiny_model), roles={"prm": {"model": trained}},
        reward={"name": "prm", "aggregate": how},
    )  # fmt: skip
    assert parts.sampler is not None
    (source,) = parts.sampler.sources
    assert isinstance(source.reward, ProcessRewardModel)
    score = Counts()
    found = judged(source.reward, score, " 5\n 6\n", "\n\n", " 12", " 5\n" * 400)
    codec: Any = source.reward._codec
    two, one = codec.response(" 5\n", "", end=False), codec.response(" 12\n", "", end=False)
    assert isinstance(found[1], Failed) and "no step" in found[1].why
    assert isinstance(found[3], Failed) and "longer than the 512 tokens" in found[3].why
    first, both = float(len(two)), float(2 * len(two))
    assert found[0] == pytest.approx(s(first if how == "min" else both), abs=1e-6)
    assert found[2] == pytest.approx(s(float(len(one))), abs=1e-6)
    (asked,) = score.asked
    second = codec.response(" 6\n", "", end=False)
    assert [part.tolist() for part in asked.responses()] == [[*two.tolist(), *second.tolist()], one.tolist()]


def test_a_run_is_judged_by_it(trained: str, tiny_model: Path) -> None:
    parts = parts_of(algo="grpo", model=str(tiny_model), roles={"prm": {"model": trained}}, reward="prm")
    assert parts.sampler is not None
    found = judged(parts.sampler.sources[0].reward, parts.score, " 5\n 6", " 5")
    assert len(found) == 2 and all(0 < one < 1 for one in found) and found[0] <= found[1] + 1e-6  # the first is a part


def test_of_nothing_readable_scores_are_asked_for_all_the_same(trained: str, tiny_model: Path) -> None:
    parts = parts_of(algo="grpo", model=str(tiny_model), roles={"prm": {"model": trained}}, reward="prm")
    assert parts.sampler is not None
    score = Counts()
    assert isinstance(judged(parts.sampler.sources[0].reward, score, "")[0], Failed)
    assert [len(of) for of in score.asked] == [0]  # by every rank: others may have some
