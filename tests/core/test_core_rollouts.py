"""From requests to judged rollouts: who is in which group, and what a reward may and may not answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.interfaces import Codec, Failed, Reward, Score
from rlhf.rollouts import Sampler, Source, describe, gather, judge, seeded
from rlhf.sequences import Generation, Prompt, Rollouts, Sample, Sequences

NO_SCORE = cast(Score, None)


class Says(Reward):
    """A reward that answers what it was told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return self.answer(rollouts) if isinstance(self.answer, Callable) else self.answer  # type: ignore[arg-type]


def four() -> Rollouts:
    """Two groups of two responses; response i has i + 1 tokens and prompt i // 2."""
    responses = [torch.full((i + 1,), i, dtype=torch.long) for i in range(4)]
    sequences = Sequences.of([torch.tensor([0]), torch.tensor([1])], responses, prompt_of=[0, 0, 1, 1])
    return Rollouts(
        sequences, torch.arange(10.0), ("stop", "length", "stop", "stop"), tuple("wxyz"),
        ("p0", "p0", "p1", "p1" * 50), ("t0", "t1", "t2", "t3"), ("",) * 4, torch.zeros(4),
    )  # fmt: skip


def judged(answer: Any) -> tuple[Rollouts, list[str]]:
    return judge(four(), [Source("judge", 1.0, Says(answer))], NO_SCORE)


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, 1.0, -2.0, 3.0],
        (0.5, 1, -2, 3),
        torch.tensor([0.5, 1.0, -2.0, 3.0]),
        torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([0.5, 1.0, -2.0, 3.0]),
        [torch.tensor(0.5), np.float32(1.0), Decimal(-2), 3],
        lambda rollouts: (x for x in [0.5, 1.0, -2.0, 3.0]),
    ],
)
def test_one_number_a_rollout_in_any_form_is_taken(answer: Any) -> None:
    found, failures = judged(answer)
    assert found.rewards.tolist() == [0.5, 1.0, -2.0, 3.0] and found.rewards.dtype == torch.float32
    assert not found.rewards.requires_grad and failures == []


def test_right_and_wrong_are_one_and_zero() -> None:
    assert judged([True, False, False, True])[0].rewards.tolist() == [1, 0, 0, 1]


ONE = [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "returned None, not one number a rollout"),
        (True, "returned True, not one number a rollout"),
        (1.5, "returned 1.5, not one number a rollout"),
        ("good", "returned 'good', not one number a rollout"),
        (b"good", "returned b'good', not one number a rollout"),
        ({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "not one number a rollout, in order"),
        ({0.5, 1.5, 2.5, 3.5}, "not one number a rollout, in order"),
        (np.array(1.0), "not one number a rollout"),
        (torch.tensor(1.0), r"a tensor of shape (), not (4,)"),
        (torch.zeros(4, 1), r"a tensor of shape (4, 1), not (4,)"),
        (torch.zeros(3), "returned 3 numbers for 4 rollouts"),
        ([], "returned 0 numbers for 4 rollouts"),
        ([1.0] * 5, "returned 5 numbers for 4 rollouts"),
        (["good"] * 4, "returned 'good' for sample 0, not a finite number"),
        ([*ONE, "3"], "returned '3' for sample 3"),
        ([*ONE, None], "returned None for sample 3"),
        ([*ONE, math.nan], "returned nan for sample 3"),
        ([*ONE, math.inf], "returned inf for sample 3"),
        (torch.tensor([*ONE, -math.inf]), "returned -inf for sample 3"),
        ([*ONE, 1e39], "returned 1e+39 for sample 3"),  # finite, but not in float32
        ([*ONE, 10**400], "for sample 3, not a finite number"),
        ([*ONE, 1j], "returned 1j for sample 3"),
        ([*ONE, [1.0]], "returned [1.0] for sample 3"),
        ([*ONE, torch.zeros(2)], "for sample 3, not a finite number"),
        (np.zeros((4, 2)), "for sample 0, not a finite number"),
    ],
)
def test_anything_else_ends_the_run_naming_reward_and_sample(answer: Any, says: str) -> None:
    with pytest.raises(RunError) as caught:
        judged(answer)
    text = str(caught.value)
    assert "reward 'judge'" in text and says in text
    if "sample 3" in says:
        assert "response 't3'" in text and "..." in text  # and its prompt, cut to be readable
        assert len(text) < 700


