"""JSON, JSON Lines and CSV files: what is read, where it says a row was, and what is fatal."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.api import Context, RequestError, RewardedRow, RowError
from rlhf_plugins.formats import FormatConfig
from rlhf_plugins.formats.text_files import Csv, Json, JsonLines, RowFormat

ROWS = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "answer": "6"}]
Write = Callable[[str, "str | bytes"], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(kind: type[RowFormat], path: str, **options: Any) -> list[tuple[str, Any]]:
    return list(kind(FormatConfig(**options), Context(None)).read(path))  # type: ignore[arg-type]


def records(kind: type[RowFormat], path: str, **options: Any) -> list[Any]:
    return [record for _, record in read(kind, path, **options)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# What is read


def test_jsonl_says_the_line_and_skips_blank_ones(write: Write) -> None:
    path = write("a.jsonl", f"{json.dumps(ROWS[0])}\r\n\n  \n{json.dumps(ROWS[1])}")
    assert read(JsonLines, path) == [(f"{path}:1", ROWS[0]), (f"{path}:4", ROWS[1])]


def test_a_line_separator_within_a_text_ends_no_line(write: Write) -> None:
    row = {"prompt": "a\u2028b\x85c\x0cd"}
    path = write("a.jsonl", json.dumps(row, ensure_ascii=False))
    assert records(JsonLines, path) == [row]


def test_json_list_says_the_row(write: Write) -> None:
    path = write("a.json", json.dumps(ROWS, indent=2))
    assert read(Json, path) == [(f"{path}, row 1", ROWS[0]), (f"{path}, row 2", ROWS[1])]


def test_json_object_of_one_list_says_its_key(write: Write) -> None:
    path = write("a.json", json.dumps({"version": 1, "rows": ROWS, "tags": ["x"]}))
    assert read(Json, path)[0] == (f"{path}[rows], row 1", ROWS[0])


def test_json_object_of_several_lists_takes_train_or_what_is_asked(write: Write) -> None:
    path = write("a.json", json.dumps({"test": ROWS[:1], "train": ROWS[1:]}))
    assert records(Json, path) == ROWS[1:]
    assert records(Json, path, split="test") == ROWS[:1]
    with pytest.raises(RequestError, match=r"no 'dev'\n.*one of: test, train"):
        read(Json, path, split="dev")
    path = write("b.json", json.dumps({"x": ROWS, "y": ROWS}))
    with pytest.raises(RequestError, match=r"several splits and no 'train'\n.*one of: x, y"):
        read(Json, path)


@pytest.mark.parametrize(
    ("document", "split", "message"),
    [
        ({"train": [], "test": ROWS}, None, r"a\.json\[train\] holds no rows\n.*--format\.split, one of: test$"),
        ({"data": [1, 2], "test": ROWS}, None, r"several splits and no 'train'\n.*one of: data, test"),
        ({"Test": ROWS, "tags": []}, None, r"several splits and no 'train'"),
        ({"train": [1], "test": ROWS}, None, r"a\.json\[train\], row 1 is a number, not an object"),
        ({"train": ROWS}, "", r"has no ''\n.*one of: train"),
    ],
)
def test_another_split_is_not_learnt_from_where_train_has_no_rows(
    write: Write, document: dict[str, Any], split: str | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        read(Json, write("a.json", json.dumps(document)), split=split)


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        (Json, "a.json", json.dumps(ROWS)),
        (JsonLines, "a.jsonl", lines(ROWS)),
        (Csv, "a.csv", "prompt,answer\n2+2?,4\n"),
    ],
)
def test_a_split_of_what_has_none_is_refused(write: Write, kind: type[RowFormat], name: str, content: str) -> None:
    with pytest.raises(RequestError, match=rf"--format\.split test: .*{name} has no splits.*\n.*leave it out"):
        read(kind, write(name, content), split="test")


def test_a_key_given_twice_refuses_the_row_or_the_document(write: Write) -> None:
    twice = '{"prompt": "a", "prompt": "b"}\n'
    found = read(JsonLines, write("a.jsonl", twice + '{"prompt": "c", "more": {"x": 1, "x": 2}}\n' + lines(ROWS)))
    assert [str(row) for _, row in found[:2]] == ["gives the key 'prompt' twice", "gives the key 'x' twice"]
    assert all(isinstance(row, RowError) for _, row in found[:2])
    assert [row for _, row in found[2:]] == ROWS
    with pytest.raises(RequestError, match=r"a\.json: gives the key 'prompt' twice"):
        read(Json, write("a.json", f"[{twice}]"))


def test_a_single_row_is_not_taken_for_a_file_of_its_messages(write: Write) -> None:
    path = write("a.json", json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(RequestError, match="holds an object with the keys messages, not rows"):
        read(Json, path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.TSV"])
def test_csv_with_quotes_and_line_breaks(write: Write, name: str) -> None:
    comma = "," if name == "a.csv" else "\t"
    path = write(name, f'prompt{comma}answer\r\n"two\nlines, ""quoted"""{comma}4\n\n3+3?{comma}6')
    assert read(Csv, path) == [
        (f"{path}:2", {"prompt": 'two\nlines, "quoted"', "answer": "4"}),
        (f"{path}:5", {"prompt": "3+3?", "answer": "6"}),
    ]


