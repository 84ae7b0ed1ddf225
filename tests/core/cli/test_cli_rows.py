"""What is wrong with rows is told before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Rlhf


@pytest.mark.whole
def test_a_column_that_a_reward_needs_is_missed_before_a_model_is_loaded(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("rlhf.assemble.build", build)
    (tmp_path / "goal.py").write_text("def score(completion, goal, hint=None): return 1.0\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "gaol": "b"}\n')
    words = ("run", "--algo", "ppo", "--data", str(tmp_path / "rows.jsonl"), "--reward", "python",
             "--reward.python.path", f"{tmp_path}/goal.py:score", "--output", str(tmp_path / "out"))  # fmt: skip
    ended = rlhf(*words)
    assert ended.code == 2
    assert "1 x no column 'goal', which reward 'python' needs; its other columns: gaol" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "words", "note"),
    [
        (3, ("--max-steps", "1"), "3 rows are fewer than the batch of 12: each is in every step 4 times"),
        (3, ("--epochs", "1"), "3 rows are fewer than the batch of 12: the first step takes them all"),
        (12, ("--epochs", "1"), ""),
    ],
)
@pytest.mark.whole
def test_fewer_rows_than_a_batch_are_noted(
    rlhf: Rlhf, tmp_path: Path, count: int, words: tuple[str, ...], note: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Question: What is 1 + 1?\\nAnswer:", "completion": " 2"}\n' * count)
    given = ("--algo", "sft", "--data", str(rows), "--batch-size", "12", "--eval-rows", "0", "--track", "none")
    ended = rlhf("run", *given, "--output", str(tmp_path / "out"), *words)
    assert ended.code == 0
    assert (note in ended.err) and ("fewer than the batch" in ended.err) == bool(note)


@pytest.mark.whole
def test_a_reward_looks_at_each_row_before_a_model_is_loaded(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.errors import RowError
    from rlhf_plugins.rewards.length import Length

    def check(reward: Length, row: Any) -> None:
        if row.extra["size"] > 1:
            raise RowError(f"size {row.extra['size']} is more than 1")

    def build(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(Length, "check", check, raising=False)
    monkeypatch.setattr("rlhf.assemble.build", build)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "a", "size": {i}}}\n' for i in (2, 3, 2)))
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "size": 1}\n')
    words = ("run", "--algo", "ppo", "--reward", "length", "--output", str(tmp_path / "out"))
    refused = rlhf(*words, "--data", str(tmp_path / "rows.jsonl"))
    assert refused.code == 2
    assert (
        "2 x reward 'length': size 2 is more than 1 (first: " in refused.err
        and "1 x reward 'length': size 3 is more than 1" in refused.err
    )
    held_out = rlhf(*words, "--data", str(tmp_path / "good.jsonl"), "--eval-data", str(tmp_path / "rows.jsonl"))
    assert held_out.code == 2 and "2 x reward 'length': size 2 is more than 1" in held_out.err
