"""The same run twice: by this package through its command line, and by a trainer of TRL on the rows in the same order.

TRL is imported inside functions alone, so that these tests can be collected where it isn't installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from torch import Tensor

from rlhf import cli, facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.data import Feed
from rlhf.plan import resource
from rlhf.recipe import from_mapping
from rlhf.registry import loaded

STEPS, BATCH, SEED = 5, 8, 3
TOLERANCE = 1e-5
"""Relative, of a loss. Two float32 programs that add up in another order differ by some 1e-7 at first; Adam, which
divides by the root of small squares, magnifies that from step to step. Measured: below 1e-6 (docs/exactness.md); a
wrong formula is off by 1e-3 and more."""
NORM_TOLERANCE = 1e-4
"""Relative, of a gradient's norm, which differs more than the loss that it leads to. Measured: below 2e-5."""

CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 2e-5}
"""Of PPO's numbers, a token's too: log-probs are good to 1e-5 nats in float32 (test_exactness_float64.py)."""

Row = Mapping[str, Any]


@attrs.frozen
class Course:
    """What a run reports of each step."""

    loss: list[float]
    grad_norm: list[float]  # before clipping


Agree = Callable[[str, Course, Course], None]
"""The fixture `agree`."""
Close = Callable[[str, Sequence[float], Sequence[float]], None]
"""The fixture `close`."""


def needs_trl(version: str) -> pytest.MarkDecorator:
    """Skips where another TRL, or none, is installed: definitions change from release to release."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    return pytest.mark.skipif(found != version, reason=f"compares with TRL {version}; installed: {found}")


def starter_rows(name: str, count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    """The first rows of the starter's data."""
    lines = Path(resource(f"rlhf_plugins.starter:data/{name}.jsonl")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def with_template(folder: Path, model: Path, after: str) -> Path:
    """The model with the tiny model's chat template, but for what it puts after an assistant's end token, and with the
    marks that TRL needs around what the assistant says."""
    template = (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{- 'Answer:' -}}{% generation %}{{- ' ' + message['content'] + eos_token -}}{% endgeneration %}"
        "{{- 'AFTER' -}}"
        "{%- else -%}{{- 'Question: ' + message['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"
    )
    marked = folder / "marked"
    shutil.copytree(model, marked)
    (marked / "chat_template.jinja").write_text(template.replace("AFTER", after), encoding="utf-8")
    return marked


def question(row: Row) -> list[dict[str, str]]:
    """A starter row's prompt as a chat."""
    return [{"role": "user", "content": row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text.strip()}]


def write(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order in which a run of ours takes them."""
    feed = Feed.of(len(rows), BATCH, SEED, epochs=1.0, max_steps=STEPS)
    return [rows[i] for step in range(STEPS) for i in feed.rows(step)]


def ours(folder: Path, algo: str, model: Path, rows: Sequence[Row], *words: str, mem: str = "fp32") -> Course:
    """A run by `rlhf run`, as its metrics.jsonl has it."""
    run = folder / "run"
    command = ["run", "--algo", algo, "--model", str(model), "--data", str(write(folder, rows)), "--output", str(run)]
    command += ["--max-steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(SEED), "--eval-rows", "0"]
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--mem", mem, "--track", "none", *words])
    assert done.value.code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Course([line["loss"] for line in lines], [line["optim/grad_norm"] for line in lines])


def first_adapters(folder: Path, algo: str, model: Path, rows: Sequence[Row], role: str) -> dict[str, Tensor]:
    """The adapters that a run of `ours` with LoRA starts from: they are drawn from the seed."""
    from peft import get_peft_model_state_dict

    recipe = {"algo": algo, "model": str(model), "data": str(write(folder, rows)), "mem": ["fp32", "lora"]}
    plan = compose(from_mapping({**recipe, "seed": SEED, "eval_rows": 0}, "test"), loaded(), facts.machine())
    found: dict[str, Tensor] = get_peft_model_state_dict(assemble(plan, print).models.body(role))
    return {name: tensor.clone() for name, tensor in found.items()}


def start_from(theirs: Any, adapters: Mapping[str, Tensor]) -> None:
    """Give a PEFT model these adapters, all of them."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    assert set(get_peft_model_state_dict(theirs)) == set(adapters)
    set_peft_model_state_dict(theirs, dict(adapters))


def settings(folder: Path, rate: float, **more: Any) -> dict[str, Any]:
    """A TRL trainer's arguments that say what ours does: float32, a constant rate, rows as they come, none cut."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        **more,
    }


def carried_out(trainer: Any) -> Course:
    """A TRL trainer's run, as it logs it."""
    assert trainer.args.max_grad_norm == 1.0 and trainer.args.weight_decay == 0.0  # as ours by default
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return Course([line["loss"] for line in lines], [line["grad_norm"] for line in lines])


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two series."""
    assert len(ours) == len(theirs) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def moves(losses: Sequence[float]) -> bool:
    """The loss changes by more than 1 % over the run, so that equal losses mean equal updates."""
    return max(losses) - min(losses) > 0.01 * max(losses)
