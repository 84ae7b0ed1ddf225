"""The benchmark's rows: lengths, limits, seeds, and files of the user's."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median

import pytest
from stepbench import rows
from stepbench.cases import FULL, QUICK


def words(text: str) -> int:
    return len(text.split())


def letters(text: str) -> int:
    return len(text)


def test_a_text_has_as_many_tokens_as_asked_for():
    assert words(rows.text(Random(1), 97, words)) == 97  # a word more is a token more, so none is too many


def test_a_text_of_costly_words_is_less_than_a_word_too_long():
    made = rows.text(Random(1), 100, letters)
    assert 100 <= len(made) < 100 + 1 + max(map(len, rows.WORDS))


def test_lengths_are_spread_evenly_on_a_log_scale():
    drawn = [rows.length(Random(i), FULL.prompt) for i in range(2000)]
    assert min(drawn) >= 40
    assert max(drawn) <= 300
    # The middle is the geometric mean, 109.5. The median of 2000 has a standard deviation of 1.3 there.
    assert median(drawn) == pytest.approx(109.5, abs=5.2)


def test_rows_are_a_function_of_the_seed():
    first, again, other = (list(islice(rows.rows("pairs", QUICK, seed, letters), 3)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", rows.COLUMNS)
def test_rows_have_their_columns_and_fit(kind):
    for row in islice(rows.rows(kind, QUICK, 0, letters), 20):
        assert tuple(row) == rows.COLUMNS[kind]
        for column in rows.COLUMNS[kind][1:]:
            assert row[column].startswith(" ")  # joined to the prompt, its first word stays a word
            assert len(row["prompt"]) + len(row[column]) + 1 <= QUICK.max_length


def test_the_end_token_counts():
    row = {"prompt": "abc", "completion": "def"}
    assert rows.fits(row, 7, letters)
    assert not rows.fits(row, 6, letters)


def test_no_row_is_used_twice():
    made = rows.enough(rows.rows("sft", QUICK, 0, letters), 4, 3, None, letters)
    assert len(made) == 12


def test_packing_gets_rows_for_two_items_more_than_are_used():
    row = {"prompt": "x" * 50, "completion": "y" * 49}  # 100 tokens with its end
    made = rows.enough(iter([row] * 1000), 2, 3, 128, letters)
    assert len(made) == 11  # (2 x 3 + 2) x 128 = 1024 tokens


def test_too_few_rows_are_an_error():
    with pytest.raises(ValueError, match="3 rows fit, too few for 2 steps of 2"):
        rows.enough(iter([{"prompt": "a", "completion": "b"}] * 3), 2, 2, None, letters)


def test_the_users_rows_are_read_and_long_ones_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    content = [{"prompt": "ab", "completion": " c", "more": 1}, {"prompt": "ab", "completion": " " * 90}]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    assert list(rows.read(path, "sft", 20, letters)) == [{"prompt": "ab", "completion": " c"}]


def test_a_row_of_another_kind_is_an_error(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 2: expected an object with text in prompt, completion"):
        list(rows.read(path, "sft", 20, letters))
