"""The run loop, one for all algorithms:

    data -> [sampling requests -> rollouts -> rewards -> experience] -> minibatches -> loss -> step -> sync

Offline algorithms leave the bracket out. Everything random is drawn from the seed and the step, and everything kept
is in `state`, so a run killed at any instant and resumed computes what it would have computed.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from rlhf import checkpoint
from rlhf.data import derive
from rlhf.errors import Interrupted, RunError
from rlhf.floor import Peaks
from rlhf.heldout import evaluate
from rlhf.interfaces import State
from rlhf.models import Scorer, cut, weight_stream
from rlhf.parts import Parts, Say, component_states, reseed, restore
from rlhf.peaks import measure
from rlhf.rollouts import Sampler, describe
from rlhf.rundir import RunDirectory
from rlhf.sequences import Batch, Experience, Rollouts, Totals

_SAMPLES_A_STEP = 4
_STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Loop:
    """One run, from its first step or a checkpoint to its last."""

    def __init__(self, parts: Parts, directory: RunDirectory, say: Say) -> None:
        self.parts = parts
        self.directory = directory
        self.say = say
        self.steps = parts.feed.steps
        self.step = 0
        self.best: tuple[int, float] | None = None
        self.heldout_before: dict[str, float] = {}
        self.heldout_after: dict[str, float] = {}
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._stop: int | None = None
        self._gradient = Scorer(parts.models, parts.plan.run.micro_batch_tokens, gradient=True)
        self._trackers = list(parts.trackers)
        self._peaks = Peaks({}, 0.0)

    # The run

    def run(self, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
        """Carry the run out; returns its summary.

        Args:
            resumed: the state of the checkpoint to go on from.

        Raises:
            RunError: something broke; the summary is written, what was checkpointed stays.
            Interrupted: a signal asked to stop; a checkpoint is saved.
        """
        error: BaseException | None = None
        status = "failed"
        if resumed is not None:
            self._load(resumed)
        self._tell("run_started", {
            "directory": str(self.directory.path), "plan": self.parts.plan, "steps": self.steps,
            "first_step": self.step, "notes": list(self.parts.plan.notes),
        })  # fmt: skip
        try:
            with self._signals():
                self._sync(self.step)
                if resumed is None:
                    self.heldout_before = self._evaluate()
                    if self.heldout_before:
                        self._tell("evaluated", 0, self.heldout_before)
                while self.step < self.steps:
                    self._one_step()
                self._save_model()
            status = "done"
        except Interrupted as caught:
            error, status = caught, "interrupted"
            raise
        except BaseException as caught:
            error = caught
            raise
        finally:
            summary = self._summary(status, error)
            self.directory.write_summary(summary)
            self._tell("run_finished", summary, error)
        return summary

    def _one_step(self) -> None:
        parts, run = self.parts, self.parts.plan.run
        clock = _Clock()
        parts.ledger.start()
        reseed(derive(run.seed, "step", self.step))
        parts.algorithm.step = self.step
        rows = parts.feed.rows(self.step, parts.last)
        if parts.sampler is not None:
            experience = self._collect(parts.sampler, rows, clock)
        else:
            assert parts.data is not None
            with clock("experience"):
                experience = parts.data.experience(rows, parts.score)
        with clock("update"):
            learnt = self._learn(experience)
        with clock("sync"):
            self._sync(self.step + 1)
        self.step += 1
        metrics = {**parts.context.metrics.drain(parts.backend.world), **learnt}
        parts.algorithm.step_done(metrics)
        metrics.update(self._performance(clock, sum(experience.sequences.total_lengths())))
        self.directory.log_metrics(self.step, metrics)
        self._tell("step_finished", self.step, metrics)
        self._after_step()

    def _performance(self, clock: _Clock, tokens: int) -> dict[str, float]:
        """What depends on the machine: times, and how far they are from what it allows."""
        ledger, seconds = self.parts.ledger, clock.total()
        again = self.step & (self.step - 1) == 0  # 1, 2, 4, 8, ...: a machine may be busy when it is first measured
        if again or not ledger.dtypes <= set(self._peaks.flops):
            found = measure(self.parts.backend.device, ledger.dtypes | set(self._peaks.flops))
            self._peaks = self._peaks.best(found)
        metrics = {f"time/{phase}": taken for phase, taken in clock.phases.items()}
        metrics["time/communication"] = 0.0  # of ranks; a parallel backend adds its own
        metrics["perf/tokens_per_second"] = tokens / max(seconds, 1e-9)
        metrics.update(ledger.metrics(self._peaks, seconds))
        metrics["memory/peak_rss_bytes"] = float(peak_rss())
        if torch.cuda.is_available():
            metrics["memory/peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
        return metrics

    def _after_step(self) -> None:
        run = self.parts.plan.run
        heldout = None
        done = self.step == self.steps
        if done or (run.eval_every and self.step % run.eval_every == 0):
            heldout = self._evaluate()
            if heldout:
                self._tell("evaluated", self.step, heldout)
                if done:
                    self.heldout_after = heldout
        better = self._is_best(heldout)
        every = run.save_every or max(1, self.steps // 10)
        if done or better or self.step % every == 0 or self._stop is not None:
            self._checkpoint(heldout)
        if self._stop is not None and not done:
            raise Interrupted(f"stopped by {signal.Signals(self._stop).name} after step {self.step}; checkpoint saved")

    # Sampling

    def _collect(self, sampler: Sampler, rows: list[int], clock: _Clock) -> Experience:
        parts = self.parts
        with clock("rollout"):
            prompts = sampler.prompts([parts.prompts[row] for row in rows])
            requests = list(parts.algorithm.requests(prompts))
            if not requests:
                raise RunError(f"{parts.plan.algo.name} asked for no sample in step {self.step}")
            rollouts = sampler.sample(requests, f"step-{self.step}")
            parts.ledger.sampled(rollouts.sequences)
        with clock("reward"):
            sampled = len(rollouts)
            rollouts, failures = sampler.judge(rollouts)
        for name, values in describe(rollouts).items():
            parts.context.metrics.mean(name, values)
        if len(rollouts) > 1:
            parts.context.metrics.mean("reward/std", rollouts.rewards.std(unbiased=False))
        parts.context.metrics.mean("rollout/failed", float(len(failures)))
        parts.context.metrics.mean("rollout/left_out", float(sampled - len(rollouts)))
        for why in failures[:1]:
            left_out = f"{sampled - len(rollouts)} are left out, whole groups"
            self.say(f"step {self.step + 1}: {len(failures)} rollouts failed to be judged, {left_out}; first: {why}")
        self._log_samples(rollouts)
        self._tell("rollout_finished", self.step + 1, rollouts)
        with clock("experience"), torch.no_grad():
            return parts.algorithm.experience(rollouts, parts.score)

    def _log_samples(self, rollouts: Rollouts) -> None:
        self.directory.log_samples(
            {
                "step": self.step + 1,
                "prompt": rollouts.prompts[i],
                "response": rollouts.texts[i],
                "reward": float(rollouts.rewards[i]),
                **{f"reward/{name}": float(part[i]) for name, part in rollouts.reward_parts.items()},
                "finish": rollouts.finish[i],
                "tokens": int(rollouts.lengths[i]),
            }
            for i in range(min(_SAMPLES_A_STEP, len(rollouts)))
        )

    # Learning

    def _learn(self, experience: Experience) -> dict[str, float]:
        """Epochs of minibatches over the experience; returns the means over the optimiser steps made."""
        parts = self.parts
        algorithm = parts.algorithm
        factor = parts.optimizer.factor(self.step, self.steps)
        sums: dict[str, float] = {}
        updates = 0
        if not len(experience):  # the algorithm left every rollout out: nothing to learn, and no loss to report
            return {"loss": math.nan, "optim/updates": 0.0}
        for epoch in range(algorithm.epochs):
            for rows in self._minibatches(experience, epoch):
                first = updates == 0 and len(rows) == len(experience)
                metrics = self._update(experience.select(rows), factor, first)
                updates += 1
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if algorithm.minibatch_done(metrics):
                    return {**{n: s / updates for n, s in sums.items()}, "optim/updates": float(updates)}
        return {**{name: total / updates for name, total in sums.items()}, "optim/updates": float(updates)}

    def _minibatches(self, experience: Experience, epoch: int) -> Iterator[torch.Tensor]:
        """Rows of each minibatch: whole groups where the algorithm compares their members."""
        count, unit = self.parts.algorithm.minibatches, self.parts.algorithm.unit
        group = experience.sequences.group
        units = torch.unique(group) if unit == "group" else torch.arange(len(experience))
        order = np.random.default_rng(derive(self.parts.plan.run.seed, "minibatch", self.step, epoch)).permutation(
            len(units)
        )
        for part in np.array_split(order, min(count, len(units))):
            chosen = units[torch.from_numpy(np.sort(part))]
            yield torch.isin(group, chosen).nonzero().flatten() if unit == "group" else chosen

    def _update(self, minibatch: Experience, factor: float, first: bool = False) -> dict[str, float]:
        """One optimiser step. `first`: of the loop's step, on all its experience."""
        parts = self.parts
        backend, sequences = parts.backend, minibatch.sequences
        counts = torch.tensor([sequences.token_count, len(sequences), sequences.group_count], dtype=torch.float64)
        totals = Totals(*(int(n) for n in backend.world.sum(counts).tolist()))
        logged: dict[str, torch.Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
        keep = parts.algorithm.unit == "group"
        pieces = list(cut(sequences, parts.plan.run.micro_batch_tokens, keep))
        self._gradient.asked.clear()
        for rows in pieces:
            batch = Batch(minibatch.select(rows), totals, backend.device)
            loss = parts.algorithm.loss(batch, self._gradient)
            if loss.ndim:
                raise RunError(f"{parts.plan.algo.name} returned a loss of shape {tuple(loss.shape)}, not a scalar")
            if not math.isfinite(float(loss.detach())):
                raise RunError(f"the loss is {float(loss.detach())} in step {self.step + 1}; nothing of it was applied")
            backend.backward(loss)
            logged["loss"] += loss.detach().double().cpu()
            for name, part in batch.logged.items():
                logged[name] = logged.get(name, torch.zeros((), dtype=torch.float64)) + part.double()
        result = backend.update(factor)
        parts.ledger.learnt(sequences, sorted(self._gradient.asked), at_once=first and len(pieces) == 1)
        names = sorted(set().union(*backend.world.gather(list(logged))))  # a rank may log what another doesn't
        nothing = torch.zeros((), dtype=torch.float64)
        reduced = backend.world.sum(torch.stack([logged.get(name, nothing) for name in names]))
        metrics = dict(zip(names, reduced.tolist(), strict=True))
        metrics["optim/grad_norm"] = result.grad_norm
        metrics["optim/learning_rate"] = result.learning_rate
        metrics["optim/skipped"] = float(result.skipped)
        return metrics

    def _sync(self, version: int) -> None:
        """Give the engine the policy's weights; their version is how many steps made them."""
        if self.parts.sampler is not None:
            self.parts.sampler.engine.sync(weight_stream(self.parts.models, "policy"), version)

    # Held-out data

    def _evaluate(self) -> dict[str, float]:
        return evaluate(self.parts)

    def _is_best(self, heldout: Mapping[str, float] | None) -> bool:
        name, direction = self.parts.plan.objective
        if not heldout or name not in heldout:
            return False
        value = heldout[name]
        before = self.best[1] if self.best else self.heldout_before.get(name)
        if before is not None and not (value > before if direction == "max" else value < before):
            return False
        self.best = (self.step, value)
        return True

    # State

    def _state(self) -> State:
        parts = self.parts
        return {
            "loop": {
                "step": self.step,
                "best": list(self.best) if self.best else None,
                "heldout_before": self.heldout_before,
                "heldout_after": self.heldout_after,
                "wall_seconds": self._wall_seconds(),
            },
            **component_states(parts),
            "digest": parts.digest(),
            "data": parts.data.state() if parts.data else {},
            "heldout_data": parts.heldout_data.state() if parts.heldout_data else {},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        parts, loop = self.parts, state["loop"]
        self.step = loop["step"]
        self.best = (loop["best"][0], loop["best"][1]) if loop["best"] else None
        self.heldout_before, self.heldout_after = loop["heldout_before"], loop["heldout_after"]
        self._seconds_before = loop["wall_seconds"]
        restore(parts, state)
        if parts.data:
            parts.data.load_state(state["data"])
        if parts.heldout_data:
            parts.heldout_data.load_state(state["heldout_data"])

    def _checkpoint(self, heldout: Mapping[str, float] | None) -> None:
        path = checkpoint.save(self.directory.checkpoints, self.step, self._state(), heldout)
        best = self.best[0] if self.best else None
        checkpoint.prune(self.directory.checkpoints, self.step, self.parts.plan.run.keep, best)
        self._tell("checkpoint_saved", self.step, path)

    def _save_model(self) -> None:
        partial = self.directory.path / "model.part"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        self.parts.models.save(partial)
        self.directory.replace_model(partial)

    # What is told

    def _tell(self, event: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, event)(*arguments)
            except (Exception, SystemExit) as error:  # rich answers a broken pipe by exiting
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self.say(f"tracker {name} failed at {event} and is dropped: {type(error).__name__}: {error}")

    def _wall_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _summary(self, status: str, error: BaseException | None) -> dict[str, Any]:
        name = self.parts.plan.objective[0]
        return {
            "status": status,
            "steps": self.step,
            "wall_seconds": round(self._wall_seconds(), 3),
            "peak_rss_bytes": peak_rss(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "peaks": attrs.asdict(self._peaks),
            "heldout_before": self.heldout_before,
            "heldout_after": self.heldout_after,
            "best": {"step": self.best[0], "metric": name, "value": self.best[1]} if self.best else None,
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A request to stop ends the run after the step at work, with a checkpoint; a second SIGINT ends it at once."""

        def ask(number: int, frame: Any) -> None:
            if self._stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = number
            self.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without")

        try:
            before = {number: signal.signal(number, ask) for number in _STOPPING}
        except ValueError:  # not in the main thread: its owner looks after signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {"rollout": 0.0, "reward": 0.0, "experience": 0.0, "update": 0.0, "sync": 0.0}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] += time.perf_counter() - start

    def total(self) -> float:
        return sum(self.phases.values())


def resume_from(directory: RunDirectory, say: Say) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint; a torn or edited one is refused by name, and the one before it is used."""
    for saved in reversed(checkpoint.whole(directory.checkpoints)):
        try:
            return saved.path, checkpoint.load(saved.path)
        except ValueError as error:
            say(f"checkpoint refused: {error}; trying the one before it")
    return None
