"""Sampling in rounds: what is kept, how many further prompts are asked for, what is counted; alike for ranks and on a
resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from at_work import Run, Says, plan_of
from fake_ranks import in_two_ranks
from rlhf.data import Feed
from rlhf.errors import RunError
from rlhf.interfaces import Algorithm, Codec, Failed, LogProbs, Score
from rlhf.metrics import MetricSink
from rlhf.parts import Parts
from rlhf.rollouts import Sampler, Source
from rlhf.rounds import Rounds, Sampled
from rlhf.sequences import Generation, Prompt, Rollouts, Sample, Sequences
from rlhf.timeline import Timeline
from rlhf.world import ALONE, World

Keep = Callable[[Rollouts], Tensor | None]


class Echo:
    """An engine: two responses to each prompt, as long as the prompt's number, of tokens that tell the seed."""

    config = None

    def generate(self, requests: Sequence[Sample], temperature: float | None) -> Generation:
        prompts = [request.prompt.tokens for request in requests]
        of = [i for i, request in enumerate(requests) for _ in range(request.count)]
        responses = [torch.full((1 + int(prompts[i]) % 3,), (requests[i].seed or 0) % 1000) for i in of]
        sequences = Sequences.of(prompts, responses, prompt_of=of)
        return Generation(sequences, torch.arange(len(sequences.tokens)).float(), cast(Any, ("stop",) * len(of)))


class Words(Codec):
    def decode(self, tokens: Tensor) -> str:
        return "-".join(map(str, tokens.tolist()))

    prompt_text = decode


class Pairs(Algorithm):
    """Two responses a prompt; keeps those of even rows, or as it is told."""

    def __init__(self, rounds: int, keep: Keep) -> None:
        self.rounds, self._keep = rounds, keep
        self.asked: list[list[tuple[int, int]]] = []  # (place, row) of each round's prompts

    @property
    def sampling_rounds(self) -> int:
        return self.rounds

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        self.asked.append([(prompt.index, prompt.row) for prompt in prompts])
        return [Sample(prompt, count=2) for prompt in prompts]

    def keep(self, rollouts: Rollouts) -> Tensor | None:
        return self._keep(rollouts)


def even(rollouts: Rollouts) -> Tensor:
    return torch.tensor([row % 2 == 0 for row in rollouts.rows], dtype=torch.bool)


def one_of_each(rollouts: Rollouts) -> Tensor:
    """The first of each pair of an even row."""
    return even(rollouts) & (torch.arange(len(rollouts)) % 2 == 0)


def judging(rollouts: Rollouts) -> list[Any]:
    """A row's number; one over 100 can't be judged."""
    return [Failed("over a hundred") if row > 100 else float(row) for row in rollouts.rows]


class At:
    """A step's rounds at work."""

    def __init__(self, rounds: int, keep: Keep = even, world: World = ALONE) -> None:
        self.algorithm, self.metrics, self.said = Pairs(rounds, keep), MetricSink(), list[str]()
        self.world, self.wanted = world, list[int]()
        sources = [Source("row", 1.0, Says(judging))]
        sampler = Sampler(cast(Any, Echo()), sources, Words(), cast(Score, None), 0, 1.0, world)
        clock = Timeline(world)
        self.rounds = Rounds(self.algorithm, sampler, world, clock, self.metrics, step=4, say=self.said.append)

    def collect(self, rows: Sequence[int], more: Sequence[int] = ()) -> Sampled:
        left = [*more]

        def further(count: int) -> list[tuple[int, Tensor]]:
            self.wanted.append(count)
            return [(row, torch.tensor([row])) for row in [left.pop(0) for _ in range(count)]]

        return self.rounds.collect([(row, torch.tensor([row])) for row in rows], further)

    def counted(self) -> dict[str, float]:
        return {k: v for k, v in self.metrics.drain(self.world).items() if k.startswith(("sampling/", "rollout/"))}


def test_one_round_that_keeps_all_is_what_it_was() -> None:
    at = At(1, keep=lambda rollouts: None)
    found = at.collect([1, 2, 3])
    assert found.kept is found.judged and found.kept.rows == (1, 1, 2, 2, 3, 3)
    assert found.kept.sequences.group.tolist() == [0, 0, 1, 1, 2, 2] and found.kept.places.tolist() == [*range(6)]
    assert at.counted() == {"rollout/failed": 0.0, "rollout/left_out": 0.0}


