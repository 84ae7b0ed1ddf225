"""A step's rollouts, sampled in rounds: the algorithm looks at what was judged, keeps some of it, and further prompts
are sampled in place of the groups that it left out, so often as it says.

Further prompts are those that come next in the data order. How many depends on groups of all ranks, so each rank asks
for the same; and a round's prompts are numbered behind those before it, so that each has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.interfaces import Algorithm
from rlhf.metrics import MetricSink
from rlhf.parts import Say
from rlhf.rollouts import Sampler, describe, groups_of, spread
from rlhf.sequences import Rollouts, Sequences
from rlhf.timeline import Timeline
from rlhf.world import World

Rows = Sequence[tuple[Any, Tensor]]
"""Rows of data with the tokens of their prompts."""


@attrs.frozen(eq=False)
class Sampled:
    """This rank's part of a step's rollouts."""

    judged: Rollouts
    """Of all rounds."""
    kept: Rollouts
    """What is learnt from."""


@attrs.define(eq=False)
class Rounds:
    """The rounds of one step."""

    algorithm: Algorithm
    sampler: Sampler
    world: World
    clock: Timeline
    metrics: MetricSink
    step: int
    """From 0; makes the seeds."""
    say: Say = lambda text: None
    sampled: Callable[[Sequences], None] = lambda sequences: None
    """Is told what the engine returned."""
    _failures: list[str] = attrs.field(factory=list, init=False)
    """Why responses of this rank couldn't be had or judged."""
    _left_out: int = attrs.field(default=0, init=False)
    """Responses of this rank that were left out for it, whole groups."""
    _prompts: int = attrs.field(default=0, init=False)
    _groups: int = attrs.field(default=0, init=False)
    _responses: int = attrs.field(default=0, init=False)

    def collect(self, rows: Rows, further: Callable[[int], Rows]) -> Sampled:
        """Carry them out.

        Args:
            rows: of the first round, of all ranks.
            further: so many more rows, which come next in the data order.

        Raises:
            RunError: the algorithm asked for nothing, or keeps what it wasn't given; or nothing could be judged.
        """
        most, wanted, batch = max(1, self.algorithm.sampling_rounds), 0, len(rows)
        judged: list[Rollouts] = []
        kept: list[Rollouts] = []
        groups: list[int] = []  # kept, of all ranks
        selects = most > 1
        while True:
            judged.append(self._round(rows, first=not judged))
            chosen = self._chosen(judged[-1])
            selects |= chosen is not None
            kept.append(judged[-1] if chosen is None else judged[-1].select(chosen.nonzero().flatten()))
            if selects:
                groups += sorted({n for own in self.world.gather(_numbers(kept[-1])) for n in own})
            wanted = wanted or self._groups
            if len(judged) == most or len(groups) >= wanted:
                break
            # So many that, at the share kept so far, they fill the step; no round is larger than the first.
            lacking = wanted - len(groups)
            rows = further(min(batch, -(-lacking * self._groups // len(groups))) if groups else batch)
        found = Sampled(join(judged), _of_groups(join(kept), groups[:wanted]) if selects else join(kept))
        for name, value in spread(found.judged.rewards, self.world).items() if self.sampler.sources else ():
            self.metrics.mean(name, value)
        self._report_failures()
        if selects:
            self._report(found.judged, groups, wanted, rounds=len(judged), most=most)
        return found

    def _round(self, rows: Rows, first: bool) -> Rollouts:
        """This rank's part of one round, judged."""
        with self.clock("rollout"):
            prompts = self.sampler.prompts(rows, self._prompts)
            requests = list(self.algorithm.requests(prompts))  # of all ranks, the same on each
            if not requests:
                raise RunError(f"{type(self.algorithm).__name__} asked for no sample in step {self.step + 1}")
            rollouts = self.sampler.sample(requests, f"step-{self.step}")
            rollouts = attrs.evolve(
                rollouts,
                sequences=attrs.evolve(rollouts.sequences, group=rollouts.sequences.group + self._groups),
                places=rollouts.places + self._responses,
            )
            self.sampled(rollouts.sequences)
        self._prompts += len(rows)
        self._groups += max(groups_of(requests)) + 1
        self._responses += len(rollouts)
        with self.clock("reward"):
            judged, failures = self.sampler.judge(rollouts, needed=first)
        self._failures += failures
        self._left_out += len(rollouts) - len(judged)
        for name, values in describe(judged).items():
            self.metrics.mean(name, values)
        return judged

    def _chosen(self, judged: Rollouts) -> Tensor | None:
        chosen = self.algorithm.keep(judged)
        if chosen is not None and (chosen.dtype != torch.bool or chosen.shape != (len(judged),)):
            given = f"{chosen.dtype} {tuple(chosen.shape)}"
            name = type(self.algorithm).__name__
            raise RunError(f"{name}.keep returned {given}, not a bool for each of {len(judged)} rollouts")
        return chosen

    def _report_failures(self) -> None:
        everybody = self.world.gather([self._failures, self._left_out])
        failed, left_out = [why for whys, _ in everybody for why in whys], sum(n for _, n in everybody)
        self.metrics.mean("rollout/failed", float(len(failed)))
        self.metrics.mean("rollout/left_out", float(left_out))
        for why in failed[:1]:
            what = f"{len(failed)} rollouts failed, {left_out} are left out, whole groups"
            self.say(f"step {self.step + 1}: {what}; first: {why}")

    def _report(self, judged: Rollouts, groups: Sequence[int], wanted: int, rounds: int, most: int) -> None:
        there = sum(len(own) for own in self.world.gather(_numbers(judged)))
        counts = {"sampling/groups": there, "sampling/left_out": there - len(groups)}
        if most > 1:
            counts["sampling/rounds"] = rounds
            counts["sampling/surplus"] = max(0, len(groups) - wanted)
            counts["sampling/lacking"] = max(0, wanted - len(groups))
        for name, count in counts.items():
            self.metrics.mean(name, float(count))
        if not groups:
            what = f"the algorithm keeps none of {there} groups, in {rounds} of at most {most} rounds of sampling"
            self.say(f"step {self.step + 1}: {what}: nothing is learnt")


def _numbers(rollouts: Rollouts) -> list[int]:
    """Of their groups, each once. A group is whole on one rank."""
    found: list[int] = torch.unique(rollouts.sequences.group).tolist()
    return found


def _of_groups(rollouts: Rollouts, groups: Sequence[int]) -> Rollouts:
    """Those of these groups alone."""
    inside = torch.isin(rollouts.sequences.group, torch.tensor(groups, dtype=torch.long))
    return rollouts if bool(inside.all()) else rollouts.select(inside.nonzero().flatten())


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several rounds as those of one, in their order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return attrs.evolve(
        first,
        sequences=_joined([part.sequences for part in parts]),
        logp=None if first.logp is None else torch.cat([part.logp for part in parts if part.logp is not None]),
        finish=tuple(reason for part in parts for reason in part.finish),
        rows=tuple(row for part in parts for row in part.rows),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        texts=tuple(text for part in parts for text in part.texts),
        tags=tuple(tag for part in parts for tag in part.tags),
        rewards=torch.cat([part.rewards for part in parts]),
        reward_parts={name: torch.cat([part.reward_parts[name] for part in parts]) for name in first.reward_parts},
        places=torch.cat([part.places for part in parts]),
    )


def _joined(parts: Sequence[Sequences]) -> Sequences:
    prompt_of, before = [], 0
    for part in parts:
        prompt_of.append(part.prompt_of + before)
        before += len(part.prompts)
    return Sequences(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        prompt_of=torch.cat(prompt_of),
        tokens=torch.cat([part.tokens for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        group=torch.cat([part.group for part in parts]),
    )