def test_csv_reads_labels_and_margins(write: Write) -> None:
    path = write("a.csv", "prompt,completion,good\np,c,True\np,c,false\np,c,maybe\np,c,\n")
    labels = [record.get("label") for record in records(Csv, path, columns={"label": "good"})]
    assert labels == [True, False, "maybe", None]
    path = write("b.csv", "prompt,chosen,rejected,chosen_score,rejected_score\np,a,b,2.5,1\n")
    assert records(Csv, path)[0]["margin"] == 1.5


def test_csv_reads_rewards(write: Write) -> None:
    path = write("a.csv", "prompt,completion,reward\np,c,0.5\np,c,-1\np,c,much\np,c,\n")
    found = records(Csv, path)
    assert [record.get("reward") for record in found] == [0.5, -1.0, "much", None]
    assert RewardedRow.from_record(found[0]).reward == 0.5
    with pytest.raises(RowError, match="'reward' must be a finite number, not 'much'"):
        RewardedRow.from_record(found[2])


def test_csv_takes_long_texts(write: Write) -> None:
    long = "x" * 200_000  # past the csv module's own limit of 131072
    assert records(Csv, write("a.csv", f"prompt\n{long}\n")) == [{"prompt": long}]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        (Json, "a.json.gz", json.dumps(ROWS)),
        (JsonLines, "a.jsonl.gz", lines(ROWS)),
        (Csv, "a.csv.gz", "prompt,answer\n2+2?,4\n3+3?,6\n"),
        (Csv, "a.tsv.gz", "prompt\tanswer\n2+2?\t4\n3+3?\t6\n"),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_gzip_and_byte_order_marks(write: Write, kind: type[RowFormat], name: str, content: str, mark: bytes) -> None:
    assert records(kind, write(name, gzip.compress(mark + content.encode()))) == ROWS
    assert records(kind, write(name.removesuffix(".gz"), mark + content.encode())) == ROWS