def test_what_isnt_kept_is_left_out_and_counted_by_groups() -> None:
    at = At(1, one_of_each)
    found = at.collect([1, 2, 3, 4])
    assert found.kept.rows == (2, 4) and found.kept.places.tolist() == [2, 6]
    assert found.judged.rows == (1, 1, 2, 2, 3, 3, 4, 4)
    counted = at.counted()
    assert (counted["sampling/groups"], counted["sampling/left_out"]) == (4, 2)
    assert "sampling/rounds" not in counted and at.wanted == []


def test_further_prompts_take_the_place_of_what_was_left_out() -> None:
    at = At(5)
    found = at.collect([1, 2, 3, 5], [7, 4, 9, 11, 6, 8, 10, 12])
    # 1 of 4 kept, 3 lack: at that share 12 would do, so a batch of 4; then 2 of 8, 2 lack: 8, so 4 again.
    assert at.wanted == [4, 4]
    assert at.algorithm.asked == [
        [(0, 1), (1, 2), (2, 3), (3, 5)], [(4, 7), (5, 4), (6, 9), (7, 11)], [(8, 6), (9, 8), (10, 10), (11, 12)]
    ]  # fmt: skip
    assert found.kept.rows == (2, 2, 4, 4, 6, 6, 8, 8)  # those sampled first, and no more than the step has prompts
    # rewards are of all that was sampled: rows 1, 2, 3, 5, 7, 4, 9, 11, 6, 8, 10, 12, twice each
    total, count = at.metrics.sums["reward/mean"]
    assert (total, count) == (2 * 78, 24)
    assert at.metrics.sums["reward/std"][0] == pytest.approx(math.sqrt(650 / 12 - 6.5**2), rel=1e-12)
    assert at.counted() == {
        "sampling/rounds": 3, "sampling/groups": 12, "sampling/left_out": 6, "sampling/surplus": 2,
        "sampling/lacking": 0, "rollout/failed": 0, "rollout/left_out": 0,
    }  # fmt: skip
    assert at.said == []


def test_what_is_joined_fits_together() -> None:
    at = At(2)
    found = at.collect([1, 2, 5], [4, 6, 8])
    kept, sequences = found.kept, found.kept.sequences
    assert at.wanted == [3] and kept.rows == (2, 2, 4, 4, 6, 6)  # 1 of 3 kept; at that share 6 prompts would do
    assert sequences.group.tolist() == [1, 1, 3, 3, 4, 4]
    assert kept.places.tolist() == [2, 3, 6, 7, 8, 9]
    assert kept.rewards.tolist() == kept.reward_parts["row"].tolist() == [2, 2, 4, 4, 6, 6]
    for i, row in enumerate(kept.rows):
        assert sequences.prompt(i).tolist() == [row] and len(sequences.responses()[i]) == 1 + row % 3
        assert kept.texts[i] == "-".join(map(str, sequences.responses()[i].tolist())) and kept.prompts[i] == str(row)
    assert len({responses[0].item() for responses in sequences.responses()}) == 3  # a seed for each prompt
    assert kept.logp is not None and kept.logp.shape == sequences.tokens.shape
    assert found.judged.rows == (1, 1, 2, 2, 5, 5, 4, 4, 6, 6, 8, 8)
    assert len(kept.finish) == len(kept.tags) == 6


def test_a_few_lacking_ask_for_few() -> None:
    at = At(3)
    at.collect([2, 4, 6, 8, 10, 1], [3, 13, 12, 14])
    assert at.wanted == [2, 2]  # 5 of 6 kept and 1 lacks: 6/5; then 5 of 8 and 1 lacks: 8/5
    assert at.counted()["sampling/surplus"] == 1


def test_where_the_rounds_run_out_the_step_learns_from_what_there_is() -> None:
    at = At(2)
    found = at.collect([1, 3, 5, 2], [7, 9, 11, 4])
    assert found.kept.rows == (2, 2, 4, 4)
    counted = at.counted()
    assert (counted["sampling/rounds"], counted["sampling/lacking"], counted["sampling/surplus"]) == (2, 2, 0)
    assert at.said == []


