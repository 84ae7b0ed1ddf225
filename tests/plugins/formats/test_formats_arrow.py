"""Parquet files, saved data sets, folders of files, and the hub (whose download alone is stood in for)."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from rlhf.api import Context, PromptRow, RequestError
from rlhf_plugins.formats import FormatConfig
from rlhf_plugins.formats.arrow import HuggingFace, Parquet

ROWS = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "answer": "6"}]


def read(kind: type, path: str | Path, **options: Any) -> list[tuple[str, Any]]:
    return list(kind(FormatConfig(**options), Context(None)).read(str(path)))  # type: ignore[arg-type]


def records(kind: type, path: str | Path, **options: Any) -> list[Any]:
    return [record for _, record in read(kind, path, **options)]


# Parquet


def test_parquet_says_the_row_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"prompt": f"p{i}"} for i in range(2500)]  # more than two of the reader's batches
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(Parquet, path)
    assert [record for _, record in found] == rows
    assert (found[0][0], found[-1][0]) == (f"{path}, row 1", f"{path}, row 2500")
    assert records(Parquet, path, limit=1500) == rows[:1500]


def test_parquet_nulls_and_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": None}]
    day = datetime.date(2024, 5, 1)
    rows = [
        {"messages": chat, "prompt": None, "label": True, "day": day},
        {"messages": None, "prompt": "p", "label": None, "day": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert records(Parquet, path) == [
        {"prompt": ({"role": "user", "content": "a"},), "completion": "b", "label": True, "day": day},
        {"prompt": "p", "day": None},
    ]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"PAR1 not", "as Parquet"), (b"no magic bytes here", "as Parquet")]
)
def test_files_that_are_no_parquet(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(Parquet, path)


def test_parquet_that_breaks_later(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"prompt": os.urandom(16).hex()} for _ in range(9999)])
    parquet.write_table(table, path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[5000:6000] = bytes(1000)  # within the column's pages; the footer is whole
    path.write_bytes(content)
    with pytest.raises(RequestError, match="can't be read as Parquet"):
        read(Parquet, path)


def test_parquet_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": broken}), path)
    with pytest.raises(RequestError, match=r"can't be read as Parquet: .*utf-8"):
        read(Parquet, path)


def test_parquet_of_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([text]) for text in "abc"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "answer", "prompt"]), path)
    with pytest.raises(RequestError, match="has the columns 'prompt' twice"):
        read(Parquet, path)


def test_parquet_has_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    with pytest.raises(RequestError, match=r"--format\.split test: .*has no splits"):
        read(Parquet, path, split="test")


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(RequestError, match="holds no rows"):
        read(Parquet, path)


# Saved data sets


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).select([1, 0]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved"
    assert read(HuggingFace, path) == [(f"{path}, row 1", ROWS[1]), (f"{path}, row 2", ROWS[0])]
    with pytest.raises(RequestError, match="is one data set, of the split None, not 'test'"):
        read(HuggingFace, path, split="test")


def test_a_saved_data_set_of_splits(tmp_path: Path) -> None:
    splits = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert read(HuggingFace, tmp_path) == [(f"{tmp_path}[train], row 1", ROWS[1])]
    assert records(HuggingFace, tmp_path, split="test") == ROWS[:1]
    assert records(HuggingFace, tmp_path / "test") == ROWS[:1]
    with pytest.raises(RequestError, match=r"no 'dev'\n.*one of: test, train"):
        read(HuggingFace, tmp_path, split="dev")


def test_a_broken_saved_data_set(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(RequestError, match="can't be read as a saved data set"):
        read(HuggingFace, tmp_path)


# Folders of data files


def folder(path: Path, files: dict[str, list[dict[str, str]]]) -> Path:
    for name, rows in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path / name)
        else:
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_of_files_reads_them_in_order(tmp_path: Path) -> None:
    folder(tmp_path, {"b.jsonl": ROWS[1:], "a.parquet": ROWS[:1], ".hidden/c.jsonl": ROWS})
    (tmp_path / "README.md").write_text("no data")
    assert read(HuggingFace, tmp_path) == [
        (f"{tmp_path / 'a.parquet'}, row 1", ROWS[0]),
        (f"{tmp_path / 'b.jsonl'}:1", ROWS[1]),
    ]


def test_a_folder_of_splits_by_name(tmp_path: Path) -> None:
    folder(
        tmp_path,
        {
            "data/train-00000-of-00002.parquet": ROWS[:1],
            "data/train-00001-of-00002.parquet": ROWS[1:],
            "data/test-00000-of-00001.parquet": ROWS[:1],
            "dev/a.jsonl": ROWS[1:],
        },
    )
    assert records(HuggingFace, tmp_path) == ROWS
    assert records(HuggingFace, tmp_path, split="test") == ROWS[:1]
    assert records(HuggingFace, tmp_path, split="validation") == ROWS[1:]


def test_a_folder_with_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder(tmp_path, {"train-0.jsonl": ROWS, "test.jsonl": ROWS[:1]})
    (tmp_path / "LICENSE").write_text("no data")
    (tmp_path / "train-1.jsonl.zst").write_bytes(b"x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train-3.JSONL.BZ2").write_bytes(b"x")
    with pytest.raises(RequestError) as caught:
        read(HuggingFace, tmp_path)
    (problem,) = caught.value.problems
    assert problem.what == f"{tmp_path}: these can't be read: deep/train-3.JSONL.BZ2, train-1.jsonl.zst"
    assert problem.fix.startswith("unpack them, or take them out of the folder; files that are read: .json, ")
    assert records(HuggingFace, tmp_path, split="test") == ROWS[:1]  # which has none


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(RequestError, match=r"holds no data files\n.*\.jsonl"):
        read(HuggingFace, tmp_path)


def test_local_data_leaves_no_cache(tmp_path: Path) -> None:
    folder(tmp_path / "files", {"a.parquet": ROWS})
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    code = f"""
from rlhf_plugins.formats import FormatConfig
from rlhf_plugins.formats.arrow import HuggingFace
for name in ("files", "saved"):
    assert len(list(HuggingFace(FormatConfig(), None).read({str(tmp_path)!r} + "/" + name))) == 2
