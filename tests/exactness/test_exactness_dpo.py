"""DPO: the losses of five optimiser steps against those of TRL's `DPOTrainer`."""

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


def trainer(folder: Path, model: Path, rows: Sequence[Row], rate: float = RATE, lora: bool = False, **more: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32) if lora else None  # our defaults
    arguments = DPOConfig(**settings(folder, rate, **more))
    return DPOTrainer(str(model), args=arguments, train_dataset=Dataset.from_list(list(rows)), peft_config=adapters)


def pairs() -> list[Row]:
    """Completions of several lengths, the longer one now the better, now the worse."""
    rows = starter_rows("pref_train")
    return [{**row, "chosen": row["chosen"] * (1 + i % 2), "rejected": row["rejected"] * (1 + i % 3)}
            for i, row in enumerate(rows)]  # fmt: skip


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_losses(tmp_path: Path, tiny_model: Path, agree: Agree, loss: str) -> None:
    rows = pairs()
    found = ours(tmp_path, "dpo", tiny_model, rows, RATE_WORD, f"--algo.loss={loss}", "--algo.beta=0.2")
    theirs = trainer(tmp_path, tiny_model, in_order(rows), loss_type=[loss], beta=0.2)
    agree(f"dpo, {loss}", found, carried_out(theirs))


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_losses_with_lora(tmp_path: Path, tiny_model: Path, agree: Agree, loss: str) -> None:
    """The reference is the policy without its adapters, in both."""
    rows = pairs()
    rate = 3e-3  # adapters move less than the weights they stand for
    words = (f"--optim.learning-rate={rate}", f"--algo.loss={loss}")
    found = ours(tmp_path, "dpo", tiny_model, rows, *words, mem="fp32,lora")
    theirs = trainer(tmp_path, tiny_model, in_order(rows), rate, lora=True, loss_type=[loss])
    start_from(theirs.model, first_adapters(tmp_path, "dpo", tiny_model, rows, "policy"))
    agree(f"dpo, {loss}, LoRA", found, carried_out(theirs))


def test_chats(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """TRL's completion holds what the template puts after the end token; ours ends with that token."""
    rows = [
        {"prompt": question(row), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
        for row in pairs()
    ]
    for after in ("", "\\n"):
        folder = tmp_path / f"after-{len(after)}"
        folder.mkdir()
        model = with_template(folder, tiny_model, after)
        found, them = ours(folder, "dpo", model, rows, RATE_WORD), carried_out(trainer(folder, model, in_order(rows)))
        if after:
            assert worst(found.loss, them.loss) > 100 * TOLERANCE
        else:
            agree("dpo, sigmoid, chats", found, them)


def test_in_parts(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    rows = pairs()
    found = ours(tmp_path, "dpo", tiny_model, rows, RATE_WORD, "--micro-batch-tokens=256")
    theirs = trainer(
        tmp_path, tiny_model, in_order(rows), per_device_train_batch_size=2, gradient_accumulation_steps=BATCH // 2
    )
    agree("dpo, sigmoid, gradients accumulated", found, carried_out(theirs))


def test_label_smoothing(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """TRL's `sigmoid` has none. Its `aot` has, on log-ratios that are sorted within a forward: of a single pair there
    is nothing to sort, and it is conservative DPO."""
    rows = pairs()
    found = ours(tmp_path, "dpo", tiny_model, rows, RATE_WORD, "--algo.label-smoothing=0.1")
    theirs = trainer(
        tmp_path, tiny_model, in_order(rows), loss_type=["aot"], label_smoothing=0.1,
        per_device_train_batch_size=1, gradient_accumulation_steps=BATCH,
    )  # fmt: skip
    agree("dpo, label smoothing", found, carried_out(theirs))


def test_a_reference_of_its_own(tmp_path: Path, tiny_model: Path, agree: Agree) -> None:
    """Another model than the policy starts from, so that the first log-ratios aren't 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    rows = pairs()
    found = ours(tmp_path, "dpo", tiny_model, rows, RATE_WORD, "--model", f"reference={tmp_path / 'other'}")
    theirs = trainer(tmp_path, tiny_model, in_order(rows))
    theirs.ref_model.load_state_dict(other.state_dict())
    agree("dpo, sigmoid, another reference", found, carried_out(theirs))
    assert abs(found.loss[0] - 0.693147) > 0.01


def test_the_comparison_sees_another_loss_another_order_and_another_beta(tmp_path: Path, tiny_model: Path) -> None:
    rows = pairs()
    found = ours(tmp_path, "dpo", tiny_model, rows, RATE_WORD)
    another_loss = carried_out(trainer(tmp_path, tiny_model, in_order(rows), loss_type=["hinge"]))
    another_order = carried_out(trainer(tmp_path, tiny_model, rows))
    another_beta = carried_out(trainer(tmp_path, tiny_model, in_order(rows), beta=0.11))
    # The first step has c = r = 0 under any order and beta; what tells is the steps after it.
    assert worst(found.loss, another_loss.loss) > 100 * TOLERANCE
    assert worst(found.loss, another_order.loss) > 100 * TOLERANCE
    assert worst(found.loss, another_beta.loss) > 10 * TOLERANCE