def test_a_step_in_which_nothing_is_kept_says_so() -> None:
    at = At(2)
    found = at.collect([1, 3], [5, 7])
    assert len(found.kept) == 0 and found.judged.rows == (1, 1, 3, 3, 5, 5, 7, 7)
    assert at.said == [
        "step 5: the algorithm keeps none of 4 groups, in 2 of at most 2 rounds of sampling: nothing is learnt"
    ]


def test_what_cant_be_judged_is_replaced_too_and_counted_apart() -> None:
    at = At(3)
    found = at.collect([2, 102], [104, 106, 4, 1])
    assert at.wanted == [2, 2]  # a further round in which none can be judged ends no run
    assert found.kept.rows == (2, 2, 4, 4)
    assert at.counted() == {
        "sampling/rounds": 3, "sampling/groups": 3, "sampling/left_out": 1, "sampling/surplus": 0,
        "sampling/lacking": 0, "rollout/failed": 6, "rollout/left_out": 6,
    }  # fmt: skip
    assert at.said == ["step 5: 6 rollouts failed, 6 are left out, whole groups; first: row: over a hundred"]


def test_a_first_round_without_anything_judged_ends_the_run() -> None:
    with pytest.raises(RunError, match="every rollout of the batch failed; the first: row: over a hundred"):
        At(3).collect([102, 104], [2, 4])


@pytest.mark.parametrize(
    ("chosen", "given"),
    [(torch.ones(4), r"torch.float32 \(4,\)"), (torch.ones(3, dtype=torch.bool), r"torch.bool \(3,\)")],
)
def test_what_isnt_a_choice_is_refused(chosen: Tensor, given: str) -> None:
    with pytest.raises(RunError, match=f"Pairs.keep returned {given}, not a bool for each of 4 rollouts"):
        At(1, keep=lambda rollouts: chosen).collect([1, 2])


def test_an_algorithm_that_asks_for_nothing_is_an_error() -> None:
    with pytest.raises(RunError, match="Pairs asked for no sample in step 5"):
        At(1).collect([])


def test_two_ranks_keep_and_ask_for_what_one_does() -> None:
    rows, more = [1, 2, 3, 5, 8], [7, 4, 9, 11, 6, 10, 12, 14, 16, 18]
    alone = At(4)
    expected = alone.collect(rows, more)

    def work(rank: int, world: World) -> Any:
        at = At(4, world=world)
        return at.collect(rows, more), at.wanted, at.counted()

    (first, wanted, counted), (second, also_wanted, also_counted) = in_two_ranks(work)
    assert wanted == also_wanted == alone.wanted and wanted
    assert counted == also_counted == alone.counted()

    def by_group(*parts: Rollouts) -> list[tuple[int, int, list[int]]]:
        return sorted(
            (int(part.sequences.group[i]), part.rows[i], part.sequences.responses()[i].tolist())
            for part in parts
            for i in range(len(part))
        )

    assert by_group(first.kept, second.kept) == by_group(expected.kept)
    assert by_group(first.judged, second.judged) == by_group(expected.judged)
    assert len(first.kept) and len(second.kept)


# The data's order


def test_further_rows_come_next_and_the_following_step_begins_behind_them() -> None:
    feed = Feed(count=7, batch_size=3, seed=0, steps=4)
    stream = [row for step in range(6) for row in feed.rows(step)]
    assert feed.further(0, 2) == stream[3:5]
    assert feed.further(0, 2, taken=2) == stream[5:7]
    assert feed.rows(1, taken=4) == stream[7:10]
    assert feed.further(1, 1, taken=4) == stream[10:11]


def test_a_run_by_epochs_has_its_steps_and_passes_over_the_data_more_often() -> None:
    feed = Feed.of(count=5, batch_size=3, seed=0, epochs=1.0, max_steps=None)
    stream = [row for step in range(5) for row in feed.rows(step)]
    assert feed.steps == 2
    assert feed.rows(1, last=5, taken=4) == stream[7:9]  # two rows are its own
    assert feed.further(1, 2, last=5, taken=4) == stream[9:11]


