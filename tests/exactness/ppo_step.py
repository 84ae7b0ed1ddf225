"""A step of PPO as a run makes it, with everything seen that it computes on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from rlhf import facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.experience import Experience
from rlhf.loop import Loop
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rundir import RunDirectory
from rlhf.sequences import Rollouts
from rlhf_plugins.algorithms import ppo


@attrs.define
class Seen:
    """What a step computed. Per-token tensors are flat: one response after another."""

    rollouts: Rollouts
    logp_ref: Tensor  # [N], nats
    rewards: Tensor  # [N], reward units: with KL
    advantages: Tensor  # [N], reward units, before whitening
    experience: Experience
    updates: list[Mapping[str, float]]  # of each optimiser step

    def responses(self, flat: Tensor) -> list[list[float]]:
        """A flat tensor's numbers, by response."""
        return [part.tolist() for part in torch.split(flat, self.rollouts.lengths.tolist())]


def carry_out(folder: Path, recipe: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """One step of the recipe, through the loop."""
    plan = compose(from_mapping({"algo": "ppo", "max_steps": 1, "eval_rows": 0, "mem": "fp32", "track": "none",
                                 **recipe}, "test"), loaded(), facts.machine())  # fmt: skip
    parts = assemble(plan, print)
    seen: dict[str, Any] = {"updates": []}

    def spy(module: Any, name: str, keep: Callable[[Any], None]) -> None:
        of_package = getattr(module, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            found = of_package(*arguments, **named)
            keep(found)
            return found

        monkeypatch.setattr(module, name, watched)

    spy(ppo, "penalised_rewards", lambda found: seen.update(rewards=found.rewards))
    spy(ppo.adv, "gae", lambda found: seen.update(advantages=found.advantages))
    experience, minibatch_done = parts.algorithm.experience, parts.algorithm.minibatch_done

    def watched_experience(rollouts: Rollouts, score: Any) -> Experience:
        seen.update(rollouts=rollouts, logp_ref=score(rollouts, "reference").logp)
        seen["experience"] = found = experience(rollouts, score)
        return found

    def watched_minibatch(metrics: Mapping[str, float]) -> bool:
        seen["updates"].append(dict(metrics))
        return minibatch_done(metrics)

    monkeypatch.setattr(parts.algorithm, "experience", watched_experience)
    monkeypatch.setattr(parts.algorithm, "minibatch_done", watched_minibatch)
    directory = RunDirectory(folder / "run")
    directory.open(plan)
    try:
        Loop(parts, directory, print).run(None)
    finally:
        directory.close()
        parts.close()
    return Seen(**seen)


def disturbed(model: Path, folder: Path, kind: str, seed: int, noise: float = 0.02) -> Path:
    """A copy of a model with noise on its weights: kind "lm", or "scalar" with a head of its own."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification
    more = {} if kind == "lm" else {"num_labels": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        other = auto.from_pretrained(model, dtype=torch.float32, **more)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
