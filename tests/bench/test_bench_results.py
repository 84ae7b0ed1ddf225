"""What is made of measured steps, by hand."""

from __future__ import annotations

import attrs
import pytest
from stepbench import sides
from stepbench.results import Result, Side, as_json, footer, markdown

OURS = Side(seconds=(2.0, 4.0, 3.0), tokens=(100, 200, 150), peak_bytes=2_000_000_000)
PEER = Side(seconds=(6.0, 9.0, 30.0), tokens=(100, 200, 150), peak_bytes=5_000_000_000)
RESULT = Result(name="dpo", title="DPO", ours=OURS, trl=PEER, floor_seconds=(1.0, 2.0, 1.0))


def test_ratios_are_of_medians():
    assert RESULT.ratio == 3.0  # 9 / 3
    assert RESULT.memory_ratio == 2.5


def test_the_floor_is_the_same_for_both_and_goes_step_by_step():
    assert RESULT.floor_ratio(OURS) == 2.0  # of 2/1, 4/2, 3/1
    assert RESULT.floor_ratio(PEER) == 6.0  # of 6/1, 9/2, 30/1


def test_without_a_floor_there_is_no_ratio_to_it():
    result = attrs.evolve(RESULT, floor_seconds=())
    assert result.floor_ratio(OURS) is None
    assert markdown([result]).splitlines()[2].endswith("| -            | -           |")


def test_the_table():
    assert markdown([RESULT]) == (
        "| case | ours s/step         | TRL s/step           | TRL / ours | ours MB | TRL MB | ours / floor | TRL / floor |\n"  # noqa: E501
        "|------|--------------------:|---------------------:|-----------:|--------:|-------:|-------------:|------------:|\n"
        "| DPO  | 3.00 (2.00 to 4.00) | 9.00 (6.00 to 30.00) | 3.00       | 2000    | 5000   | 2.0          | 6.0         |\n"  # noqa: E501
    )


def test_json_holds_what_was_measured():
    found = as_json([RESULT], {"threads": 2})
    assert found["threads"] == 2
    case = found["cases"][0]
    assert case["ours"]["seconds"] == (2.0, 4.0, 3.0)
    assert (case["ratio"], case["trl"]["median_seconds"], case["trl"]["floor_ratio"]) == (3.0, 9.0, 6.0)


@pytest.mark.parametrize(("tokens", "same"), [((441, 0, 0), True), ((440, 0, 0), False), ((459, 0, 0), True),
                                              ((460, 0, 0), False)])  # fmt: skip
def test_different_work_is_refused(tokens, same):
    result = attrs.evolve(RESULT, ours=attrs.evolve(OURS, tokens=tokens))  # TRL has 450, of which 2 % are 9
    if same:
        result.check()
    else:
        with pytest.raises(ValueError, match=rf"ours read {sum(tokens)} tokens and TRL 450"):
            result.check()


def test_different_samples_are_refused():
    result = attrs.evolve(
        RESULT, ours=attrs.evolve(OURS, sampled=(500, 500)), trl=attrs.evolve(PEER, sampled=(512, 512))
    )
    with pytest.raises(ValueError, match="ours sampled 1000 tokens and TRL 1024"):
        result.check()


def test_the_footer():
    about = {
        "date": "2026-01-02T03:04:05+00:00", "model": "M", "machine": {"processor": "CPU", "cores": 4}, "threads": 2,
        "peaks": {"flops": {"float32": 2e11, "bfloat16": 7.5e11}, "bandwidth": 2e10}, "checkpointing": False,
        "versions": {"trl": "1.0", "torch": "2.0"}, "dtype": "bf16",
    }  # fmt: skip
    assert footer(about) == (
        "2026-01-02, M, CPU, 2 of 4 cores: 750 GFLOP/s in bfloat16, 200 GFLOP/s in float32, 20 GB/s from memory. "
        "Steps in bf16, gradient checkpointing off. trl 1.0, torch 2.0.\n"
    )


def test_a_step_is_all_of_it():
    metrics = {"time/rollout": 1.0, "time/update": 2.0, "time/other": 1.0, "time/step": 4.0,
               "perf/tokens_per_second": 25.0}  # fmt: skip
    assert sides.step_seconds(metrics) == 4.0
    assert sides.step_tokens(metrics) == 100
