"""Offline rows: bundled, their experience computed once a row whatever batch it comes in, kept over a resume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import pytest
import torch

from fake_ranks import in_two_ranks
from rlhf.data import Refusals, Rows
from rlhf.experience import Experience
from rlhf.interfaces import Algorithm, Score, State
from rlhf.offline import OfflineData
from rlhf.sequences import Example
from rlhf.world import World

NO_SCORE = cast(Score, None)


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def pair(i: int) -> list[Example]:
    """Two sequences of one prompt, the second one longer with i, so that no two rows have the same shape."""
    prompt = ids(100 + i)
    return [
        Example(prompt, ids(i), fields={"margin": float(i)}),
        Example(
            prompt.clone(), torch.full((2 + i,), i), torch.tensor([False] + [True] * (1 + i)), {"margin": float(i)}
        ),
    ]


class Plain(Algorithm):
    def __init__(self) -> None:
        pass


class Counted(Plain):
    """Its experience is the row's own number; it counts the rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def experience(self, rollouts: Any, score: Score) -> Experience:
        lengths = rollouts.lengths
        rows = rollouts["margin"]
        self.asked += rows[::2].long().tolist()
        return Experience(
            rollouts,
            tokens={"at": torch.repeat_interleave(rows, lengths) * 10},
            weight=rows + torch.tensor([0.0, 0.5]).repeat(len(rows) // 2),
        )


def data_of(algorithm: Algorithm, count: int = 4) -> OfflineData:
    rows = Rows([(f"f:{i}", pair(i)) for i in range(count)], Refusals(), ("f",))
    return OfflineData(rows, algorithm)


def check(experience: Experience, rows: list[int]) -> None:
    assert experience["weight"].tolist() == [x for row in rows for x in (row, row + 0.5)]
    assert experience["at"].tolist() == [10.0 * row for row in rows for _ in range(1 + 2 + row)]
    assert experience["margin"].tolist() == [row for row in rows for _ in (0, 1)]


def test_numbers_a_token_follow_their_rows() -> None:
    rows = [[Example(ids(9), ids(*range(n)), token_fields={"label": torch.arange(n) / 4})] for n in (2, 1, 3)]
    data = OfflineData(Rows([(f"f:{i}", row) for i, row in enumerate(rows)], Refusals(), ("f",)), Plain())
    assert data.experience([2, 0], NO_SCORE)["label"].tolist() == [0.0, 0.25, 0.5, 0.0, 0.25]
    assert data.experience([], NO_SCORE)["label"].shape == (0,)  # a rank without rows has it too


def test_other_numbers_a_token_are_other_data() -> None:
    """A run doesn't go on with the same texts and other labels."""

    def digest(label: float) -> str:
        row = [Example(ids(1), ids(2, 3), token_fields={"label": torch.tensor([0.0, label])})]
        return OfflineData(Rows([("f:0", row)], Refusals(), ("f",)), Plain()).digest()

    assert digest(1.0) == digest(1.0) != digest(0.0)


def test_other_numbers_or_masks_of_the_same_texts_are_other_data() -> None:
    def digest(**more: Any) -> str:
        return OfflineData(Rows([("f:0", [Example(ids(1), ids(2, 3), **more)])], Refusals(), ("f",)), Plain()).digest()

    some = [{}, {"fields": {"label": 1.0}}, {"fields": {"label": 0.0}}, {"fields": {"margin": 1.0}},
            {"mask": ids(0, 1).bool()}, {"mask": ids(1, 0).bool()}]  # fmt: skip
    assert len({digest(**more) for more in some}) == len(some)
    assert digest(fields={"a": 1.0, "b": 2.0}) == digest(fields={"b": 2.0, "a": 1.0})


def test_a_row_is_a_group_and_its_shared_prompt_is_held_once() -> None:
    experience = data_of(Plain()).experience([2, 0], NO_SCORE)
    sequences = experience.sequences
    assert sequences.group.tolist() == [0, 0, 1, 1]
    assert [prompt.tolist() for prompt in sequences.prompts] == [[102], [100]]
    assert sequences.prompt_of.tolist() == [0, 0, 1, 1]
    assert sequences.tokens.tolist() == [2, 2, 2, 2, 2, 0, 0, 0]
    assert sequences.mask.tolist() == [True, False, True, True, True, True, False, True]
    assert experience["margin"].tolist() == [2, 2, 0, 0]


def test_experience_is_computed_once_a_row_in_whatever_batches_it_comes() -> None:
    algorithm = Counted()
    data = data_of(algorithm)
    check(data.experience([1, 3], NO_SCORE), [1, 3])
    check(data.experience([3, 0], NO_SCORE), [3, 0])
    assert algorithm.asked == [1, 3, 0]
    check(data.experience([0, 1, 3], NO_SCORE), [0, 1, 3])
    assert algorithm.asked == [1, 3, 0]
    check(data.experience([2, 2], NO_SCORE), [2, 2])  # a batch beyond the end of a pass may hold a row twice
    assert algorithm.asked == [1, 3, 0, 2]


def test_the_rows_of_a_batch_are_groups_of_their_own_even_where_one_comes_twice() -> None:
    assert data_of(Counted()).experience([2, 2], NO_SCORE).sequences.group.tolist() == [0, 0, 1, 1]


def test_a_field_that_the_algorithm_made_anew_takes_the_place_of_the_rows_own() -> None:
    class Doubles(Plain):
        def experience(self, rollouts: Any, score: Score) -> Experience:
            return Experience(rollouts, margin=2 * rollouts["margin"])

    data = data_of(Doubles())
    for _ in range(2):
        assert data.experience([3, 1], NO_SCORE)["margin"].tolist() == [6, 6, 2, 2]


def test_what_was_computed_survives_a_resume() -> None:
    algorithm = Counted()
    data = data_of(algorithm)
    data.experience([3, 1], NO_SCORE)
    again = Counted()
    resumed = data_of(again)
    resumed.load_state(data.state())
    check(resumed.experience([1, 0, 3], NO_SCORE), [1, 0, 3])
    assert again.asked == [0]
    state: State = data_of(Counted()).state()
    assert state == {}
    resumed.load_state(state)
    check(resumed.experience([1], NO_SCORE), [1])
    assert again.asked == [0, 1]  # an empty state holds nothing


class Bundled(Plain):
    def __init__(self, bundles: list[list[int]]) -> None:
        self._bundles = bundles

    def bundles(self, lengths: Sequence[int]) -> Iterable[Sequence[int]]:
        assert lengths == [1 + 1 + 1 + 2 + i for i in range(4)]  # tokens of each row, prompts included
        return self._bundles


def test_items_are_bundles_of_rows() -> None:
    data = data_of(Bundled([[3, 0], [2, 1]]))
    assert len(data) == 2
    experience = data.experience([1, 0], NO_SCORE)
    assert experience["margin"][::2].tolist() == [2, 1, 3, 0]
    assert experience.sequences.group_count == 4  # packing joins rows, not groups


@pytest.mark.parametrize("bundles", [[[0, 1, 2]], [[0, 1, 2, 3, 3]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3, 4]]], ids=str)
def test_bundles_that_lose_or_double_a_row_are_an_error(bundles: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"Bundled.bundles must put each of 4 rows in one bundle"):
        data_of(Bundled(bundles))


def test_two_fake_ranks_share_what_they_compute_and_each_keeps_all() -> None:
    def work(rank: int, world: World) -> tuple[Any, list[int], list[list[int]]]:
        algorithm = Counted()
        data = data_of(algorithm, 5)
        first = data.experience([4, 1, 3, 0], NO_SCORE, world)
        groups = [first.sequences.group.tolist()]
        asked = list(algorithm.asked)
        check(first, [[4, 1, 3, 0][place] for place in dict.fromkeys(groups[0])])
        data.experience([0, 4, 3, 1], NO_SCORE, world)  # cut otherwise, and nothing of it is new
        data.experience([2], NO_SCORE, world)  # one rank has no row of the batch
        return data.state()["rows"], asked, [algorithm.asked[len(asked) :], groups[0]]

    (rows, a, (later, one)), (same, b, (then, two)) = in_two_ranks(work)
    assert rows == same == [0, 1, 2, 3, 4]
    assert sorted(a + b) == [0, 1, 3, 4] and a and b  # each once, and neither did all
    assert sorted(later + then) == [2]
    assert sorted(one + two) == [0, 0, 1, 1, 2, 2, 3, 3]  # places in the batch of both
