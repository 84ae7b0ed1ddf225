"""Arrow data: Parquet files, folders of data files, and what the `datasets` library saves or downloads.

Local files are read where they lie, so nothing is copied into a cache. Hub data sets are downloaded and cached by
`datasets`, which runs no code of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.api import Problem, RequestError
from rlhf_plugins.formats import SUFFIXES
from rlhf_plugins.formats.text_files import SPLIT_WORDS, Csv, Json, JsonLines, RowFormat, a_file, pick_split

_BATCH = 1024
"""Rows decoded at once: enough to make the call's cost nothing, few enough for long texts."""

_UNREAD = (".zst", ".bz2", ".xz", ".lz4", ".gz", ".zip", ".7z", ".tar", ".tgz", ".arrow", ".feather", ".orc", ".avro",
           ".xlsx")  # fmt: skip
"""Endings of files that hold rows, or may, and that nothing here reads."""


class Parquet(RowFormat):
    """One Parquet file, read a batch at a time."""

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet

        place = a_file(path)
        try:
            with parquet.ParquetFile(place) as file:
                names = file.schema_arrow.names
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise RequestError(Problem(f"{path} has the columns {', '.join(map(repr, twice))} twice"))
                number = 0
                for batch in file.iter_batches(_BATCH):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that isn't UTF-8
            raise RequestError(Problem(f"{path} can't be read as Parquet: {error}")) from None


class HuggingFace(RowFormat):
    """A folder written by `save_to_disk`, a folder of data files, or a data set of the hub.

    A hub data set is named ORG/NAME, ORG/NAME:CONFIG or ORG/NAME:CONFIG:SPLIT; a split in the name goes before the
    option, so that `--data` and `--eval-data` may be splits of one data set.
    """

    has_splits = True

    def rows(self, path: str) -> Iterator[tuple[str, Any]]:
        place = Path(path).expanduser()
        if place.is_file():
            raise RequestError(Problem(f"{path} is a file; --format hf reads folders", "leave out --format hf"))
        if not place.is_dir():
            yield from self._hub(path)
        elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            yield from self._saved(path, place)
        else:
            yield from self._files(path, place)

    def _saved(self, path: str, place: Path) -> Iterator[tuple[str, Any]]:
        import datasets

        try:
            found = datasets.load_from_disk(str(place))
        except Exception as error:  # whatever a broken folder makes the library raise
            raise RequestError(Problem(f"{path} can't be read as a saved data set: {error}")) from error
        split = self.config.split
        if split and not isinstance(found, Mapping) and str(found.split) != split:
            raise RequestError(Problem(f"{path} is one data set, of the split {found.split}, not {split!r}"))
        yield from self._loaded(path, found, split)

    def _files(self, path: str, place: Path) -> Iterator[tuple[str, Any]]:
        readers: dict[str, type[RowFormat]] = {"json": Json, "jsonl": JsonLines, "csv": Csv, "parquet": Parquet}
        suffixes = {suffix: readers[name] for name in readers for suffix in SUFFIXES[name]}
        splits: dict[str, list[tuple[Path, type[RowFormat] | None]]] = {}
        for file in sorted(place.rglob("*")):
            inside = file.relative_to(place)
            reader = next((r for suffix, r in suffixes.items() if file.name.lower().endswith(suffix)), None)
            unread = reader is None and file.name.lower().endswith(_UNREAD)
            if (reader or unread) and file.is_file() and not any(part.startswith(".") for part in inside.parts):
                words = re.split("[^a-z]+", inside.as_posix().lower())
                split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
                splits.setdefault(split, []).append((file, reader))
        if not splits:
            raise RequestError(
                Problem(f"{path}: the folder holds no data files", f"files that are read: {', '.join(suffixes)}")
            )
        files = pick_split(path, splits, self.config.split)[1]
        if unreadable := [file.relative_to(place).as_posix() for file, reader in files if reader is None]:
            what = f"{path}: these can't be read: {', '.join(unreadable)}"
            fix = f"unpack them, or take them out of the folder; files that are read: {', '.join(suffixes)}"
            raise RequestError(Problem(what, fix))
        for file, reader in files:
            if reader is not None:
                yield from reader(self.config, self.context).rows(str(file))

    def _hub(self, path: str) -> Iterator[tuple[str, Any]]:
        import datasets

        name, _, rest = path.removeprefix("hub:").partition(":")
        config, _, named = rest.partition(":")
        split = named or self.config.split
        try:
            found = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # its library, the hub's and the network's have no class in common
            raise RequestError(
                Problem(
                    f"{path} is no file or folder here, and can't be had from the hub: {error}",
                    "a path that exists, or ORG/NAME[:CONFIG[:SPLIT]]",
                )
            ) from error
        yield from self._loaded(path, found, split)

    def _loaded(self, path: str, found: Any, split: str | None) -> Iterator[tuple[str, Any]]:
        """found: a Dataset, or a DatasetDict of splits."""
        where = path
        if isinstance(found, Mapping):
            name, found = pick_split(path, found, split)
            where = f"{path}[{name}]"
        for number, row in enumerate(found, 1):
            yield f"{where}, row {number}", row
