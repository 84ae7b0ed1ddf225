"""Whatever a file holds: records, rows refused with a reason, or a RequestError, and nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.api import CompletionRow, Context, LabelledRow, PreferenceRow, PromptRow, RequestError, RowError
from rlhf_plugins.formats import FormatConfig
from rlhf_plugins.formats.shapes import CHAT_COLUMNS, ROLES, to_record, typed
from rlhf_plugins.formats.text_files import Csv, Json, JsonLines, RowFormat

# No deadline: machines are shared. The folder is made once, and each example overwrites its one file.
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

COLUMNS = (*CHAT_COLUMNS, "label", "margin", "answer", "question", "instruction", "input", "output", "system", "text")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(ROLES))
MESSAGES = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), SCALARS)
GOOD = st.fixed_dictionaries({"role": st.sampled_from(sorted(ROLES)), "content": st.text(max_size=5)})
VALUES = st.recursive(SCALARS | GOOD | MESSAGES, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
TABLES = st.dictionaries(st.sampled_from(COLUMNS), VALUES | st.lists(GOOD, max_size=4), max_size=6)
BYTES = st.binary() | st.lists(
    st.sampled_from([b'"', b",", b"\n", b"\r", b"{", b"}", b"[", b"a", b"\xef\xbb\xbf"])
).map(b"".join)


def judge(record: dict[str, Any]) -> None:
    """Every row type takes a record or refuses it with a reason."""
    for row_type in (PromptRow, CompletionRow, PreferenceRow, LabelledRow):
        with contextlib.suppress(RowError):
            row_type.from_record(record)


@pytest.mark.parametrize(("kind", "name"), [(Json, "a.json"), (JsonLines, "a.jsonl"), (Csv, "a.csv"), (Csv, "a.tsv")])
@fuzz
@given(content=BYTES)
def test_any_bytes(tmp_path: Path, kind: type[RowFormat], name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        found = list(kind(FormatConfig(), Context(None)).read(str(path)))  # type: ignore[arg-type]
    except RequestError as error:
        assert str(path) in str(error)
    else:
        assert found
        assert all(where.startswith(str(path)) for where, _ in found)
        for _, record in found:
            if not isinstance(record, RowError):
                judge(record)


@settings(fuzz, max_examples=500)
@given(
    row=TABLES, shape=st.sampled_from(["auto", "plain", "chat", "alpaca", "sharegpt"]), system=st.none() | st.just("s")
)
def test_any_row(row: dict[str, Any], shape: str, system: str | None) -> None:
    before = repr(row)
    try:
        record = to_record(typed(row), shape=shape, system=system)
    except RowError as error:
        assert str(error)
    else:
        judge(record)
    assert repr(row) == before  # NaN isn't equal to itself, so by its text


@fuzz
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS[6:]), st.text(), min_size=1), min_size=1))
def test_json_and_jsonl_agree(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [
        [str(record) for _, record in kind(FormatConfig(), Context(None)).read(str(tmp_path / name))]  # type: ignore[arg-type]
        for kind, name in ((Json, "a.json"), (JsonLines, "a.jsonl"))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == len(rows)
