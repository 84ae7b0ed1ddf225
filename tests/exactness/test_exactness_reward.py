"""Reward modelling: the losses of five optimiser steps against those of TRL's `RewardTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import (
    BATCH,
    TOLERANCE,
    Agree,
    Row,
    answer,
    carried_out,
    first_adapters,
    in_order,
    needs_trl,
    ours,
    question,
    settings,
    start_from,
    starter_rows,
    with_template,
    worst,
)

pytestmark = [pytest.mark.peer, needs_trl("1.16.0")]
RATE = 1e-4
RATE_WORD = f"--optim.learning-rate={RATE}"


def trainer(folder: Path, model: Path, rows: Sequence[Row], lora: bool = False, **more: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    adapters = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32) if lora else None  # our defaults
    return RewardTrainer(
        str(model),
        args=RewardConfig(**settings(folder, RATE, **more)),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(list(rows)),
        peft_config=adapters,
    )


def pairs() -> list[Row]:
    """Completions of several lengths, so that half of the sequences are padded."""
    rows = starter_rows("pref_train")
    return [{**row, "rejected": row["rejected"] * (1 + i % 3)} for i, row in enumerate(rows)]


def test_pairs(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    rows = pairs()
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD)
    agree("reward", found, carried_out(trainer(tmp_path, scored_model, in_order(rows))))


def test_margins(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    rows = [{**row, "margin": 0.25 * (i % 7)} for i, row in enumerate(pairs())]
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD)
    agree("reward, margins", found, carried_out(trainer(tmp_path, scored_model, in_order(rows))))


def test_centred(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    rows = pairs()
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD, "--algo.centre-coef=0.1")
    theirs = trainer(tmp_path, scored_model, in_order(rows), center_rewards_coefficient=0.1)
    agree("reward, centred", found, carried_out(theirs))


def test_chats(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    """TRL reads the score at the last token, be it one that the template puts after the end token."""
    rows = [
        {"prompt": question(row), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
        for row in pairs()
    ]
    for after in ("", "\\n"):
        folder = tmp_path / f"after-{len(after)}"
        folder.mkdir()
        model = with_template(folder, scored_model, after)
        found, them = (
            ours(folder, "reward", model, rows, RATE_WORD),
            carried_out(trainer(folder, model, in_order(rows))),
        )
        if after:
            assert worst(found.loss, them.loss) > 100 * TOLERANCE
        else:
            agree("reward, chats", found, them)


def test_in_parts(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    rows = pairs()
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD, "--micro-batch-tokens=256")
    theirs = trainer(
        tmp_path, scored_model, in_order(rows), per_device_train_batch_size=2, gradient_accumulation_steps=BATCH // 2
    )
    agree("reward, gradients accumulated", found, carried_out(theirs))


def test_lora(tmp_path: Path, scored_model: Path, agree: Agree) -> None:
    """The head is trained whole in both."""
    rows = pairs()
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD, mem="fp32,lora")
    theirs = trainer(tmp_path, scored_model, in_order(rows), lora=True)
    start_from(theirs.model, first_adapters(tmp_path, "reward", scored_model, rows, "reward"))
    agree("reward, LoRA", found, carried_out(theirs))


def test_the_comparison_sees_margins_left_out_and_another_order(tmp_path: Path, scored_model: Path) -> None:
    rows = [{**row, "margin": 0.25 * (i % 7)} for i, row in enumerate(pairs())]
    found = ours(tmp_path, "reward", scored_model, rows, RATE_WORD, "--algo.use-margin=false")
    assert worst(found.loss, carried_out(trainer(tmp_path, scored_model, in_order(rows))).loss) > 100 * TOLERANCE
    without = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    assert worst(found.loss, carried_out(trainer(tmp_path, scored_model, without)).loss) > 100 * TOLERANCE