# In the loop


def dapo(**more: Any) -> Any:
    algo = {"name": "dapo", "group_size": 2, "sampling_rounds": 3, **more}
    return plan_of(algo=algo, batch_size=6, max_steps=4, save_every=1, keep=9)


def test_a_run_that_goes_on_samples_what_it_would_have(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", dapo())
    whole.go()
    assert whole.loop.taken > 0 and any(line["sampling/rounds"] > 1 for line in whole.metrics()[:2])

    def broken(parts: Parts) -> None:
        loss = parts.algorithm.loss
        nan = lambda batch, score: loss(batch, score) * (math.nan if parts.algorithm.step == 2 else 1.0)  # noqa: E731
        parts.algorithm.loss = nan  # type: ignore[method-assign]

    with pytest.raises(RunError, match="the loss is nan in step 3"):
        Run(tmp_path / "run", dapo(), broken).go()
    resumed = Run(tmp_path / "run", dapo())
    resumed.go(resume=True)
    assert resumed.metrics() == whole.metrics()
    assert resumed.loop.taken == whole.loop.taken
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name


def test_each_round_has_prompts_and_responses_of_its_own(tmp_path: Path) -> None:
    seen: list[tuple[str, list[Any], list[int]]] = []

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        sample = parts.sampler.sample

        def noting(requests: Any, purpose: str, temperature: float | None = None) -> Rollouts:
            prompts = [request.prompt for request in requests]
            seen.append((purpose, [prompt.row for prompt in prompts], [prompt.index for prompt in prompts]))
            return sample(requests, purpose, temperature)

        parts.sampler.sample = noting  # type: ignore[method-assign]
        parts.sampler.sources = [Source("same", 1.0, Says(lambda rollouts: [1.0] * len(rollouts)))]

    run = Run(tmp_path, dapo(), change)
    before = run.weights()
    run.go()
    assert [purpose for purpose, _, _ in seen] == [f"step-{step}" for step in range(4) for _ in range(3)]
    stream = [run.parts.prompts[row][0] for step in range(12) for row in run.parts.feed.rows(step)]
    assert [row for _, rows, _ in seen for row in rows] == stream
    assert [places for _, _, places in seen[:3]] == [[*range(6)], [*range(6, 12)], [*range(12, 18)]]
    # Nothing was kept, so nothing was learnt; and each step said so.
    assert [line["optim/updates"] for line in run.metrics()] == [0.0] * 4
    assert [line["sampling/lacking"] for line in run.metrics()] == [6.0] * 4
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in before.items())
    assert sum("nothing is learnt" in said for said in run.said) == 4


def test_weights_of_an_inexact_engine_follow_rollouts_of_every_round(tmp_path: Path) -> None:
    """A token's weight is exp of what the engine's log-prob lacks, here told by the place of its prompt."""
    made: list[tuple[Tensor, Any]] = []

    def change(parts: Parts) -> None:
        assert parts.sampler is not None
        engine, experience = parts.sampler.engine, parts.algorithm.experience
        generate = engine.generate

        def shifted(requests: Any, temperature: float | None = None) -> Generation:
            found = generate(requests, temperature)
            assert found.logp is not None
            places = torch.tensor([request.prompt.index for request in requests for _ in range(request.count)])
            shift = torch.repeat_interleave(places, found.sequences.lengths) * 0.01
            return Generation(found.sequences, found.logp - shift, found.finish)

        def after(rollouts: Any, score: Any) -> Any:
            made.append((rollouts.sequences.group, experience(rollouts, score)))
            return made[-1][1]

        engine.generate = shifted  # type: ignore[method-assign]
        engine.logprobs = LogProbs()
        parts.algorithm.experience = after  # type: ignore[method-assign]

    run = Run(tmp_path, dapo(), change)
    run.go()
    assert max(line["sampling/rounds"] for line in run.metrics()) > 1
    for group, experience in made:
        expected = torch.exp(0.01 * torch.repeat_interleave(group, experience.lengths))
        # float32 log-probs of the order of 1, computed twice: 2^-24 x some dozen roundings
        assert torch.allclose(experience.importance, expected, atol=1e-4)
