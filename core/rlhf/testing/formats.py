"""The contract of data formats: `FormatContract`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.entries import FormatEntry
from rlhf.errors import RequestError, RowError
from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.interfaces import Format
    from rlhf.testing.kit import Kit


class FormatContract(Contract):
    """What a format must keep: records with the canonical keys, each with where it is; what can't be read is told.

    class TestIni(FormatContract):
        name = "ini"
        suffix = ".ini"
        content = "[one]\\nprompt = Hello\\n"
        records = [{"prompt": "Hello"}]
        unreadable = "[one"
    """

    kind = "format"
    suffix: ClassVar[str] = ""
    """Of the file that `content` is written to; left out, the first that its entry claims."""
    content: ClassVar[str | bytes] = ""
    """A file of that format."""
    records: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """What it holds, in order, by the canonical keys of `rlhf.rows`."""
    unreadable: ClassVar[str | bytes | None] = None
    """A file that can't be parsed; None where any file can."""

    def base(self, kit: Kit) -> dict[str, Any]:
        recipe = {"algo": parts.REINFORCE, "reward": parts.REWARD, "engine": {"max_new_tokens": 6}}
        return {**recipe, "data": str(self.file(kit))}

    def file(self, kit: Kit, content: str | bytes | None = None) -> Path:
        """A file of the format."""
        require(self.content and self.records, "the contract needs `content`, a file's, and its `records`")
        entry = self.entry(kit)
        assert isinstance(entry, FormatEntry)
        suffix = self.suffix or (entry.suffixes[0] if entry.suffixes else "")
        wanted = self.content if content is None else content
        path = kit.fresh("rows").with_suffix(suffix)
        path.write_bytes(wanted.encode("utf-8") if isinstance(wanted, str) else wanted)
        return path

    def format(self, kit: Kit) -> Format:
        from rlhf.component import Context

        made: Format = self.implementation(kit)(self.config(kit), Context(plan=self.plan(kit)))
        return made

    def component(self, plan: Any) -> Any:
        return plan.data[0].format

    # The terms

    def test_it_reads_its_records(self, rlhf_kit: Kit) -> None:
        found = list(self.format(rlhf_kit).read(str(self.file(rlhf_kit))))
        require(
            len(found) == len(self.records), f"it reads {len(found)} records of a file of {len(self.records)}: {found}"
        )
        for wanted, (where, record) in zip(self.records, found, strict=True):
            if isinstance(record, RowError):
                broken(f"it refuses {where}: {record}")
            require(dict(record) == dict(wanted), f"{where} is read as {dict(record)}, not {dict(wanted)}")

    def test_it_says_where_a_record_is(self, rlhf_kit: Kit) -> None:
        """What is refused later is told by its place."""
        path = self.file(rlhf_kit)
        places = [where for where, _ in self.format(rlhf_kit).read(str(path))]
        require(len(set(places)) == len(places), f"two records are at one place: {places}")
        require(all(path.name in where for where in places), f"the places don't name the file: {places}")

    def test_a_file_is_known_by_its_name(self, rlhf_kit: Kit) -> None:
        """Files with a suffix that it claims need no `--format`."""
        entry = self.entry(rlhf_kit)
        assert isinstance(entry, FormatEntry)
        if not entry.suffixes:
            return
        path = self.file(rlhf_kit)
        base = {key: value for key, value in self.base(rlhf_kit).items() if key != "data"}
        try:
            plan = rlhf_kit.plan({**base, **self.recipe, "data": str(path)})
        except RequestError as error:
            broken(f"a file of its suffix needs --format: {'; '.join(map(str, error.problems))}")
        name = plan.data[0].format.name
        require(name == self.name, f"{path.name} is read by {name!r}, not by {self.name!r}: is its suffix claimed?")

    def test_what_cannot_be_read_is_told(self, rlhf_kit: Kit) -> None:
        if self.unreadable is None:
            return
        path = self.file(rlhf_kit, self.unreadable)
        try:
            found = list(self.format(rlhf_kit).read(str(path)))
        except RequestError as error:
            require(path.name in str(error), f"what it says of a file that can't be read doesn't name it: {error}")
        except Exception as error:
            broken(f"a file that can't be read raises {type(error).__name__}, not RequestError: {error}")
        else:
            broken(f"a file that can't be read is taken, as {found}")
