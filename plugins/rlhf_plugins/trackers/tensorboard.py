"""Event files for TensorBoard, in RUN/tensorboard: `tensorboard --logdir runs` compares every run of a folder.

A resumed run writes a second file, which purges what the first one had logged beyond the checkpoint, so no curve
doubles back. Histograms, graphs and images are left out: the numbers are those of `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from rlhf.api import Tracker

HELDOUT = "heldout/"


class TensorBoard(Tracker):
    """Scalars a step, held-out ones under `heldout/`; the recipe once, as text and as hyperparameters."""

    def run_started(self, run: Mapping[str, Any]) -> None:
        directory, done = Path(run["directory"]), int(run["first_step"])
        folder = directory / "tensorboard"
        resumed = any(folder.glob("events.*"))
        # What was evaluated before the first step is logged at step 0, so a run that starts over purges that too.
        self._writer = SummaryWriter(str(folder), purge_step=(done + 1 if done else 0) if resumed else None)
        if resumed:  # the recipe is in the first file, and readers purge scalars only
            return
        text = (directory / "recipe.yaml").read_text(encoding="utf-8")
        code_block = "".join(f"    {line}\n" for line in text.split("\n"))  # Markdown's
        self._writer.add_text("recipe", code_block, 0)
        # Not SummaryWriter.add_hparams, which opens a run of its own in a subfolder; and without its third summary,
        # which says that the run has succeeded.
        hyperparameters = dict(flatten(yaml.safe_load(text)))
        for summary in hparams(hyperparameters, {HELDOUT + run["plan"].objective[0]: 0.0})[:2]:
            self._writer.file_writer.add_summary(summary)

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scalars("", step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scalars(HELDOUT, step, metrics)

    def checkpoint_saved(self, step: int, path: Path) -> None:
        # A run that is killed after this resumes from here and never repeats these steps: they must be on disk.
        self._writer.flush()

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        self._writer.close()

    def _scalars(self, prefix: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(prefix + name, value, step)


def flatten(recipe: Any, key: str = "") -> Iterator[tuple[str, int | float | str]]:
    """A recipe as flat names and values, written as the command line does: `algo` = ppo, `algo.clip_range` = 0.2,
    `reward.math.weight` = 1.0. What is null is left out: an unset option has no value to compare."""
    if isinstance(recipe, Mapping):
        for name, value in recipe.items():
            yield from flatten(value, key if key and name == "name" else f"{key}.{name}".lstrip("."))
    elif isinstance(recipe, list) and all(isinstance(item, Mapping) for item in recipe):
        for item in recipe:
            yield from flatten(item, f"{key}.{item.get('label') or item.get('name')}")
    elif isinstance(recipe, list):
        yield key, ", ".join(map(str, recipe))
    elif recipe is not None:
        yield key, recipe if isinstance(recipe, int | float | str) else str(recipe)
