"""What a run uses where the user names no model or data: a tiny model that adds small numbers, often wrongly.

Model and data are made by `scripts/make_starter.py`. The reward is verifiable: is the last number the right one?
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.api import CompletionRow, PreferenceRow, PromptRow, StarterEntry, hookimpl

_MODEL = "rlhf_plugins.starter:model"


def _data(name: str) -> str:
    return f"rlhf_plugins.starter:data/{name}.jsonl"


@hookimpl
def rlhf_starters() -> Iterable[Any]:
    # So small a model gains nothing from bf16, and in fp32 the engine's log-probs are exact.
    tiny = {"mem": "fp32", "micro_batch_tokens": 16_384}
    online = {"max_steps": 40, "batch_size": 128, "eval_rows": 256}
    ppo = {"algo.epochs": 2, "algo.minibatches": 2, "algo.kl_coef": 0.01, "optim.warmup": 0.1}
    for algorithm, settings in (("", online), ("ppo", {**online, **ppo})):
        yield StarterEntry(
            name="sums",
            summary="prompts that ask for a sum, judged by their answer",
            data_type=PromptRow,
            algorithms=algorithm or (),
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
