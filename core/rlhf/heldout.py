"""Evaluation on held-out data: rewards of samples online, the loss offline."""

from __future__ import annotations

import torch

from rlhf.data import derive
from rlhf.models import Scorer, cut
from rlhf.offline import OfflineData
from rlhf.parts import Parts, reseed
from rlhf.rollouts import describe
from rlhf.sequences import Batch, Sample, Totals


def evaluate(parts: Parts) -> dict[str, float]:
    """Held-out means, with seeds that never change; empty where nothing is held out. Leaves no trace in the run."""
    sink = parts.context.metrics
    reported, sink.sums = sink.sums, {}  # what components report of held-out rows is not of the next step
    try:
        return _heldout_means(parts)
    finally:
        sink.sums = reported


def _heldout_means(parts: Parts) -> dict[str, float]:
    run = parts.plan.run
    reseed(derive(run.seed, "heldout"))
    if parts.sampler is not None and parts.heldout_prompts:
        prompts = parts.sampler.prompts(parts.heldout_prompts)
        rollouts = parts.sampler.sample([Sample(prompt) for prompt in prompts], "heldout", run.eval_temperature)
        judged, failures = parts.sampler.judge(rollouts)
        means = {name: float(values.double().mean()) for name, values in describe(judged).items()}
        return {**means, **({"rollout/failed": float(len(failures))} if failures else {})}
    if parts.heldout_data is not None and len(parts.heldout_data):
        with torch.no_grad():
            return _heldout_loss(parts, parts.heldout_data)
    return {}


def _heldout_loss(parts: Parts, data: OfflineData) -> dict[str, float]:
    experience = data.experience(range(len(data)), parts.score)
    sequences = experience.sequences
    totals = Totals(sequences.token_count, len(sequences), sequences.group_count)
    scorer = Scorer(parts.models, parts.plan.run.micro_batch_tokens, gradient=True)  # the caller turned gradients off
    sums: dict[str, float] = {"loss": 0.0}
    for rows in cut(sequences, parts.plan.run.micro_batch_tokens, parts.algorithm.unit == "group"):
        batch = Batch(experience.select(rows), totals, parts.backend.device)
        sums["loss"] += float(parts.algorithm.loss(batch, scorer))
        for name, part in batch.logged.items():
            sums[name] = sums.get(name, 0.0) + float(part)
    return sums
