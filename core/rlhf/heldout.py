"""Evaluation on held-out data: rewards of samples online, the loss offline, and of samples that nobody judges."""

from __future__ import annotations

import attrs
import torch

from rlhf.data import derive
from rlhf.experience import Experience
from rlhf.metrics import MetricSink
from rlhf.micro import add_up, micro_batches, totals_of
from rlhf.models import weight_stream
from rlhf.parts import Parts, reseed
from rlhf.rollouts import describe
from rlhf.scoring import Scorer
from rlhf.sequences import Sample


def evaluate(parts: Parts, version: int = 0) -> dict[str, float]:
    """Held-out means, with seeds that never change; empty where nothing is held out. Leaves no trace in the run.

    Args:
        version: of the weights: how many steps made them.
    """
    sink = parts.context.metrics
    reported, sink.sums = sink.sums, {}  # what components report of held-out rows is not of the next step
    engine = parts.sampler.engine if parts.sampler is not None else None
    others = False
    try:
        with parts.models.standing_in("evaluate") as others:
            if others and engine is not None:
                engine.sync(weight_stream(parts.models, "policy"), version)
            return _heldout_means(parts)
    finally:
        sink.sums = reported
        if others and engine is not None:
            engine.sync(weight_stream(parts.models, "policy"), version)


def _heldout_means(parts: Parts) -> dict[str, float]:
    run, world = parts.plan.run, parts.backend.world
    world.now = "held-out evaluation"
    reseed(derive(run.seed, "heldout"))
    if parts.sampler is not None and parts.heldout_prompts:
        prompts = parts.sampler.prompts(parts.heldout_prompts)
        rollouts = parts.sampler.sample([Sample(prompt) for prompt in prompts], "heldout", run.eval_temperature)
        judged, failures = parts.sampler.judge(rollouts)
        sink = MetricSink()
        for name, values in describe(judged).items():
            sink.mean(name, values)
        means = sink.drain(world)
        failed = int(world.sum(torch.tensor(len(failures))))
        found = {name: means[name] for name in describe(judged) if name in means}  # what counts comes first
        found.update({"rollout/failed": float(failed)} if failed else {})
        if parts.sampler.sources:
            return found
        with torch.no_grad():  # log-probs are of the distribution that is trained
            seen = parts.algorithm.experience(attrs.evolve(judged, temperature=parts.sampler.temperature), parts.score)
            return {**_heldout_loss(parts, seen), **found}
    if parts.heldout_data is not None and len(parts.heldout_data):
        with torch.no_grad():
            data = parts.heldout_data
            return _heldout_loss(parts, data.experience(range(len(data)), parts.score, world))
    return {}


def _heldout_loss(parts: Parts, experience: Experience) -> dict[str, float]:
    world = parts.backend.world
    experience = parts.algorithm.prepare(experience, parts.score)
    totals = totals_of(experience.sequences, world)
    budget, keep = parts.plan.run.micro_batch_tokens, parts.algorithm.unit == "group"
    scorer = Scorer(parts.models, budget, gradient=True)  # the caller turned gradients off
    sums = {"loss": torch.zeros((), dtype=torch.float64)}
    for batch, weight, _ in micro_batches(experience, totals, budget, keep, parts.backend):
        loss = parts.algorithm.loss(batch, scorer)
        if weight:
            sums["loss"] += loss.double().cpu()
            for name, part in batch.logged.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + part.double()
    return add_up(sums, world)