def test_a_reward_that_raises_ends_the_run_naming_it() -> None:
    def fail(rollouts: Rollouts) -> Any:
        raise KeyError("answer")

    with pytest.raises(RunError, match="reward 'judge' raised KeyError: 'answer'") as caught:
        judged(fail)
    assert isinstance(caught.value.__cause__, KeyError)

    def stop(rollouts: Rollouts) -> Any:
        raise RunError("its server is gone")

    with pytest.raises(RunError, match=r"^its server is gone$"):
        judged(stop)


def test_rewards_add_up_by_weight_and_are_kept_apart() -> None:
    sources = [Source("a", 1.0, Says([1.0, 2.0, 3.0, 4.0])), Source("b", -0.5, Says([2.0, 0.0, 2.0, 0.0]))]
    found, _ = judge(four(), sources, NO_SCORE)
    assert found.rewards.tolist() == [0.0, 2.0, 2.0, 4.0]
    assert found.reward_parts["b"].tolist() == [2.0, 0.0, 2.0, 0.0]  # unweighted
    assert describe(found)["reward/b"].tolist() == [2.0, 0.0, 2.0, 0.0]
    assert describe(found)["response/ended"].tolist() == [1, 0, 1, 1]


def test_a_rollout_that_could_not_be_judged_takes_its_whole_group_along_and_is_counted() -> None:
    found, failures = judged([1.0, Failed("timed out"), 3.0, 4.0])
    assert failures == ["judge: timed out"]
    assert found.texts == ("t2", "t3") and found.rewards.tolist() == [3.0, 4.0]
    assert found.reward_parts["judge"].tolist() == [3.0, 4.0]
    assert found.logp is not None and found.logp.tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_a_response_that_could_not_be_had_is_never_judged_and_takes_its_whole_group_along() -> None:
    seen: list[str] = []

    def judge_them(rollouts: Rollouts) -> Any:
        seen.extend(rollouts.texts)
        return [3.0, 4.0]

    source = Source("judge", 1.0, Says(judge_them))
    found, failures = judge(attrs.evolve(four(), failed={1: "engine: lost"}), [source], NO_SCORE)
    assert failures == ["engine: lost"]
    assert seen == ["t2", "t3"]  # of the other group
    assert found.rewards.tolist() == [3.0, 4.0] and found.failed == {}
    assert describe(found)["reward/mean"].tolist() == [3.0, 4.0]


def test_what_could_not_be_had_and_what_could_not_be_judged_are_counted_together() -> None:
    two = attrs.evolve(four(), failed={0: "engine: lost", 1: "engine: late"})
    source = Source("judge", 1.0, Says([1.0, Failed("timed out")]))
    found, failures = judge(two, [source], NO_SCORE)
    assert len(found) == 0 and failures == ["engine: lost", "engine: late", "judge: timed out"]


def test_a_rollout_two_rewards_failed_at_is_counted_once() -> None:
    sources = [Source(n, 1.0, Says([Failed(n), 1.0, 1.0, 1.0])) for n in "ab"]
    assert judge(four(), sources, NO_SCORE)[1] == ["a: a"]


def test_with_no_rollout_judged_the_run_ends() -> None:
    sources = [Source("judge", 1.0, Says([Failed("no key"), 1.0, Failed("later"), 1.0]))]
    sampler = Sampler(cast(Any, None), sources, Words(), NO_SCORE, seed=0, temperature=1.0)
    with pytest.raises(RunError, match="every rollout of the batch failed; the first: judge: no key"):
        sampler.judge(four())


