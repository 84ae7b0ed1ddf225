"""The length reward, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf.interfaces import Context
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards import LengthConfig
from rlhf_plugins.rewards.length import Length

CASES = [
    # config, scores at lengths 2, 4, 10
    (LengthConfig(), [-0.02, -0.04, -0.1]),  # target 0: a price a token
    (LengthConfig(target=4, slope=0.5), [-1.0, 0.0, -1.0]),  # the last is -3 before min
    (LengthConfig(target=4, slope=0.5, min=None), [-1.0, 0.0, -3.0]),
    (LengthConfig(target=4, slope=0.5, side="over", min=-2.0), [0.0, 0.0, -2.0]),
]


@pytest.mark.parametrize(("config", "scores"), CASES)
def test_by_hand(
    rollouts: Callable[..., Rollouts], context: Context, config: LengthConfig, scores: list[float]
) -> None:
    found = Length(config, context).judge(rollouts(["a", "b", "c"], lengths=[2, 4, 10]), None)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(scores, abs=1e-6)  # float32 numbers of order 1


def test_tool_output_is_not_counted(rollouts: Callable[..., Rollouts], context: Context) -> None:
    given = rollouts(["a"], lengths=[5], masks=[torch.tensor([True, False, False, True, True])])
    found = Length(LengthConfig(slope=1.0, min=None), context).judge(given, None)  # type: ignore[arg-type]
    assert found.tolist() == [-3.0]  # small integers are exact in float32
