"""Ragged sequences: what selecting, cutting and joining must leave as it was, and what every mean divides by."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.experience import Batch, Experience, Totals, group_mean, sequence_mean, sequence_sum, token_mean
from rlhf.scores import ScoreRequest, Scores, join_scores
from rlhf.scoring import cut
from rlhf.sequences import Generation, Prompt, Rollouts, Sample, Sequences


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def three() -> Sequences:
    """Responses [1, 2], [3], [4, 5, 6] to prompts 0, 1, 0; the 5 isn't the policy's own."""
    return Sequences.of(
        [ids(10), ids(20, 21)],
        [ids(1, 2), ids(3), ids(4, 5, 6)],
        prompt_of=[0, 1, 0],
        masks=[None, None, torch.tensor([True, False, True])],
    )


def test_lists_become_flat_tensors() -> None:
    made = three()
    assert made.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert made.lengths.tolist() == [2, 1, 3]
    assert made.mask.tolist() == [True, True, True, True, False, True]
    assert made.group.tolist() == [0, 1, 0]  # left out, a response's group is its prompt
    assert (made.token_count, made.group_count, len(made)) == (5, 2, 3)
    assert made.total_lengths() == [3, 3, 4]
    assert made.prompt(2).tolist() == [10]
    assert [part.tolist() for part in made.responses()] == [[1, 2], [3], [4, 5, 6]]
    assert made.rows_of_tokens().tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("wrong", [{"prompt_of": [0]}, {"masks": [None]}, {"group": [0, 0, 0]}])
def test_lists_of_another_length_are_refused(wrong: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} has .* for 2 responses"):
        Sequences.of([ids(1), ids(2)], [ids(3), ids(4)], **wrong)  # type: ignore[arg-type]


def test_select_keeps_each_row_whole_and_drops_unused_prompts() -> None:
    part = three().select(ids(2, 0))
    assert part.tokens.tolist() == [4, 5, 6, 1, 2]
    assert part.mask.tolist() == [True, False, True, True, True]
    assert part.lengths.tolist() == [3, 2]
    assert [prompt.tolist() for prompt in part.prompts] == [[10]]
    assert part.prompt_of.tolist() == [0, 0]
    crossed = three().select(ids(1, 0))
    assert [crossed.prompt(i).tolist() for i in (0, 1)] == [[20, 21], [10]]
    assert crossed.group.tolist() == [1, 0]
    nothing = three().select(ids())
    assert len(nothing) == len(nothing.tokens) == len(nothing.mask) == 0


def test_nothing_is_no_sequences() -> None:
    nothing = Sequences.of([], [])
    assert len(nothing) == len(nothing.tokens) == nothing.token_count == nothing.group_count == 0


def test_what_nobody_said() -> None:
    sample = Sample(Prompt(ids(1), None, 0))
    assert (sample.count, sample.greedy, sample.seed, sample.tag) == (1, False, None, "")
    generation = Generation(three(), None, ("stop",) * 3)
    assert generation.version == 0
    one = ("",) * 3
    rollouts = Rollouts(three(), None, ("stop",) * 3, one, one, one, one, torch.zeros(3))
    assert (rollouts.temperature, rollouts.version) == (1.0, 0)
    assert Experience(three()).temperature == Experience(rollouts).temperature == 1.0
    request = ScoreRequest("policy", three())
    assert (request.temperature, request.entropy) == (1.0, False)


def test_rollouts_are_selected_with_all_that_belongs_to_them() -> None:
    rollouts = Rollouts(
        three(), torch.arange(6.0), ("stop", "length", "stop"), ("r0", "r1", "r2"), ("p0", "p1", "p2"),
        ("t0", "t1", "t2"), ("", "baseline", ""), torch.tensor([1.0, 2.0, 3.0]),
        {"judge": torch.tensor([4.0, 5.0, 6.0])}, 0.7, 3,
    )  # fmt: skip
    part = rollouts.select(ids(2, 1))
    assert part.logp is not None and part.logp.tolist() == [3, 4, 5, 2]
    assert (part.finish, part.rows, part.prompts) == (("stop", "length"), ("r2", "r1"), ("p2", "p1"))
    assert (part.texts, part.tags) == (("t2", "t1"), ("", "baseline"))
    assert part.rewards.tolist() == [3, 2] and part.reward_parts["judge"].tolist() == [6, 5]
    assert part.ended.tolist() == [True, False]
    assert (part.temperature, part.version) == (0.7, 3)


def test_experience_refuses_fields_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"'advantages' is \(3,\), not one a response token: \(6,\)"):
        Experience(three(), {"advantages": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'margin' is \(3, 1\), not one a response: \(3,\)"):
        Experience(three(), margin=torch.zeros(3, 1))
    with pytest.raises(KeyError, match="no 'weight'; it has margin"):
        Experience(three(), margin=torch.zeros(3))["weight"]


def test_experience_spreads_and_selects_its_fields() -> None:
    whole = Experience(three(), {"a": torch.arange(6.0)}, w=torch.tensor([1.0, 2.0, 3.0]))
    assert whole.per_token("w").tolist() == [1, 1, 2, 3, 3, 3]
    assert whole.per_token("a").tolist() == [0, 1, 2, 3, 4, 5]
    whole.temperature = 0.5
    part = whole.select(ids(1, 2))
    assert part["a"].tolist() == [2, 3, 4, 5] and part["w"].tolist() == [2, 3]
    assert part.temperature == 0.5  # or a minibatch would be scored at another temperature than it was sampled at
    more = Experience(part, {"b": torch.zeros(4)})
    assert "a" in more and "b" in more and "w" in more and "c" not in more and more.temperature == 0.5
    assert Batch(part, Totals(1, 1, 1)).temperature == 0.5


def test_means_divide_by_the_totals_of_the_step_not_of_the_batch() -> None:
    batch = Batch(Experience(three()), Totals(tokens=10, sequences=4, groups=8))
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 1000.0, 16.0])  # the 1000 stands on a token that isn't the policy's own
    assert float(token_mean(x, batch)) == pytest.approx(31 / 10)
    assert float(sequence_mean(torch.tensor([1.0, 2.0, 3.0]), batch)) == pytest.approx(6 / 4)
    assert float(group_mean(torch.tensor([1.0, 2.0]), batch)) == pytest.approx(3 / 8)
    assert sequence_sum(x, batch).tolist() == [3, 4, 24]


def test_a_step_of_one_is_divided_by_one_and_one_of_none_by_one_too() -> None:
    for count, expected in ((1, 31.0), (0, 31.0)):  # none: there is nothing to divide, and no 0 / 0
        batch = Batch(Experience(three()), Totals(count, count, count))
        assert float(token_mean(torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0, 16.0]), batch)) == expected
        assert float(sequence_mean(torch.tensor([15.0, 10.0, 6.0]), batch)) == expected
        assert float(group_mean(torch.tensor([15.0, 16.0]), batch)) == expected


def test_a_mean_is_of_as_many_numbers_as_there_are() -> None:
    """Three responses in two groups, six tokens: one a group in the place of one a response would be half the loss."""
    batch = Batch(Experience(three()), Totals(6, 3, 2))
    for mean, right, wrong in (
        (token_mean, 6, (3,)), (sequence_mean, 3, (2,)), (group_mean, 2, (3,)), (sequence_mean, 3, (3, 1)),
    ):  # fmt: skip
        assert float(mean(torch.ones(right), batch)) > 0
        with pytest.raises(ValueError, match=rf"a mean of {re.escape(str(wrong))}, not of one number a \w+"):
            mean(torch.ones(wrong), batch)
    with pytest.raises(ValueError, match=r"not one a response: \(3,\); numbers a token are given as tokens="):
        Experience(three(), advantages=torch.ones(6))


def test_a_masked_token_can_neither_poison_a_mean_nor_its_gradient() -> None:
    batch = Batch(Experience(three()), Totals(5, 3, 2))
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, float("nan"), 16.0], requires_grad=True)
    mean = token_mean(x, batch)
    mean.backward()
    assert float(mean.detach()) == pytest.approx(31 / 5)
    assert x.grad is not None and x.grad.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.0, 0.2])


def test_logged_parts_are_added_up() -> None:
    batch = Batch(Experience(three()), Totals(5, 3, 2))
    batch.log("x", torch.tensor(1.5, requires_grad=True))
    batch.log("x", torch.tensor(2.0))
    assert float(batch.logged["x"]) == 3.5 and not batch.logged["x"].requires_grad
    batch.log("y", torch.tensor(2.0, dtype=torch.float64))
    assert batch.logged["y"].dtype == torch.float32


def test_a_score_of_the_wrong_head_says_so() -> None:
    with pytest.raises(AttributeError, match="role 'value' hold no logp: its head is scalar"):
        _ = Scores("value", values_=torch.zeros(1), score_=torch.zeros(1)).logp
    with pytest.raises(AttributeError, match="entropy=True"):
        _ = Scores("policy", logp_=torch.zeros(1)).entropy


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=12
)  # (prompt tokens, response tokens, group)


def of_shapes(drawn: list[tuple[int, int, int]]) -> Sequences:
    return Sequences.of(
        [torch.arange(p) for p, _, _ in drawn],
        [torch.arange(r) + 100 * i for i, (_, r, _) in enumerate(drawn)],
        group=[g for _, _, g in drawn],
    )


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 60), st.booleans())
def test_cut_takes_every_row_once_within_the_budget(
    drawn: list[tuple[int, int, int]], budget: int, keep_groups: bool
) -> None:
    sequences = of_shapes(drawn)
    lengths = sequences.total_lengths()
    parts = [part.tolist() for part in cut(sequences, budget, keep_groups)]
    assert sorted(row for part in parts for row in part) == list(range(len(sequences)))
    groups = sequences.group.tolist()
    for part in parts:
        units = len({groups[row] for row in part}) if keep_groups else len(part)
        assert units == 1 or max(lengths[row] for row in part) * len(part) <= budget
    if keep_groups:
        homes = [{groups[row] for row in part} for part in parts]
        assert sum(map(len, homes)) == len(set(groups))  # no group lies in two parts
        for part in parts:  # and its members keep their order: a pair stays chosen, rejected
            for group in set(groups):
                members = [row for row in part if groups[row] == group]
                assert members == sorted(members)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 60))
def test_scores_of_parts_are_put_back_in_order(drawn: list[tuple[int, int, int]], budget: int) -> None:
    sequences = of_shapes(drawn)
    whole_tokens = sequences.tokens.float()  # distinct numbers: their places tell them apart
    whole_rows = torch.arange(len(sequences)).float()
    parts = [
        (rows, Scores("x", logp_=whole_tokens[sequences.token_index(rows)], score_=whole_rows[rows]))
        for rows in cut(sequences, budget)
    ]
    joined = join_scores(parts, sequences)
    assert torch.equal(joined.logp, whole_tokens) and torch.equal(joined.score, whole_rows)


def test_joined_scores_have_no_graph() -> None:
    made = three()
    logp, score = torch.ones(6, requires_grad=True), torch.ones(3, requires_grad=True)
    joined = join_scores([(torch.arange(3), Scores("x", logp_=logp, score_=score))], made)
    assert not joined.logp.requires_grad and not joined.score.requires_grad
