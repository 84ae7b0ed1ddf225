"""What a step must compute and move, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from at_work import Run, plan_of
from fake_ranks import in_two_ranks
from rlhf import floor
from rlhf.floor import AttentionShape, Ledger, ModelShape, Peaks, Work
from rlhf.peaks import measure
from rlhf.sequences import Sequences
from rlhf.world import World

FULL = ModelShape(
    trunk=1000, trunk_trained=1000, head=300, head_trained=300, attention=(AttentionShape(width=8, cached=4),),
    dtype="bfloat16", weight_bytes=2600.0,
)  # fmt: skip
ADAPTED = attrs.evolve(FULL, trunk=1010, trunk_trained=10, head_trained=0, weight_bytes=2620.0)
FROZEN = attrs.evolve(FULL, trunk_trained=0, head_trained=0)


def ids(n: int) -> torch.Tensor:
    return torch.arange(n)


@pytest.fixture
def shared() -> Sequences:
    """Prompts of 5 and 2 tokens; responses of 3 and 1 to the first, of 2 to the second, one token of it not its own."""
    mask = torch.tensor([True, False])
    return Sequences.of([ids(5), ids(2)], [ids(3), ids(1), ids(2)], prompt_of=[0, 0, 1], masks=[None, None, mask])


def test_a_shared_prompt_is_counted_once(shared: Sequences) -> None:
    assert floor.token_count(shared) == 5 + 2 + 3 + 1 + 2
    # prompts: 1+2+3+4+5 and 1+2; responses: 6+7+8, 6, 3+4
    assert floor.pair_count(shared) == 15 + 3 + 21 + 6 + 7


def test_a_window_bounds_what_a_query_sees(shared: Sequences) -> None:
    # prompts: 1+2+3+3+3 and 1+2; responses: each of the six sees 3
    assert floor.pair_count(shared, window=3) == 12 + 3 + 3 * 6
    # prompts: 1+2+3+4+5 and 1+2; responses: 6+7+7, 6, 3+4
    assert floor.pair_count(shared, window=7) == 15 + 3 + 20 + 6 + 7
    assert floor.pair_count(shared, window=1) == 13


def test_a_forward_costs_two_flops_a_weight(shared: Sequences) -> None:
    attention = 4 * 8 * 52
    assert floor.forward(FULL, shared, lm=False) == Work(2 * 1000 * 13 + attention, 2600.0, "bfloat16")
    # the head reads the five own tokens alone, of prompts and of others' tokens nothing
    assert floor.forward(FULL, shared, lm=True).flops == 2 * 1000 * 13 + attention + 2 * 300 * 5
    assert floor.forward(ADAPTED, shared, lm=False, adapters=False).flops == 2 * 1000 * 13 + attention


def test_training_costs_six_flops_a_weight_and_four_where_it_is_frozen(shared: Sequences) -> None:
    attention = 12 * 8 * 52
    assert floor.training(FULL, shared, lm=True) == Work(6 * 1000 * 13 + attention + 6 * 300 * 5, 5200.0, "bfloat16")
    adapted = floor.training(ADAPTED, shared, lm=True)
    assert adapted.flops == (4 * 1000 + 6 * 10) * 13 + attention + 4 * 300 * 5
    assert floor.training(FULL, shared, lm=False).flops == 6 * 1000 * 13 + attention


def test_decoding_reads_the_weights_once_a_position_and_the_keys_once_a_token(shared: Sequences) -> None:
    found = floor.decoding(FULL, shared)
    # Positions 1 to 3. The first prompt's 5 tokens are read at 3 of them, the second's 2 at 2; responses read
    # themselves: 1+2+3, 1, 1+2. A token's keys and values are 4 numbers of 2 bytes.
    assert found.bytes == 2600 * 3 + (5 * 3 + 2 * 2 + 6 + 1 + 3) * 4 * 2
    # every sampled token comes from the head, whoever it counts for
    assert found.flops == 2 * 1000 * 13 + 4 * 8 * 52 + 2 * 300 * 6


def test_decoding_in_a_window_reads_what_is_in_it() -> None:
    shape = attrs.evolve(FULL, attention=(AttentionShape(width=8, cached=4, window=4),))
    # of 3 prompt tokens the three positions see 3, 2, 1 and of their own 1, 2, 3
    assert floor.decoding(shape, Sequences.of([ids(3)], [ids(3)])).bytes == 2600 * 3 + (6 + 6) * 4 * 2


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_keys_are_as_wide_as_their_dtype(dtype: str, size: int) -> None:
    shape = attrs.evolve(FULL, dtype=dtype)
    assert floor.decoding(shape, Sequences.of([ids(3)], [ids(1)])).bytes == 2600 + (3 + 1) * 4 * size


def test_what_samples_nothing_reads_nothing() -> None:
    assert floor.decoding(FULL, Sequences.of([], [])).bytes == 0
    assert floor.decoding(FULL, Sequences.of([ids(3)], [ids(0)])).bytes == 0


def test_a_pass_takes_what_its_slower_side_takes() -> None:
    peaks = Peaks({"bfloat16": 100.0, "float32": 10.0}, bandwidth=20.0)
    assert Work(1000.0, 100.0, "bfloat16").seconds(peaks) == 10.0
    assert Work(1000.0, 400.0, "bfloat16").seconds(peaks) == 20.0
    assert Work(1000.0, 100.0, "float32").seconds(peaks) == 100.0


# The ledger of a step

PEAKS = Peaks({"bfloat16": 1.0}, bandwidth=1e12)  # seconds are FLOPs
MODULES: dict[str, tuple[str, ModelShape | None, bool, bool]] = {
    "policy": ("policy", FULL, True, True),
    "value": ("value", attrs.evolve(FULL, head=0, head_trained=0), False, True),
    "critic": ("policy", FULL, False, True),  # on the policy's trunk
    "reference": ("reference", FROZEN, True, True),
    "adapted": ("adapted", ADAPTED, True, True),
    "base": ("adapted", ADAPTED, True, False),
    "foreign": ("foreign", None, True, True),
}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(MODULES.__getitem__)


def seconds(ledger: Ledger) -> float:
    return ledger.metrics(PEAKS, 1.0)["perf/floor_seconds"]


def test_a_ppo_step_is_the_sum_of_its_passes(ledger: Ledger, shared: Sequences) -> None:
    ledger.sampled(shared)
    ledger.scored(shared, ["policy"])
    ledger.scored(shared, ["value"])
    ledger.scored(shared, ["reference"])
    for _ in range(2):
        ledger.learnt(shared, ["policy", "value"], at_once=False)
    trunk, attention = 1000 * 13, 8 * 52
    decode = 2 * trunk + 4 * attention + 2 * 300 * 6
    score = 3 * (2 * trunk + 4 * attention) + 2 * (2 * 300 * 5)
    update = 2 * (2 * (6 * trunk + 12 * attention) + 6 * 300 * 5)
    assert seconds(ledger) == decode + score + update
    found = ledger.metrics(PEAKS, 10.0 * seconds(ledger))
    assert found["perf/floor_ratio"] == pytest.approx(10.0, rel=1e-12)
    assert found["perf/mfu"] == pytest.approx(0.1, rel=1e-12)


def test_a_first_pass_that_the_update_makes_anyway_is_not_required(ledger: Ledger, shared: Sequences) -> None:
    ledger.scored(shared, ["policy", "value"])
    ledger.scored(shared, ["reference"])
    reference = floor.forward(FROZEN, shared, lm=True).flops
    ledger.learnt(shared, ["policy"], at_once=True)
    assert seconds(ledger) == reference + floor.training(FULL, shared, lm=True).flops


def test_roles_on_one_module_share_its_pass(ledger: Ledger, shared: Sequences) -> None:
    ledger.learnt(shared, ["critic", "policy"], at_once=False)
    assert seconds(ledger) == floor.training(FULL, shared, lm=True).flops


def test_two_scalars_on_one_trunk_read_no_vocabulary(ledger: Ledger, shared: Sequences) -> None:
    ledger.learnt(shared, ["critic", "critic"], at_once=False)
    assert seconds(ledger) == floor.training(FULL, shared, lm=False).flops


def test_a_module_of_one_trained_weight_is_trained(shared: Sequences) -> None:
    one = attrs.evolve(ADAPTED, trunk_trained=1)
    ledger = Ledger(lambda role: (role, one, True, True))
    ledger.scored(shared, ["policy"])
    ledger.learnt(shared, ["policy"], at_once=True)  # so its first pass is not required
    assert seconds(ledger) == floor.training(one, shared, lm=True).flops


def test_ratio_and_share_go_by_the_peak(ledger: Ledger, shared: Sequences) -> None:
    ledger.learnt(shared, ["policy"], at_once=False)
    flops = floor.training(FULL, shared, lm=True).flops
    found = ledger.metrics(Peaks({"bfloat16": 4.0 * flops}, bandwidth=1e12), 0.5)
    assert found == {"perf/floor_seconds": 0.25, "perf/floor_ratio": 2.0, "perf/mfu": 0.5}
    assert ledger.metrics(PEAKS, 0.0) == {}


def test_a_reference_behind_adapters_is_a_pass_of_its_own(ledger: Ledger, shared: Sequences) -> None:
    ledger.scored(shared, ["base"])
    ledger.learnt(shared, ["adapted"], at_once=True)  # it doesn't give what the base gives
    base = floor.forward(ADAPTED, shared, lm=True, adapters=False).flops
    assert seconds(ledger) == base + floor.training(ADAPTED, shared, lm=True).flops


def test_a_frozen_role_in_a_loss_has_no_backward(ledger: Ledger, shared: Sequences) -> None:
    ledger.learnt(shared, ["reference"], at_once=False)
    assert seconds(ledger) == floor.forward(FROZEN, shared, lm=True).flops


def test_a_floor_that_lacks_a_pass_is_not_told(ledger: Ledger, shared: Sequences) -> None:
    ledger.learnt(shared, ["policy", "foreign"], at_once=False)
    assert ledger.metrics(PEAKS, 1.0) == {}
    ledger.start()
    assert ledger.metrics(PEAKS, 1.0) == {}  # nothing was noted
    ledger.learnt(shared, ["policy"], at_once=False)
    assert seconds(ledger) > 0


# Peaks


def test_peaks_are_measured() -> None:
    peaks = measure("cpu", ["float32", "bfloat16"])
    # Whatever machine this runs on: a product of 1024 rows is faster than 100 MFLOP/s, memory than 100 MB/s, and no CPU
    # core does a PFLOP/s or reads 10 TB/s.
    assert set(peaks.flops) == {"float32", "bfloat16"}
    assert all(1e8 < value < 1e15 for value in peaks.flops.values())
    assert 1e8 < peaks.bandwidth < 1e13


def test_the_higher_of_two_measurements_is_the_peak() -> None:
    one = Peaks({"float32": 5.0, "bfloat16": 2.0}, bandwidth=1.0)
    two = Peaks({"float32": 4.0}, bandwidth=3.0)
    assert one.best(two) == two.best(one) == Peaks({"float32": 5.0, "bfloat16": 2.0}, bandwidth=3.0)
    slow = Peaks({"float32": 0.5}, bandwidth=0.5)
    assert slow.best(Peaks({}, 0.0)) == slow


# In a run


def run_of(folder: Path, **recipe: Any) -> Run:
    run = Run(folder, plan_of(max_steps=1, **recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.loop.measure", lambda device, dtypes, **_: Peaks(dict.fromkeys(dtypes, 1.0), 1e12))
        run.go()
    return run


@pytest.mark.parametrize("at_once", [True, False])
def test_a_runs_floor_is_that_of_its_own_tokens(tmp_path: Path, at_once: bool) -> None:
    """PPO of two epochs: a decode, a reference, two forwards and backwards of policy and value; and a pass for old
    values where the update needs several forwards."""
    run = run_of(
        tmp_path,
        algo={"name": "ppo", "epochs": 2, "minibatches": 1},
        micro_batch_tokens=100_000 if at_once else 100,
    )
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    policy, value = (run.parts.models.shape(role)[1] for role in ("policy", "value"))
    prompts = [run.parts.prompts[row][1] for row in run.parts.feed.rows(0, run.parts.last)]
    lengths = metrics["response/length"] * len(prompts)
    # every trunk pass sees the same tokens; attention and head are counted in the tests above
    tokens = sum(len(prompt) for prompt in prompts) + lengths
    passes = 2 + 2 * (6 + 6) + 2 + (0 if at_once else 2)  # decode, updates, reference, old values (log-probs: engine's)
    least = passes * policy.trunk * tokens
    assert policy.trunk == value.trunk
    assert least < metrics["perf/floor_seconds"] < 1.6 * least  # the rest is head and attention
    more = metrics["perf/floor_seconds"] - least
    head = 2 * policy.head * lengths * (1 + 1 + 2 * 3)
    assert more > head
    assert metrics["perf/floor_ratio"] == pytest.approx(metrics["time/step"] / metrics["perf/floor_seconds"])


def test_fake_ranks_are_measured_against_what_they_can_do_together(shared: Sequences) -> None:
    """One rank has all the work of a pass and the other none: both could have had half."""

    def work(rank: int, world: World) -> dict[str, float]:
        ledger = Ledger(lambda role: (role, FULL, True, True))
        ledger.scored(shared if rank == 0 else shared.select(torch.zeros(0, dtype=torch.long)), ["policy"])
        return ledger.metrics(Peaks({"bfloat16": 100.0 + 100 * rank}, 1e9), 1000.0, world)

    first, second = in_two_ranks(work)
    assert first == second
    flops = floor.forward(FULL, shared, lm=True).flops
    assert first["perf/floor_seconds"] == pytest.approx(flops / 300)
    assert first["perf/mfu"] == pytest.approx(flops / 300 / 1000)