"""
    home = {"HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **home})
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub, which holds one data set, `org/sums`, with a config `main` of two splits."""
    asked: list[tuple[Any, ...]] = []
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}

    def load_dataset(path: str, name: str | None = None, *, split: str | None = None) -> Any:
        asked.append((path, name, split))
        if path != "org/sums":
            raise ConnectionError("couldn't reach the hub")
        return splits[split] if split else datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("path", "option", "asked", "count"),
    [
        ("org/sums", None, ("org/sums", None, None), 2),
        ("hub:org/sums", "test", ("org/sums", None, "test"), 1),
        ("org/sums:main", "test", ("org/sums", "main", "test"), 1),
        ("org/sums:main:test", "train", ("org/sums", "main", "test"), 1),
        ("org/sums::test", None, ("org/sums", None, "test"), 1),
    ],
)
def test_hub_names(
    hub: list[tuple[Any, ...]], path: str, option: str | None, asked: tuple[Any, ...], count: int
) -> None:
    found = read(HuggingFace, path, split=option)
    assert hub == [asked]
    assert [record for _, record in found] == ROWS[:count]
    assert found[0][0] == (f"{path}[train], row 1" if asked[2] is None else f"{path}, row 1")


def test_what_the_hub_does_not_have(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(RequestError, match=r"no file or folder here.*couldn't reach the hub\n.*ORG/NAME"):
        read(HuggingFace, "org/other")


def test_a_file_is_none_of_this(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    with pytest.raises(RequestError, match=r"is a file.*\n.*leave out --format hf"):
        read(HuggingFace, path)


def test_a_saved_chat_is_read(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    assert PromptRow.from_record(records(HuggingFace, tmp_path)[0]).prompt == ({"role": "user", "content": "a"},)
