"""Data formats: files, folders and hub data sets read into the canonical records of `rlhf.rows`.

All share one configuration: how a file is opened is a format's own, what its columns mean is not (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from rlhf.api import FormatEntry, hookimpl, option
from rlhf_plugins.formats.template import columns_of

SUFFIXES = {
    "json": (".json", ".json.gz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "parquet": (".parquet",),
}
"""File name endings by format; a folder's files are told by these too."""


@attrs.frozen(kw_only=True)
class FormatConfig:
    """How the columns of a row are to be read."""

    columns: Mapping[str, str] = option(
        attrs.Factory(dict), help="names for columns, before anything else: prompt=question,answer=solution"
    )
    template: str | None = option(
        None,
        help="makes the prompt from the row's own columns: 'Solve: {question}'; a brace that is meant is doubled, "
        "a line break is a real one ($'...' in bash)",
    )
    system: str | None = option(
        None, help="a system message for chats that have none of their own; a text prompt becomes a chat"
    )
    shape: str = option(
        "auto",
        help="what the columns are. auto: each row by its own keys; plain: only prompt, completion, chosen, rejected, "
        "messages, text, question and answer; chat: as auto, and a text prompt becomes a user's turn",
        choices=("auto", "plain", "chat", "alpaca", "sharegpt"),
    )
    split: str | None = option(
        None,
        help="of a folder, a hub data set or a JSON object of several lists; left out, the only one there is, or train",
    )
    limit: int | None = option(None, help="stop after so many rows of each path", unit="rows", ge=1)

    def __attrs_post_init__(self) -> None:
        if self.template is not None:
            columns_of(self.template)  # raises ValueError, so that a bad template is refused with the plan


@hookimpl
def rlhf_formats() -> Iterable[FormatEntry]:
    yield FormatEntry(
        name="json",
        summary="one JSON document: a list of rows, or an object that holds one",
        config=FormatConfig,
        impl="rlhf_plugins.formats.text_files:Json",
        suffixes=SUFFIXES["json"],
    )
    yield FormatEntry(
        name="jsonl",
        summary="JSON Lines: a row a line",
        config=FormatConfig,
        impl="rlhf_plugins.formats.text_files:JsonLines",
        suffixes=SUFFIXES["jsonl"],
    )
    yield FormatEntry(
        name="csv",
        summary="comma- or tab-separated, the first line names the columns",
        config=FormatConfig,
        impl="rlhf_plugins.formats.text_files:Csv",
        suffixes=SUFFIXES["csv"],
    )
    yield FormatEntry(
        name="parquet",
        summary="Apache Parquet, a batch of rows at a time",
        config=FormatConfig,
        impl="rlhf_plugins.formats.arrow:Parquet",
        suffixes=SUFFIXES["parquet"],
        modules={"pyarrow": "pip install pyarrow"},
    )
    yield FormatEntry(
        name="hf",
        summary="a hub data set (ORG/NAME[:CONFIG[:SPLIT]]), a saved one, or a folder of data files",
        config=FormatConfig,
        impl="rlhf_plugins.formats.arrow:HuggingFace",
        suffixes=("/", "hub:"),
        modules={"datasets": "pip install datasets"},
    )
