"""An algorithm at work: real runs on a tiny model, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from rlhf.testing.algorithm_numbers import AlgorithmNumbers
from rlhf.testing.contract import require

if TYPE_CHECKING:
    from rlhf.parts import Parts
    from rlhf.testing.kit import Done, Kit


class AlgorithmRuns(AlgorithmNumbers):
    """What a run of any algorithm must keep."""

    learning_rate: ClassVar[float] = 1e-2
    """Of the run that must learn: high, since the model is small and the run short."""
    learning_steps: ClassVar[int] = 16
    learning_batch: ClassVar[int] = 16
    """Rows or prompts a step of that run."""
    learns: ClassVar[float] = 0.1
    """By how much what it learns must rise: the mean reward, from .5 of 1; or, offline, in nats a token, how likely
    completions to learn are, or by how much more likely the better ones are than the worse; or by how much higher a
    trained role with a scalar head scores them."""

    def test_it_learns(self, rlhf_kit: Kit) -> None:
        """A task that any algorithm can learn in a few steps: good letters are rewarded, preferred, or shown."""
        recipe = {"max_steps": self.learning_steps, "batch_size": self.learning_batch}
        plan = self.plan(rlhf_kit, **recipe, optim={"learning_rate": self.learning_rate})
        if self.online(rlhf_kit) and not plan.rewards:
            pytest.skip("nobody judges what it samples, and the kit has no other task for it")
        before: list[float] = []

        def measure(parts: Parts) -> None:
            if not self.online(rlhf_kit):
                before.append(_preference(parts))

        work = rlhf_kit.work(plan, change=measure)
        done = work.go()
        if self.online(rlhf_kit):
            rewards = [line["reward/mean"] for line in done.metrics]
            start, end = rewards[0], sum(rewards[-3:]) / 3
            what = "the mean reward"
        else:
            start, end = before[0], _preference(work.parts)
            what = "what it is to learn (see `learns`)"
        told = f"{what} went from {start:.3f} to {end:.3f} in {self.learning_steps} steps, a rise below {self.learns}"
        require(end - start >= self.learns, f"{told}: a sign that is turned, or a rate, see `learning_rate`")

    def test_a_seed_gives_the_same_numbers(self, rlhf_kit: Kit) -> None:
        once, again = self._whole(rlhf_kit), self._run(rlhf_kit)
        where = _first_difference(once, again)
        require(not where, f"two runs of one seed differ{where}: draw from torch's, numpy's or random's own generator")

    def test_another_seed_gives_other_numbers(self, rlhf_kit: Kit) -> None:
        other = self._run(rlhf_kit, seed=1)
        require(_first_difference(self._whole(rlhf_kit), other), "a run of another seed has the very same numbers")

    def test_a_run_that_is_stopped_and_resumed_is_the_same(self, rlhf_kit: Kit) -> None:
        """To the bit: metrics and weights of a run that was stopped after two steps of four, and gone on with."""
        folder = rlhf_kit.fresh("resumed")
        plan = self.plan(rlhf_kit, max_steps=4)
        rlhf_kit.work(plan, folder).go(stop_after=2)
        resumed = rlhf_kit.work(plan, folder).go(resume=True)
        where = _first_difference(self._whole(rlhf_kit), resumed)
        fix = "what is kept between steps must be in `state`"
        require(not where, f"resumed after 2 steps, the run is another than one never stopped{where}: {fix}")

    def test_forwards_of_other_sizes_give_the_same_numbers(self, rlhf_kit: Kit) -> None:
        """Padding, batching and accumulation, through the model: forwards of at most 16 tokens, padding included."""
        whole, cut = self._run(rlhf_kit, max_steps=1), self._run(rlhf_kit, max_steps=1, micro_batch_tokens=16)
        for name in ("loss", "optim/grad_norm"):
            a, b = whole.metrics[0][name], cut.metrics[0][name]
            near = abs(a - b) <= 1e-3 * max(abs(a), abs(b)) + 1e-5  # sums of float32 in another order, through a model
            require(near, f"in small micro-batches, {name} of the first step is {b:.6g}, not {a:.6g}")

    def _run(self, kit: Kit, **more: Any) -> Done:
        return kit.work(self.plan(kit, **{"max_steps": 4, **more})).go()

    def _whole(self, kit: Kit) -> Done:
        """A run of four steps, made once."""
        found: Done = kit.once(("whole", *self._key()), lambda: self._run(kit))
        return found


def _first_difference(a: Done, b: Done) -> str:
    """Where two runs differ, in words; empty where they don't."""
    from rlhf.testing.kit import same

    for step, (one, other) in enumerate(zip(a.metrics, b.metrics, strict=False), 1):
        for name in one:
            if not same(one[name], other.get(name)):
                return f" from step {step} on ({name}: {one[name]!r} and {other.get(name)!r})"
    if len(a.metrics) != len(b.metrics):
        return f" ({len(a.metrics)} steps and {len(b.metrics)})"
    changed = [name for name in a.weights if not same(a.weights[name], b.weights[name])]
    return f" in the weights at the end ({changed[0]})" if changed else ""


def _preference(parts: Parts) -> float:
    """How much better a trained model knows good completions than bad ones, or how likely those are that it is to
    learn: nats a token, or the difference of scores."""
    from rlhf.rows import CompletionRow
    from rlhf.testing.kit import default_records

    learns = parts.plan.algorithm_entry.data is CompletionRow
    records = default_records()
    policy = parts.models.policy
    codec = policy.codec(next(role for role in parts.plan.roles if role.role.trainable).model.path)

    def mean(key: str) -> float:
        return _mean(parts, codec, [(row["prompt"], row[key]) for row in records])

    return mean("completion") if learns else mean("chosen") - mean("rejected")


def _mean(parts: Parts, codec: Any, texts: Sequence[tuple[str, str]]) -> float:
    from rlhf.sequences import Sequences

    prompts = [codec.prompt(prompt) for prompt, _ in texts]
    sequences = Sequences.of(prompts, [codec.response(text, prompt) for prompt, text in texts])
    role = next(role for role in parts.plan.roles if role.role.trainable)
    scores = parts.score(sequences, role.name)
    return float((scores.logp if role.role.head == "lm" else scores.score).mean())