class Words(Codec):
    eos = 0
    prompt = response = chat = None  # type: ignore[assignment]  # not used here

    def decode(self, tokens: Tensor) -> str:
        return "-".join(map(str, tokens.tolist()))

    def prompt_text(self, tokens: Tensor) -> str:
        return f"<{self.decode(tokens)}>"


def prompt(i: int) -> Prompt:
    return Prompt(torch.tensor([i]), f"row {i}", i)


def generation(responses: int) -> Generation:
    sequences = Sequences.of([torch.tensor([0])] * responses, [torch.tensor([i, i]) for i in range(responses)])
    return Generation(sequences, torch.zeros(2 * responses), cast(Any, ("stop",) * responses), version=4)


def test_responses_are_gathered_by_request() -> None:
    requests = [Sample(prompt(7), count=2, tag="a"), Sample(prompt(8), tag="b")]
    found = gather(requests, generation(3), Words(), temperature=0.7)
    assert found.rows == ("row 7", "row 7", "row 8") and found.tags == ("a", "a", "b")
    assert found.texts == ("0-0", "1-1", "2-2") and found.prompts == ("<7>", "<7>", "<8>")
    assert found.sequences.group.tolist() == [0, 0, 1]
    assert (found.temperature, found.version) == (0.7, 4)


def test_several_requests_of_one_prompt_are_one_group() -> None:
    asked = prompt(1)
    requests = [Sample(asked, count=2), Sample(prompt(2)), Sample(asked, greedy=True)]
    assert gather(requests, generation(4), Words(), 1.0).sequences.group.tolist() == [0, 0, 1, 0]


def test_an_engine_that_returns_another_number_is_an_error() -> None:
    with pytest.raises(RunError, match="returned 3 responses to requests for 2"):
        gather([Sample(prompt(1), count=2)], generation(3), Words(), 1.0)


def test_responses_that_failed_keep_their_place_and_have_no_tokens() -> None:
    sequences = Sequences.of([torch.tensor([0])] * 2, [torch.tensor([], dtype=torch.long), torch.tensor([5, 5])])
    failing = Generation(sequences, torch.zeros(2), ("length", "stop"), failed={0: "late"})
    found = gather([Sample(prompt(1)), Sample(prompt(2))], failing, Words(), 1.0)
    assert found.failed == {0: "late"} and found.texts == ("", "5-5")
    assert found.select(torch.tensor([1, 0])).failed == {1: "late"}
    with pytest.raises(RunError, match="tokens of a response that failed"):
        gather([Sample(prompt(1)), Sample(prompt(2))], attrs.evolve(failing, failed={1: "late"}), Words(), 1.0)


def test_each_request_has_a_seed_of_its_own_that_depends_on_purpose_and_place() -> None:
    requests = [Sample(prompt(i)) for i in range(5)]
    seeds = [request.seed for request in seeded(requests, 0, "step-1")]
    assert len(set(seeds)) == 5
    assert seeds == [request.seed for request in seeded(requests, 0, "step-1")]
    for seed, purpose in ((1, "step-1"), (0, "step-2")):
        assert not set(seeds) & {request.seed for request in seeded(requests, seed, purpose)}
    same = prompt(3)
    first, second = seeded([Sample(same), Sample(same)], 0, "step-1")
    assert first.seed != second.seed  # or both would be the same response
    assert seeded([Sample(prompt(0), seed=9)], 0, "x")[0].seed == 9  # an algorithm's own stays


def test_the_sampler_says_at_which_temperature_it_sampled() -> None:
    class Engine:
        config = None

        def generate(self, requests: list[Sample], temperature: float | None) -> Generation:
            assert all(request.seed is not None for request in requests)
            return generation(len(requests))

    sampler = Sampler(cast(Any, Engine()), [], Words(), NO_SCORE, seed=0, temperature=0.7)
    prompts = sampler.prompts([("row", torch.tensor([1]))] * 2)
    assert [p.index for p in prompts] == [0, 1]
    assert sampler.sample([Sample(p) for p in prompts], "x").temperature == 0.7
    assert sampler.sample([Sample(p) for p in prompts], "x", temperature=0.0).temperature == 0.0
