"""The table of docs/planning.md can be made, and its columns that must be exact are: real runs of a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
from truth import CASES, EXACT, SMOLLM2, Case, Scale, make_model, measure, possible, table

from rlhf import facts

SMALL = {**SMOLLM2, "num_hidden_layers": 2, "vocab_size": 2048}
RUN = [
    Case("sft", "bf16"),
    Case("ppo", "bf16,lora"),
    Case("dpo", "fp32,lora,8bit"),
    Case("dpo", "bf16,lora,4bit", ("--backend", "ddp"), ranks=2),
]


@pytest.mark.matrix
def test_weights_gradients_and_optimiser_state_are_exact(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", SMALL)
    found = list(measure(RUN, model, tmp_path, Scale(rows=2, words=8)))
    for truth in found:
        assert {part: round(truth.predicted[part]) for part in EXACT} == {part: truth.measured[part] for part in EXACT}
        assert truth.measured["peak"] > truth.measured["weights"]
    assert len(list(table(found))) == len(RUN) + 4


def test_there_are_a_dozen_cases_of_each_sort() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 12
    assert {case.algo for case in CASES} == {"sft", "dpo", "reward", "ppo"}
    strategies = {name for case in CASES for word in (case.mem, *case.more) for name in word.split(",")}
    assert {"bf16", "fp32", "lora", "4bit", "8bit", "checkpointing", "ema", "offload", "shared-base"} <= strategies
    assert {"adamw8bit", "ddp", "fsdp2", "zero2", "zero3"} <= strategies


def test_cases_for_more_gpus_than_there_are_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert possible(CASES) == list(CASES)  # no GPU, no limit
    gpu = facts.Gpu("fake", 80 << 30, (9, 0))
    monkeypatch.setattr(facts, "machine", lambda: facts.Machine(16, frozenset(), 1, (gpu,), 1))
    left = [case for case in CASES if case not in possible(CASES)]
    assert left == [case for case in CASES if case.ranks == 2] != []
    said = capsys.readouterr().err
    assert all(f"left out, as there are 1 GPUs: {case.name}\n" in said for case in left)
