"""The run loop, one for all algorithms:

    data -> [sampling requests -> rollouts -> rewards -> experience] -> minibatches -> loss -> step -> sync

Offline algorithms leave the bracket out. Everything random is drawn from the seed and the step, and everything kept
is in `state`, so a run killed at any instant and resumed computes what it would have computed.
"""

from __future__ import annotations

import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from rlhf import checkpoint, signals
from rlhf.data import derive
from rlhf.errors import Interrupted, RunError
from rlhf.experience import Batch, Experience
from rlhf.files import writing
from rlhf.floor import Peaks
from rlhf.heldout import evaluate
from rlhf.interfaces import Algorithm, State
from rlhf.micro import Units, add_up, check_loss, micro_batches, totals_of
from rlhf.models import weight_stream
from rlhf.parts import Parts, Say, component_states, reseed, restore
from rlhf.peaks import measure
from rlhf.rollouts import Sampler
from rlhf.rounds import Rounds
from rlhf.rundir import RunDirectory
from rlhf.saved import whole
from rlhf.scoring import Ahead, Scorer
from rlhf.sequences import Rollouts
from rlhf.timeline import Timeline

_SAMPLES_A_STEP = 4


class Loop:
    """One run, from its first step or a checkpoint to its last."""

    def __init__(self, parts: Parts, directory: RunDirectory, say: Say) -> None:
        self.parts = parts
        self.directory = directory
        self.say = say
        self.steps = parts.feed.steps
        self.step = 0
        self.taken = 0
        """Rows that steps took beside their own, in further rounds of sampling."""
        self.best: tuple[int, float] | None = None
        self.heldout_before: dict[str, float] = {}
        self.heldout_after: dict[str, float] = {}
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._stop: int | None = None
        self._gradient = Scorer(parts.models, parts.plan.run.micro_batch_tokens, gradient=True)
        self._trackers = list(parts.trackers)
        self._peaks = Peaks({}, 0.0)
        self._memory: tuple[int, ...] = (0, 0)
        self._uncorrected: str | None = None
        self._clock = self._timeline()

    # The run

    def run(self, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
        """Carry the run out; returns its summary.

        Args:
            resumed: the state of the checkpoint to go on from.

        Raises:
            RunError: something broke; the summary is written, what was checkpointed stays.
            Interrupted: a signal asked to stop; a checkpoint is saved.
            KeyboardInterrupt: it did so before the first step, or Ctrl-C twice: nothing is saved.
        """
        error: BaseException | None = None
        status = "failed"
        if resumed is not None:
            self._load(resumed)
        self._tell("run_started", {
            "directory": str(self.directory.path), "shown": str(self.directory.shown),
            "plan": self.parts.plan, "steps": self.steps,
            "first_step": self.step, "notes": list(self.parts.plan.notes),
        })  # fmt: skip
        try:
            with signals.raised():
                self._sync(self.step)
                if resumed is None:
                    self.heldout_before = self._evaluate()
                    if self.heldout_before:
                        self._tell("evaluated", 0, self.heldout_before)
            with signals.noted(self._asked_to_stop):
                self._measure()
                self._clock = self._timeline()
                while self.step < self.steps:
                    self._one_step()
                self._save_model()
            status = "done"
        except (Interrupted, KeyboardInterrupt) as caught:
            error, status = caught, "interrupted"
            raise
        except BaseException as caught:
            error = caught
            raise
        finally:
            summary = self._summary(status, error)
            try:
                self.directory.write_summary(summary)
            except RunError as unwritten:  # a disk that is full ended the run, most likely, and that is what to tell
                if error is None:
                    raise
                self.say(str(unwritten))
            self._tell("run_finished", summary, error)
        return summary

    def _timeline(self) -> Timeline:
        backend = self.parts.backend
        on_gpu = backend.device.startswith("cuda")
        return Timeline(backend.world, wait=torch.cuda.synchronize if on_gpu else lambda: None)

    def _one_step(self) -> None:
        parts, run, world = self.parts, self.parts.plan.run, self.parts.backend.world
        clock = self._clock
        parts.ledger.start()
        reseed(derive(run.seed, "step", self.step))
        parts.algorithm.step = self.step
        rows = parts.feed.rows(self.step, parts.last, self.taken)
        if parts.sampler is not None:
            experience = self._collect(parts.sampler, rows)
        else:
            assert parts.data is not None
            with clock("experience"):
                experience = parts.data.experience(rows, parts.score, world)
        with clock("update"):
            learnt = self._learn(experience)
        with clock("sync"):
            self._sync(self.step + 1)
        self.step += 1
        world.now = f"step {self.step}"
        metrics = {**parts.context.metrics.drain(world), **learnt}
        parts.algorithm.step_done(metrics)
        seconds = clock.finish()
        metrics.update({f"time/{part}": taken for part, taken in seconds.items()})
        with clock.outside():
            self._measure()
        metrics.update(self._performance(seconds["step"], sum(experience.sequences.total_lengths())))
        self.directory.log_metrics(self.step, metrics)
        self._tell("step_finished", self.step, metrics)
        # One rank that was asked to stop stops them all, after the same step.
        self._stop = int(world.max(torch.tensor(self._stop or 0))) or None
        with clock.outside():
            self._after_step()

    def _measure(self) -> None:
        """What the machine does at best: its products after steps 1, 2, 4, 8, ..., since it may be busy when first
        measured; its memory before the first, when what that takes is less than what a step will."""
        dtypes, device = self.parts.ledger.dtypes, self.parts.backend.device
        if not self._peaks.bandwidth:
            self._peaks = measure(device, ())
        if self.step & (self.step - 1) == 0 or not dtypes <= set(self._peaks.flops):
            found = measure(device, dtypes | set(self._peaks.flops), bandwidth=False)
            self._peaks = self._peaks.best(found)

    def _performance(self, seconds: float, tokens: int) -> dict[str, float]:
        """How far the step is from what the machine allows.

        Args:
            seconds: that it took.
        """
        world = self.parts.backend.world
        metrics = {"perf/tokens_per_second": int(world.sum(torch.tensor(tokens))) / max(seconds, 1e-9)}
        metrics.update(self.parts.ledger.metrics(self._peaks, seconds, world))
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self._memory = tuple(world.max(torch.tensor([peak_rss(), device])).tolist())
        metrics["memory/peak_rss_bytes"] = float(self._memory[0])  # of the rank that had most
        if torch.cuda.is_available():
            metrics["memory/peak_device_bytes"] = float(self._memory[1])
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

    def _collect(self, sampler: Sampler, rows: list[int]) -> Experience:
        parts, clock = self.parts, self._clock
        world = parts.backend.world
        parts.score.off_policy.start()
        world.now = f"step {self.step + 1}, rollout"
        rounds = Rounds(
            algorithm=parts.algorithm,
            sampler=sampler,
            world=world,
            clock=clock,
            metrics=parts.context.metrics,
            step=self.step,
            say=self.say,
            sampled=parts.ledger.sampled,
        )
        found = rounds.collect([parts.prompts[row] for row in rows], self._further)
        self._log_samples(found.judged)
        self._tell("rollout_finished", self.step + 1, found.judged)
        world.now = f"step {self.step + 1}, experience"
        # Where a step is one micro-batch, what is scored now is scored again by its first loss, with the same weights.
        ahead = parts.algorithm.minibatches == 1 and not parts.backend.sharded
        parts.score.ahead = self._gradient.ahead = Ahead() if ahead else None
        with clock("experience"), torch.no_grad():
            experience = parts.algorithm.experience(found.kept, parts.score)
            parts.score.off_policy.attach(experience)
            for name, value in parts.score.off_policy.metrics(world).items():
                parts.context.metrics.mean(name, value)
        parts.score.ahead = None
        return experience

    def _further(self, count: int) -> list[Any]:
        """So many more rows, which come next in the data order."""
        parts = self.parts
        rows = parts.feed.further(self.step, count, parts.last, self.taken)
        self.taken += count
        return [parts.prompts[row] for row in rows]

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
        world, seed = parts.backend.world, parts.plan.run.seed
        world.now = f"step {self.step + 1}, update"
        if world.rank:  # dropout of its own; rank 0 draws as a single process does
            reseed(derive(seed, "step", self.step, "rank", world.rank))
        found = Units(experience.sequences, algorithm.unit, world)
        if not len(found):  # the algorithm left every rollout out: nothing to learn, and no loss to report
            return {"loss": math.nan, "optim/updates": 0.0}
        for epoch in range(algorithm.epochs):
            for rows in found.minibatches(algorithm.minibatches, derive(seed, "minibatch", self.step, epoch)):
                whole = len(rows) == len(experience)
                part = experience if whole else experience.select(rows)
                metrics = self._update(part, factor, updates == 0 and whole)
                self._gradient.ahead = None  # of the weights before; what nobody asked for is freed
                updates += 1
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if algorithm.minibatch_done(metrics):
                    return {**{n: s / updates for n, s in sums.items()}, "optim/updates": float(updates)}
        return {**{name: total / updates for name, total in sums.items()}, "optim/updates": float(updates)}

    def _update(self, minibatch: Experience, factor: float, first: bool = False) -> dict[str, float]:
        """One optimiser step. `first`: of the loop's step, on all its experience."""
        parts = self.parts
        backend, sequences, run = parts.backend, minibatch.sequences, parts.plan.run
        nothing = torch.zeros((), dtype=torch.float64)
        logged: dict[str, torch.Tensor] = {"loss": nothing}
        keep, count = parts.algorithm.unit == "group", 0
        self._gradient.asked.clear()
        totals = totals_of(sequences, backend.world)
        minibatch = self._prepared(minibatch)
        mixture = parts.mixture if parts.algorithm.mixes else None
        mixed = mixture.batches(parts.score, backend, run.micro_batch_tokens) if mixture is not None else []
        for batch, weight, last in micro_batches(minibatch, totals, run.micro_batch_tokens, keep, backend):
            loss = parts.algorithm.loss(batch, self._gradient)
            check_loss(loss, parts.plan.algo.name, self.step + 1)
            backend.backward(loss if weight else loss * 0.0, last and not mixed)
            self._tell_uncorrected(batch)
            if weight:
                count += 1
                logged["loss"] = logged["loss"] + loss.detach().double().cpu()
                for name, part in batch.logged.items():
                    logged[name] = logged.get(name, nothing) + part.double()
            del loss  # and its graph, before the next: some functions keep tensors in it that no backward frees
        parts.ledger.learnt(sequences, sorted(self._gradient.asked), at_once=first and count <= 1)
        if mixture is not None:
            parts.ledger.learnt(mixture.sequences, ["policy"], at_once=False)
            for name, part in mixture.learn(mixed, self._gradient, backend, self.step).items():
                logged[name] = logged.get(name, nothing) + part
        result = backend.update(factor)
        if not result.skipped:
            parts.models.stepped()
        metrics = add_up(logged, backend.world)
        metrics["optim/grad_norm"] = result.grad_norm
        metrics["optim/learning_rate"] = result.learning_rate
        metrics["optim/skipped"] = float(result.skipped)
        if result.loss_scale is not None:
            metrics["optim/loss_scale"] = result.loss_scale
        return metrics

    def _prepared(self, minibatch: Experience) -> Experience:
        """With what the algorithm must know of all of it under the weights as they are."""
        parts = self.parts
        if type(parts.algorithm).prepare is Algorithm.prepare:
            return minibatch
        if self._gradient.ahead is None and not parts.backend.sharded:
            self._gradient.ahead = Ahead(minibatch.sequences)
        parts.score.ahead = self._gradient.ahead
        with torch.no_grad():
            found = parts.algorithm.prepare(minibatch, parts.score)
        parts.score.ahead = None
        return found

    def _tell_uncorrected(self, batch: Batch) -> None:
        """A loss that learns from another distribution's samples as if they were the policy's; told once."""
        if batch.corrected or self.parts.algorithm.off_policy:
            return
        if "policy" in self._gradient.asked and self._uncorrected is None:
            self._uncorrected = f"the loss of {self.parts.plan.algo.name} takes no account of batch.importance"
            self.say(f"note: {self._uncorrected}: the engine's samples aren't quite the policy's own")

    def _sync(self, version: int) -> None:
        """Give the engine the policy's weights; their version is how many steps made them."""
        if self.parts.sampler is not None:
            self.parts.sampler.engine.sync(weight_stream(self.parts.models, "policy"), version)

    # Held-out data

    def _evaluate(self) -> dict[str, float]:
        return evaluate(self.parts, self.step)

    def _is_best(self, heldout: Mapping[str, float] | None) -> bool:
        name, direction = self.parts.plan.objective
        if not heldout or name not in heldout:
            return False
        value = heldout[name]
        before = self.best[1] if self.best else self.heldout_before.get(name, math.nan)
        better = math.isnan(before) or (value > before if direction == "max" else value < before)
        if math.isnan(value) or not better:
            return False
        self.best = (self.step, value)
        return True

    # State

    def _state(self) -> State:
        parts = self.parts
        return {
            "loop": {
                "step": self.step,
                "taken": self.taken,
                "best": list(self.best) if self.best else None,
                "heldout_before": self.heldout_before,
                "heldout_after": self.heldout_after,
                "wall_seconds": self._wall_seconds(),
            },
            **component_states(parts),
            "digest": parts.digest,
            "data": parts.data.state() if parts.data else {},
            "mixture": parts.mixture.state() if parts.mixture is not None else {},
            "heldout_data": parts.heldout_data.state() if parts.heldout_data else {},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        parts, loop = self.parts, state["loop"]
        self.step, self.taken = loop["step"], loop["taken"]
        self.best = (loop["best"][0], loop["best"][1]) if loop["best"] else None
        self.heldout_before, self.heldout_after = loop["heldout_before"], loop["heldout_after"]
        self._seconds_before = loop["wall_seconds"]
        restore(parts, state)
        if parts.data:
            parts.data.load_state(state["data"])
        if parts.mixture is not None:
            parts.mixture.load_state(state["mixture"])
        if parts.heldout_data:
            parts.heldout_data.load_state(state["heldout_data"])

    def _checkpoint(self, heldout: Mapping[str, float] | None) -> None:
        world = self.parts.backend.world
        world.now = f"checkpoint of step {self.step}"
        with writing(self.directory.checkpoints):
            path = checkpoint.save(self.directory.checkpoints, self.step, self._state(), heldout, world)
            best = self.best[0] if self.best else None
            if world.rank == 0:
                checkpoint.prune(self.directory.checkpoints, self.step, self.parts.plan.run.keep, best)
        self._tell("checkpoint_saved", self.step, path)

    def _save_model(self) -> None:
        world = self.parts.backend.world
        world.now = "saving the model"
        partial = self.directory.path / "model.part"
        with writing(self.directory.model):
            if world.rank == 0:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir()
            self.parts.models.save(partial)
            if world.rank == 0:
                self.directory.replace_model(partial)
        world.barrier()  # rank 0 may still fail, and then none is done

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
            "peak_rss_bytes": max(peak_rss(), self._memory[0]),
            "peak_device_bytes": max(
                torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0, self._memory[1]
            ),
            "peaks": attrs.asdict(self._peaks),
            "heldout_before": self.heldout_before,
            "heldout_after": self.heldout_after,
            "best": {"step": self.best[0], "metric": name, "value": self.best[1]} if self.best else None,
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }

    def _asked_to_stop(self, number: int) -> None:
        """The run ends after the step at work, with a checkpoint."""
        self._stop = number
        self.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without")


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resume_from(directory: RunDirectory, say: Say) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint; a torn or edited one is refused by name, and the one before it is used."""
    for saved in reversed(whole(directory.checkpoints)):
        try:
            return saved.path, checkpoint.load(saved.path)
        except ValueError as error:
            say(f"checkpoint refused: {error}; trying the one before it")
    return None
