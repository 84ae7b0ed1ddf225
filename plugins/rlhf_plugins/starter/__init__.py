"""What a run uses where the user names no model or data: a tiny model that adds small numbers, often wrongly.

Model and data are made by `scripts/make_starter.py`. The reward is verifiable: is the last number the right one?
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.api import CompletionRow, LabelledRow, PreferenceRow, PromptRow, RewardedRow, StarterEntry, StepRow, hookimpl

_MODEL = "rlhf_plugins.starter:model"
_GROUPED = (
    "grpo", "dr-grpo", "dapo", "gfpo", "gspo", "luspo", "cispo", "sapo", "vespo", "dppo", "reinforce++-baseline",
    "best-of-n",
)  # fmt: skip
_SINGLE = ("reinforce++", "remax")


def _data(name: str) -> str:
    return f"rlhf_plugins.starter:data/{name}.jsonl"


@hookimpl
def rlhf_starters() -> Iterable[Any]:
    # So small a model gains nothing from bf16, and in fp32 the engine's log-probs are exact.
    tiny = {"mem": "fp32", "micro_batch_tokens": 16_384}
    online = {"max_steps": 40, "batch_size": 128, "eval_rows": 256}
    ppo = {"algo.epochs": 2, "algo.minibatches": 2, "algo.kl_coef": 0.01, "optim.warmup": 0.1}
    grouped = {"batch_size": 16, "algo.minibatches": 2, "optim.warmup": 0.1}  # of 8 responses each
    single = {"algo.minibatches": 2, "optim.warmup": 0.1}
    for algorithms, settings in (
        ((), online),
        ("ppo", {**online, **ppo}),
        (_GROUPED, {**online, **grouped}),
        ("rloo", {**online, **grouped, "batch_size": 32}),  # of 4 responses each
        ("online-dpo", {**online, "batch_size": 64, "optim.warmup": 0.1}),  # of 2 responses each
        (_SINGLE, {**online, **single}),
    ):
        yield StarterEntry(
            name="sums",
            summary="prompts that ask for a sum, judged by their answer",
            data_type=PromptRow,
            algorithms=algorithms,
            model=_MODEL,
            data=_data("prompts_train"),
            eval_data=_data("prompts_eval"),
            with_model={**tiny, "optim.learning_rate": 3e-4},
            with_data={"reward": "answer", "engine.max_new_tokens": 8},
            with_both=settings,
        )
    yield StarterEntry(
        name="worked sums",
        summary="sums with their answers",
        data_type=CompletionRow,
        model=_MODEL,
        data=_data("sft_train"),
        eval_data=_data("sft_eval"),
        with_model={**tiny, "optim.learning_rate": 1e-3},
        with_both={"epochs": 4.0, "batch_size": 64, "eval_rows": 256},
    )
    for algorithm, rate in (("", 1e-4), ("reward", 1e-3)):
        yield StarterEntry(
            name="judged sums",
            summary="pairs of a right and a wrong sum",
            data_type=PreferenceRow,
            algorithms=algorithm or (),
            model=_MODEL,
            data=_data("pref_train"),
            eval_data=_data("pref_eval"),
            with_model={**tiny, "optim.learning_rate": rate},
            with_both={"epochs": 2.0, "batch_size": 64, "eval_rows": 256},
        )
    yield StarterEntry(
        name="marked sums",
        summary="right and wrong sums, marked as such",
        data_type=LabelledRow,
        model=_MODEL,
        data=_data("pref_train"),
        eval_data=_data("pref_eval"),
        with_model={**tiny, "optim.learning_rate": 1e-4},
        with_both={"epochs": 2.0, "batch_size": 128, "eval_rows": 512},
    )
    yield StarterEntry(
        name="judged steps",
        summary="several answers to a sum, each marked right or wrong",
        data_type=StepRow,
        model=_MODEL,
        data=_data("steps_train"),
        eval_data=_data("steps_eval"),
        with_model={**tiny, "optim.learning_rate": 1e-3},
        with_both={"epochs": 2.0, "batch_size": 64, "eval_rows": 256},
    )
    yield StarterEntry(
        name="paid sums",
        summary="right and wrong sums, worth 1 and 0",
        data_type=RewardedRow,
        model=_MODEL,
        data=_data("pref_train"),
        eval_data=_data("pref_eval"),
        with_model={**tiny, "optim.learning_rate": 1e-3},
        # So short a run needs targets that follow fast; and half of its completions shouldn't be imitated.
        with_both={
            "epochs": 8.0,
            "batch_size": 128,
            "eval_rows": 512,
            "algo.polyak": 0.1,
            "algo.awac_beta": 4.0,
            "algo.shift": 4.0,
        },
    )
