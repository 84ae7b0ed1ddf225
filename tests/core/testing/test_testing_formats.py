"""Our own formats keep the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from breaking import Outcome, failures

from rlhf.testing import FormatContract

RECORDS = [{"prompt": "Hello", "answer": "yes"}, {"prompt": "Good day", "answer": "no"}]


class TestJson(FormatContract):
    name = "json"
    content = json.dumps(RECORDS)
    records = RECORDS
    unreadable = "[{"


class TestJsonLines(FormatContract):
    name = "jsonl"
    content = "\n".join(map(json.dumps, RECORDS))
    records = RECORDS
    unreadable = '{"prompt": "Hello"}\n{"prompt": \n'


class TestCsv(FormatContract):
    name = "csv"
    content = "prompt,answer\nHello,yes\nGood day,no\n"
    records = RECORDS
    unreadable = b"prompt\n\xff\xfe\n"


LINES = {"suffix": ".lines", "content": "Hello\nGood day\n", "records": [{"prompt": "Hello"}, {"prompt": "Good day"}]}
BROKEN: dict[str, dict[str, str]] = {
    "losing": {"test_it_reads_its_records": "it reads 1 records of a file of 2"},
    "placeless": {"test_it_says_where_a_record_is": "two records are at one place: ['a line', 'a line']"},
    "unclaimed": {"test_a_file_is_known_by_its_name": "needs --format: "},
    "crashing": {"test_what_cannot_be_read_is_told": "raises UnicodeDecodeError, not RequestError"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    attributes: dict[str, Any] = {**LINES, "unreadable": b"\xff"}
    found = failures(broken("FormatContract", f"broken-{name}", "not light", **attributes))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
