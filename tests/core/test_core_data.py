"""Data: the order of rows, what is held out, what is refused, and derived seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import facts
from rlhf.compose import compose
from rlhf.data import Feed, Refusals, Rows, derive, end_of, read
from rlhf.errors import RequestError, RowError
from rlhf.interfaces import Context
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rows import LabelledRow, PreferenceRow


def rows_of(count: int) -> Rows[int]:
    return Rows([(f"f:{i}", i) for i in range(count)], Refusals(), ("f",))


@settings(deadline=None)  # of a busy machine
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 9), st.integers(0, 25))
def test_each_pass_takes_every_row_once_and_passes_have_no_seam(count: int, size: int, seed: int, step: int) -> None:
    feed = Feed(count, size, seed, steps=26)
    stream = [row for s in range(step + 1) for row in feed.rows(s)]
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))
    assert len(stream) == (step + 1) * size
    assert Feed(count, size, seed, steps=26).rows(step) == feed.rows(step)  # of seed and step alone, no history


def test_order_changes_with_seed_and_with_each_pass() -> None:
    first, second = Feed(50, 50, 0, 2).rows(0), Feed(50, 50, 0, 2).rows(1)
    assert first != second and Feed(50, 50, 1, 2).rows(0) != first


def test_many_passes_at_once_do_not_confuse_the_kept_orders() -> None:
    feed = Feed(3, 40, 7, 1)  # more passes in one step than orders are kept
    assert feed.rows(0) == [row for s in range(40) for row in Feed(3, 1, 7, 40).rows(s)]


def test_a_run_by_epochs_ends_with_what_is_left() -> None:
    feed = Feed.of(count=10, batch_size=4, seed=0, epochs=1.0, max_steps=None)
    taken = [feed.rows(step, last=end_of(10, 1.0)) for step in range(feed.steps)]
    assert [len(rows) for rows in taken] == [4, 4, 2]
    assert sorted(row for rows in taken for row in rows) == list(range(10))
    assert Feed.of(10, 4, 0, 2.5, None).steps == 7  # 25 positions: six batches of 4 and one row
    assert Feed.of(10, 4, 0, 1.0, max_steps=9).steps == 9  # however often they pass over the data


def test_the_smallest_share_of_a_pass_is_one_row_not_none() -> None:
    feed = Feed.of(count=10, batch_size=4, seed=0, epochs=0.01, max_steps=None)
    assert feed.steps == 1 and len(feed.rows(0, last=end_of(10, 0.01))) == 1


def test_rows_held_out_are_not_learnt_from() -> None:
    kept, out = rows_of(40).held_out(0.25, most=128, seed=3)
    assert len(kept) == 30 and len(out) == 10
    assert sorted(row for part in (kept, out) for _, row in part.items) == list(range(40))
    assert [row for _, row in kept.items] == sorted(row for _, row in kept.items)  # in the file's order
    assert len(rows_of(40).held_out(0.25, most=4, seed=3)[1]) == 4
    assert rows_of(40).held_out(0.25, 128, seed=3)[1].items == out.items
    assert rows_of(40).held_out(0.25, 128, seed=4)[1].items != out.items
    spare, none = rows_of(10).held_out(0.05, 128, 0)
    assert len(none) == 0 and len(spare) == 10


def test_refusals_are_counted_by_reason_with_the_first_place() -> None:
    def even(row: int) -> int:
        if row % 2:
            raise RowError("odd")
        if row == 4:
            raise RowError("four")
        return row * 10

    rows = rows_of(6).convert(even)
    assert rows.items == [("f:0", 0), ("f:2", 20)]
    assert rows.refused.counts == {"odd": 3, "four": 1} and rows.refused.total == 4
    assert rows.refused.lines() == ["3 x odd (first: f:1)", "1 x four (first: f:4)"]
    again = rows.convert(lambda row: row + 1)  # what was refused before isn't forgotten
    assert again.refused.total == 4 and again.items[1] == ("f:2", 21)


def test_only_the_commonest_reasons_are_listed_and_the_rest_counted() -> None:
    refused = Refusals()
    for reason in "aaabbcdef":
        refused.add(reason, "x:1")
    assert refused.lines(most=2) == ["3 x a (first: x:1)", "2 x b (first: x:1)", "4 x 4 further reasons"]


def test_no_row_left_says_why_and_what_is_needed() -> None:
    def refuse(row: int) -> int:
        raise RowError("no 'chosen'; it has prompt")

    assert rows_of(1).require("dpo", PreferenceRow).items == rows_of(1).items
    with pytest.raises(RequestError) as caught:
        rows_of(7).convert(refuse).require("dpo", PreferenceRow)
    text = str(caught.value)
    for part in ("none of its 7 rows", "dpo", "7 x no 'chosen'; it has prompt (first: f:0)", "'rejected'"):
        assert part in text


def test_derived_seeds_are_stable_distinct_and_fit_63_bits() -> None:
    assert derive(0, "step", 1) == derive(0, "step", 1)
    seeds = {derive(seed, purpose, i) for seed in range(3) for purpose in ("step", "init") for i in range(100)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds) and math.log2(max(seeds)) > 61
    assert derive(7, "init", "policy") == 7517291984845461045  # blake2b("7/init/policy"), halved: the same everywhere


def test_rows_of_one_record_are_held_out_together_or_not_at_all() -> None:
    rows = Rows([(f"f:{i // 2}", i) for i in range(80)], Refusals(), ("f",), split=40)
    kept, out = rows.held_out(0.25, most=128, seed=3)
    assert len(kept) == 60 and len(out) == 20
    assert not {where for where, _ in kept.items} & {where for where, _ in out.items}


def test_records_of_several_rows_are_taken_apart_and_counted(tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    lines = [*pairs, {"prompt": "p", "completion": "c", "label": True}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = from_mapping({"algo": "kto", "data": str(tmp_path / "rows.jsonl")}, "test")
    plan = compose(recipe, loaded(), facts.machine())
    found = read(plan.data, LabelledRow, Context(plan=plan))
    assert [(row.completion, row.label) for _, row in found.items] == [("a", True), ("b", False), ("c", True)]
    assert found.split == 1 and found.refused.total == 1
