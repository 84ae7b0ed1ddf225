"""Files that are seen whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.errors import RequestError, RunError
from rlhf.files import new_folder, write_atomic, writing


def test_a_text_that_utf8_cannot_hold_is_written_as_its_escape(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.txt", "é \ud800")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é \\ud800"


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as made:
        (made / "x").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == plain.stat().st_mode
    with pytest.raises(ValueError, match="broke"), new_folder(tmp_path / "c"):
        raise ValueError("broke")
    with pytest.raises(RequestError, match="x/y: cannot be written: File exists"), new_folder(tmp_path / "a/b/x/y"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "plain"]


def test_only_what_cannot_be_written_is_the_runs_trouble(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x: cannot be written: No space left"), writing(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="shape"), writing(tmp_path / "x"):
        raise ValueError("shape")
