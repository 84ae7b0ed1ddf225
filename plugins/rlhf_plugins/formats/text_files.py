"""Files of text: JSON, JSON Lines, CSV. UTF-8, with or without a byte order mark, plain or gzipped.

What can't be parsed is fatal and named by file and line; a row that parses but doesn't fit is refused and counted.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlhf.api import Format, Problem, RequestError, RowError
from rlhf_plugins.formats.shapes import CHAT_COLUMNS, to_record, typed
from rlhf_plugins.formats.template import columns_of, fill

T = TypeVar("T")
_BOM = "\ufeff"

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words in a file's path, or a name, that say its split, as the hub has it; a file without any is of train.
Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits"""


class RowFormat(Format):
    """What every format here does with a row, however it was read."""

    text_only = False
    """The file knows no types, so labels and scores come as text."""
    has_splits = False
    """What is read may be of several splits; of one, it is known once its first row is."""

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        """(where, columns of the row, or a RowError) for each row.

        Raises:
            RequestError: the file can't be read or parsed.
        """
        raise NotImplementedError  # abstract: each format has its own

    def read(self, path: str) -> Iterator[tuple[str, Any]]:
        """(where, record) for each row, or (where, RowError) for one whose shape is clear but broken.

        Raises:
            RequestError: the file can't be read or parsed, holds no rows, lacks a column that an option names, or has
                no splits to choose from.
        """
        checked = False
        where = ""
        for where, row in itertools.islice(self.rows(path), self.config.limit):
            if self.config.split is not None and not self.has_splits:
                what = f"--format.split {self.config.split}: {path} has no splits, so that all of it would be read"
                fix = (
                    "leave it out; where other data needs it, give that by its file's path, or as ORG/NAME:CONFIG:SPLIT"
                )
                raise RequestError(Problem(what, fix))
            if isinstance(row, RowError):
                yield where, row
            elif not isinstance(row, Mapping):
                raise RequestError(
                    Problem(f"{where} is {_json_name(row)}, not an object of columns", "each row is an object: {...}")
                )
            else:
                if not checked:
                    self._check_columns(where, row)
                    checked = True
                try:
                    record = self._record(row)
                except RowError as error:
                    yield where, error
                else:
                    yield where, record
        if not where:
            raise RequestError(Problem(f"{path} holds no rows"))

    def _record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        template = self.config.template
        prompt = None if template is None else fill(template, row)
        if names := self.config.columns:
            taken = set(names.values())
            row = {
                **{key: value for key, value in row.items() if key not in taken},
                **{name: row[column] for name, column in names.items() if column in row},
            }
        if self.text_only:
            row = typed(row)
        return to_record(row, shape=self.config.shape, system=self.config.system, prompt=prompt)

    def _check_columns(self, where: str, row: Mapping[str, Any]) -> None:
        """Only of the first row: the others may each have columns of their own.

        Raises:
            RequestError: it lacks a column that an option names.
        """
        asked = {"columns": tuple(self.config.columns.values())}
        if self.config.template is not None:
            asked["template"] = columns_of(self.config.template)
        problems = [
            Problem(
                f"--format.{option} names the column {column!r}, which isn't there", f"{where} has: {', '.join(row)}"
            )
            for option, columns in asked.items()
            for column in columns
            if column not in row
        ]
        if problems:
            raise RequestError(problems)


class Json(RowFormat):
    """One document: a list of objects, or an object that holds one (then `where` names its key)."""

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        text = b"".join(read_lines(path))
        try:
            document = _parse(text, path, "if it is JSON Lines, a row a line: --format jsonl")
        except RowError as error:
            raise RequestError(Problem(f"{path}: {error}")) from None
        found, where = document, path
        if isinstance(document, dict):
            lists = {k: v for k, v in document.items() if isinstance(v, list) and k not in CHAT_COLUMNS}
            tables = {k: v for k, v in lists.items() if v and isinstance(v[0], dict)}
            if tables:
                self.has_splits = True
                # Where one is called a split, all are, those without rows too: else the test's would be learnt from.
                splits = lists if any(name.lower() in SPLIT_WORDS for name in lists) else tables
                key, found = pick_split(path, splits, self.config.split)
                where = f"{path}[{key}]"
                if not found:
                    raise RequestError(Problem(f"{where} holds no rows", _others(splits, key)))
        if not isinstance(found, list):
            keys = f" with the keys {', '.join(itertools.islice(document, 8))}" if isinstance(document, dict) else ""
            raise RequestError(
                Problem(
                    f"{path} holds {_json_name(document)}{keys}, not rows",
                    "it must be a list of objects, or an object that holds one",
                )
            )
        escaped = _may_hold_surrogates(text)
        for i, row in enumerate(found, 1):
            yield f"{where}, row {i}", _checked(row) if escaped else row