def test_home_is_expanded(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", lines(ROWS))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(JsonLines, "~/a.jsonl")[0] == ("~/a.jsonl:1", ROWS[0])


# Options


def test_limit_reads_no_further(write: Write) -> None:
    path = write("a.jsonl", lines(ROWS) + "not JSON")
    assert records(JsonLines, path, limit=2) == ROWS
    with pytest.raises(RequestError):
        read(JsonLines, path, limit=3)


def test_columns_are_renamed_all_at_once(write: Write) -> None:
    path = write("a.jsonl", lines([{"prompt": "x", "answer": "y", "level": 1}]))
    assert records(JsonLines, path, columns={"prompt": "answer", "answer": "prompt"}) == [
        {"prompt": "y", "answer": "x", "level": 1}
    ]
    twice = {"answer": "answer", "completion": "answer"}
    assert records(JsonLines, path, columns=twice) == [{"prompt": "x", "answer": "y", "completion": "y", "level": 1}]


def test_columns_come_before_the_shape(write: Write) -> None:
    path = write("a.jsonl", lines([{"prompt": "x", "chosen": {"from": "gpt", "value": "y"}}]))
    assert records(JsonLines, path, columns={"completion": "chosen"}) == [{"prompt": "x", "completion": "y"}]


def test_unknown_columns_list_those_that_are_there(write: Write) -> None:
    path = write("a.jsonl", lines(ROWS))
    with pytest.raises(RequestError) as caught:
        read(JsonLines, path, columns={"prompt": "frage", "answer": "answer"}, template="{antwort}{prompt}")
    what = [(problem.what, problem.fix) for problem in caught.value.problems]
    assert what == [
        ("--format.columns names the column 'frage', which isn't there", f"{path}:1 has: prompt, answer"),
        ("--format.template names the column 'antwort', which isn't there", f"{path}:1 has: prompt, answer"),
    ]


def test_a_template_makes_the_prompt(write: Write) -> None:
    path = write("a.jsonl", lines([*ROWS, {"prompt": "4+4?"}]))
    found = records(JsonLines, path, template="{prompt} Not {answer}?")
    assert [row["prompt"] for row in found[:2]] == ["2+2? Not 4?", "3+3? Not 6?"]
    assert isinstance(found[2], RowError)
    assert "'answer' is missing" in str(found[2])


def test_a_shape_may_be_forced(write: Write) -> None:
    path = write("a.jsonl", lines([{"prompt": "p", "instruction": "i", "output": "o"}, {"prompt": "p"}]))
    first, second = records(JsonLines, path, shape="alpaca")
    assert first["prompt"] == ({"role": "user", "content": "i"},)
    assert str(second) == "no 'instruction', which the shape alpaca needs; it has prompt"


def test_a_template_may_be_a_users_turn(write: Write) -> None:
    path = write("a.jsonl", lines(ROWS[:1]))
    found = records(JsonLines, path, template="{prompt}!", system="s")
    assert [m["content"] for m in found[0]["prompt"]] == ["s", "2+2?!"]


# What is refused, a row at a time


def test_a_broken_row_is_handed_over_with_its_reason(write: Write) -> None:
    path = write("a.jsonl", lines([{"messages": [{"role": "user"}]}, ROWS[0]]))
    (where, error), (_, record) = read(JsonLines, path)
    assert (where, str(error), record) == (f"{path}:1", "a message of 'messages' has no content", ROWS[0])
    assert isinstance(error, RowError)


def test_ragged_csv_rows(write: Write) -> None:
    path = write("a.csv", "prompt,answer\n1,2,3\n4\n5,6\n")
    (where, long), (_, short), (_, whole) = read(Csv, path)
    assert isinstance(long, RowError) and isinstance(short, RowError)
    assert (where, str(long)) == (f"{path}:2", "3 fields where the header has 2")
    assert str(short) == "1 fields where the header has 2"
    assert whole == {"prompt": "5", "answer": "6"}


def test_half_a_character_is_refused(write: Write) -> None:
    rows = r'{"prompt": "\ud83d\ude00"}' + "\n" + r'{"prompt": "\ud83d"}' + "\n" + r'{"prompt": "\\ud83d"}'
    whole, half, escaped = records(JsonLines, write("a.jsonl", rows))
    assert (whole, escaped) == ({"prompt": "\U0001f600"}, {"prompt": r"\ud83d"})
    assert isinstance(half, RowError)
    assert isinstance(records(Json, write("a.json", r'[{"prompt": "\uD83D"}]'))[0], RowError)


# What is fatal


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        (JsonLines, "a.jsonl", '{"a": 1}\n{"a": 1', r"a\.jsonl:2: not JSON: .* at column 8"),
        (JsonLines, "a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2 is a list, not an object"),
        (JsonLines, "a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl:2 is null, not an object"),
        (JsonLines, "a.jsonl", '[{"a": 1},\n', r"a\.jsonl:1: not JSON(.|\n)*--format json$"),
        (JsonLines, "a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"a\.jsonl:2: not UTF-8: byte 0xff at offset 7"),
        (JsonLines, "a.jsonl", "", "is empty"),
        (JsonLines, "a.jsonl", "\n \n", "holds no rows"),
        (JsonLines, "a.jsonl", "[" * 100_000, "nested too deep|not JSON"),
        (JsonLines, "a.jsonl", '{"a": ' + "1" * 5000 + "}", r"a\.jsonl:1: .*digits"),
        (JsonLines, "a.jsonl.gz", b"{}", "can't be read: Not a gzipped file"),
        (
            JsonLines,
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            "can't be read: Compressed file ended",
        ),
        (JsonLines, "a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "can't be read: Error -3"),
        (Json, "a.json", "", "is empty"),
        (Json, "a.json", "[]", "holds no rows"),
        (Json, "a.json", "{}", "holds an object"),
        (Json, "a.json", "3", "holds a number, not rows"),
        (Json, "a.json", '"text"', "holds a text, not rows"),
        (Json, "a.json", "null", "holds null, not rows"),
        (Json, "a.json", '{"a": 1, "b": [1]}', "holds an object with the keys a, b, not rows"),
        (Json, "a.json", '[{"a": 1}, 7]', r"a\.json, row 2 is a number, not an object"),
        (Json, "a.json", '[\n{"a": 1},\n{"a" 1}]', r"a\.json: not JSON: .* at line 3, column 6"),
        (Json, "a.json", '{"a": 1}\n{"a": 2}\n', r"not JSON: Extra data(.|\n)*--format jsonl$"),
        (Json, "a.json", b'\xef\xbb\xbf[{"a": "\xc3"}]', r"a\.json: not UTF-8: byte 0xc3 at offset 11"),
        (Csv, "a.csv", "", "is empty"),
        (Csv, "a.csv", "prompt,answer\n", "holds no rows"),
        (Csv, "a.csv", "prompt,answer,prompt\n1,2,3\n", r"a\.csv:1: the header names 'prompt' twice"),
        (Csv, "a.csv", 'prompt,answer\n1,2\n"open,2\n3,4\n', r"a\.csv:3: not a row of CSV: unexpected end"),
        (Csv, "a.csv", 'prompt\n"a" b\n', r"a\.csv:2: not a row of CSV"),
        (Csv, "a.csv", b"prompt\n\xe9t\xe9\n", r"a\.csv:2: not UTF-8: byte 0xe9 at offset 0"),
    ],
)
def test_files_that_are_refused(
    write: Write, kind: type[RowFormat], name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    with pytest.raises(RequestError, match=message) as caught:
        read(kind, path)
    assert path in str(caught.value)


@pytest.mark.parametrize("kind", [Json, JsonLines, Csv])
def test_paths_that_are_no_files(kind: type[RowFormat], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read(kind, str(tmp_path / "nothing"))
    with pytest.raises(RequestError, match=r"is a folder, not a file\n.*--format hf"):
        read(kind, str(tmp_path))
