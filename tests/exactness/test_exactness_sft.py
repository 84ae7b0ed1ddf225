"""SFT: the losses of five optimiser steps against those of TRL's `SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import (
    BATCH,
    SEED,
    STEPS,
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

from rlhf.data import Feed
from rlhf_plugins.functional.packing import pack

pytestmark = [pytest.mark.peer, needs_trl("1.16.0")]
RATE = 1e-3
PACKS = 2
"""A step."""
RATE_WORD = f"--optim.learning-rate={RATE}"


def trainer(folder: Path, model: Path, rows: Sequence[Row], lora: bool = False, **more: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32) if lora else None  # our defaults
    arguments = SFTConfig(**settings(folder, RATE, **more))
    return SFTTrainer(str(model), args=arguments, train_dataset=Dataset.from_list(list(rows)), peft_config=adapters)


def completions() -> list[Row]:
    """Answers of one to some twenty tokens, so that a mean over rows isn't one over tokens."""
    rows = starter_rows("sft_train")
    return [{**row, "completion": row["completion"] * (1 + i % 5)} for i, row in enumerate(rows)]


def chats() -> list[Row]:
    """Of one and of two turns."""
    rows = starter_rows("sft_train", 2 * STEPS * BATCH)
    turns = [question(row) + answer(row["completion"]) for row in rows]
    first, second = turns[: STEPS * BATCH], turns[STEPS * BATCH :]
    return [{"messages": a + b if i % 2 else a} for i, (a, b) in enumerate(zip(first, second, strict=True))]


def test_completions(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    rows = completions()
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD)
    agree("sft, completions", found, carried_out(trainer(tmp_path, tiny_model, in_order(rows))))


def test_the_whole_text(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    rows = completions()
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD, "--algo.loss-on=all")
    theirs = trainer(tmp_path, tiny_model, in_order(rows), completion_only_loss=False)
    agree("sft, prompts learnt too", found, carried_out(theirs))


def test_in_parts(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """Both cut a batch, into other parts, and divide by the tokens of the whole step."""
    rows = completions()
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD, "--micro-batch-tokens=128")
    theirs = trainer(
        tmp_path, tiny_model, in_order(rows), per_device_train_batch_size=2, gradient_accumulation_steps=BATCH // 2
    )
    agree("sft, gradients accumulated", found, carried_out(theirs))


def test_chats(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    model, rows = with_template(tmp_path, tiny_model, after="\\n"), chats()
    found = ours(tmp_path, "sft", model, rows, RATE_WORD)
    agree("sft, chats", found, carried_out(trainer(tmp_path, model, in_order(rows), assistant_only_loss=True)))


def test_a_prompt_and_its_completion_as_chats(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """TRL learns what the template puts after the end token too, so it must put nothing there."""
    rows = [{"prompt": question(row), "completion": answer(row["completion"])} for row in starter_rows("sft_train")]
    for after in ("", "\\n"):
        folder = tmp_path / f"after-{len(after)}"
        folder.mkdir()
        model = with_template(folder, tiny_model, after)
        found, them = ours(folder, "sft", model, rows, RATE_WORD), carried_out(trainer(folder, model, in_order(rows)))
        if after:
            assert worst(found.loss, them.loss) > 100 * TOLERANCE
        else:
            agree("sft, prompt and completion in chat form", found, them)


def test_lora(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    rows = completions()
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD, mem="fp32,lora")
    theirs = trainer(tmp_path, tiny_model, in_order(rows), lora=True)
    start_from(theirs.model, first_adapters(tmp_path, "sft", tiny_model, rows, "policy"))
    agree("sft, LoRA", found, carried_out(theirs))


def test_packed(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """Both pack best fit decreasing. Lengths that are all different leave no choice but the order of the packs."""
    capacity = 128
    rows: list[Row] = [{"prompt": "Question: Add 4 and 5.\nAnswer:", "completion": " 9" * n} for n in range(1, 50)]
    words = ("--algo.packing=true", f"--algo.pack-length={capacity}", f"--batch-size={PACKS}")
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD, *words)
    theirs = trainer(tmp_path, tiny_model, rows, packing=True, max_length=capacity, per_device_train_batch_size=PACKS)

    lengths = [len(ids) for ids in trainer(tmp_path, tiny_model, rows).train_dataset["input_ids"]]
    assert len(set(lengths)) == len(rows)
    packs = [sorted(lengths[i] for i in item) for item in pack(lengths, capacity)]
    their_packs = [sorted(item) for item in theirs.train_dataset["seq_lengths"]]
    assert sorted(packs) == sorted(their_packs) and len(packs) >= PACKS * STEPS
    feed = Feed.of(len(packs), PACKS, SEED, epochs=1.0, max_steps=STEPS)
    order = [their_packs.index(packs[i]) for step in range(STEPS) for i in feed.rows(step)]
    theirs.train_dataset = theirs.train_dataset.select(order)
    agree("sft, packed", found, carried_out(theirs))


def test_where_tokens_merge_the_prompts_differ(tmp_path: Path, tiny_model: Path) -> None:
    """Of "What " and "is ..." TRL learns the one token " is", behind a prompt without its last space; we keep the
    prompt as it will be when the model is asked, and learn "is"."""
    rows = [{"prompt": "Question: What ", "completion": f"is {i} plus 7?"} for i in range(STEPS * BATCH)]
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD)
    assert worst(found.loss, carried_out(trainer(tmp_path, tiny_model, in_order(rows))).loss) > 100 * TOLERANCE


def test_the_comparison_sees_another_order_and_another_mask(tmp_path: Path, tiny_model: Path) -> None:
    rows = completions()
    found = ours(tmp_path, "sft", tiny_model, rows, RATE_WORD)
    another_order = carried_out(trainer(tmp_path, tiny_model, rows))
    another_mask = carried_out(trainer(tmp_path, tiny_model, in_order(rows), completion_only_loss=False))
    assert worst(found.loss, another_order.loss) > 100 * TOLERANCE
    assert worst(found.loss, another_mask.loss) > 100 * TOLERANCE
