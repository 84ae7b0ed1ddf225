"""The entries: what they claim, that they are light, and what the command line makes of the options."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from rlhf.api import Format
from rlhf.options import structure
from rlhf_plugins.formats import FormatConfig, rlhf_formats

ENTRIES = {entry.name: entry for entry in rlhf_formats()}


@pytest.mark.parametrize(
    ("claim", "name"),
    [
        ("a.json", "json"),
        ("a.json.gz", "json"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.csv", "csv"),
        ("a.tsv", "csv"),
        ("train-00000-of-00001.parquet", "parquet"),
        ("/", "hf"),
        ("hub:", "hf"),
        ("a.txt", None),
    ],
)
def test_each_path_is_claimed_once(claim: str, name: str | None) -> None:
    assert [n for n, entry in ENTRIES.items() if claim.endswith(entry.suffixes)] == ([name] if name else [])


def test_implementations_are_formats() -> None:
    for entry in ENTRIES.values():
        module, _, name = entry.impl.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), Format)


def test_the_entry_module_is_light() -> None:
    code = (
        "import sys, rlhf_plugins.formats as f; list(f.rlhf_formats()); "
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"set()"


def test_text_files_need_neither_arrow_nor_datasets() -> None:
    code = (
        "import sys; from rlhf_plugins.formats.text_files import Json; "
        "print({'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"set()"


def test_options_from_the_command_line() -> None:
    given = {"columns": "prompt=question, answer=solution", "template": "{question}?", "limit": "10", "shape": "chat"}
    config, problems = structure(FormatConfig, given, "--format.")
    assert problems == []
    assert config == FormatConfig(
        columns={"prompt": "question", "answer": "solution"}, template="{question}?", limit=10, shape="chat"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": "alpacca"}, "did you mean 'alpaca'"),
        ({"limit": "0"}, "--format.limit must be >= 1"),
        ({"columns": "prompt"}, "--format.columns must be key=value list"),
        ({"template": '{"a": 1}'}, "a brace that is meant is doubled"),
        ({"template": "same for all"}, "names no column"),
    ],
)
def test_options_that_are_refused(given: dict[str, str], message: str) -> None:
    config, problems = structure(FormatConfig, given, "--format.")
    assert config is None
    assert message in str(problems[0])