class JsonLines(RowFormat):
    """A row a line; blank lines are none."""

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = _parse(line, where, "if the whole file is one JSON document: --format json")
                except RowError as error:
                    yield where, error
                else:
                    yield where, _checked(row) if _may_hold_surrogates(line) else row


class Csv(RowFormat):
    """The first line names the columns; quoted fields may hold line breaks. `.tsv` is separated by tabs."""

    text_only = True

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # its default, 128 KiB, refuses long texts; it is global
        names = path.lower().removesuffix(".gz")
        lines = (
            _decode(line, f"{path}:{number}").removeprefix(_BOM if number == 1 else "")
            for number, line in enumerate(read_lines(path), 1)
        )
        reader = csv.reader(lines, delimiter="\t" if names.endswith(".tsv") else ",", strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise RequestError(Problem(f"{path}:{line}: not a row of CSV: {error}")) from None
            where, line = f"{path}:{line}", reader.line_num + 1
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            if header is None:
                header = cells
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise RequestError(Problem(f"{where}: the header names {', '.join(map(repr, twice))} twice"))
            elif len(cells) != len(header):
                yield where, RowError(f"{len(cells)} fields where the header has {len(header)}")
            else:
                yield where, dict(zip(header, cells, strict=True))


# Reading


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, with their ends, unpacked if gzipped.

    Raises:
        RequestError: there is no such file, or it can't be read or unpacked.
    """
    place = a_file(path)
    try:
        with gzip.open(place) if place.suffix.lower() == ".gz" else place.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(Problem(f"{path} can't be read: {error}")) from None


def a_file(path: str) -> Path:
    """The path, if it is that of a file with something in it.

    Raises:
        RequestError: it isn't there, is a folder, or is empty.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise RequestError(Problem(f"{path} is a folder, not a file", "a folder is read by --format hf"))
    if not place.exists():
        raise RequestError(Problem(f"{path}: there is no such file"))
    if place.is_file() and place.stat().st_size == 0:
        raise RequestError(Problem(f"{path} is empty"))
    return place


def pick_split(path: str, splits: Mapping[str, T], wanted: str | None) -> tuple[str, T]:
    """The split asked for; if none is, the only one, or train.

    Raises:
        RequestError: it isn't there, or it isn't clear which is meant.
    """
    name = wanted if wanted is not None else next(iter(splits)) if len(splits) == 1 else "train"
    if name in splits:
        return name, splits[name]
    what = f"no {wanted!r}" if wanted is not None else "several splits and no 'train'"
    raise RequestError(Problem(f"{path} has {what}", _others(splits)))


def _others(splits: Mapping[str, Any], but: str | None = None) -> str:
    return f"--format.split, one of: {', '.join(name for name in splits if name != but)}"


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            Problem(
                f"{where}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}: {error.reason}",
                "save it as UTF-8",
            )
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose keys is given once; by itself the last would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"gives the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _parse(content: bytes, where: str, hint: str) -> Any:
    """
    Raises:
        RequestError: it is no JSON.
        RowError: an object in it gives a key twice.
    """
    text = _decode(content, where).removeprefix(_BOM)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\n") else ""
        raise RequestError(Problem(f"{where}: not JSON: {error.msg} at {line}column {error.colno}", hint)) from None
    except RecursionError:
        raise RequestError(Problem(f"{where}: JSON nested too deep to read")) from None
    except RowError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise RequestError(Problem(f"{where}: {error}")) from None


def _may_hold_surrogates(content: bytes) -> bool:
    return b"\\ud" in content or b"\\uD" in content


def _checked(row: Any) -> Any:
    """JSON may escape half a character (a lone surrogate), which no tokenizer takes and no file can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return RowError(f"holds half a character, {error.object[error.start]!r} (a lone UTF-16 surrogate)")
    except RecursionError:
        return RowError("nested too deep to check")
    return row


def _json_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
