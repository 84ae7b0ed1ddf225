"""A test file carried out inside a test, and what came of it."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

import pytest

Outcome = dict[str, str]
"""Test -> "" where it passed, "skipped", or what it said."""


_LEFT_OUT = ("cacheprovider", "unraisableexception", "threadexception", "logging", "xdist", "hypothesispytest")


class _Heard:
    def __init__(self) -> None:
        self.outcome: Outcome = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.outcome[name] = report.longreprtext
        elif report.skipped:
            self.outcome[name] = "skipped"
        elif report.when == "call":
            self.outcome[name] = ""


def carry_out(file: Path, *arguments: str) -> Outcome:
    """Run a test file in this process, as pytest would where the kit is installed."""
    heard = _Heard()
    said = io.StringIO()
    (file.parent / "none.ini").write_text("[pytest]\n")
    # What pytest does besides, such as collecting garbage until none is left, is of the test around it.
    without = [word for name in _LEFT_OUT for word in ("-p", f"no:{name}")]
    where = ("--import-mode=importlib", "--rootdir", str(file.parent), "--basetemp", str(file.parent / "scratch"))
    quiet = ("-q", *where, *without, "-p", "rlhf.testing.plugin")
    with contextlib.redirect_stdout(said):
        code = pytest.main([str(file), "-c", str(file.parent / "none.ini"), *quiet, *arguments], plugins=[heard])
    assert code in (0, 1), said.getvalue()
    return heard.outcome


def failures(outcome: Outcome) -> Outcome:
    return {name: said for name, said in outcome.items() if said not in ("", "skipped")}


def offer_to_registry(patch: pytest.MonkeyPatch, scratch: Path, folder: Path, distribution: str, module: str) -> None:
    """Make a package as good as installed, in this process and those that it starts.

    Args:
        scratch: a folder for its metadata.
        folder: that holds the package.
    """
    site = scratch / f"site-of-{distribution}"
    information = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[rlhf]\n{distribution} = {module}\n")
    for path in (folder, site):
        patch.syspath_prepend(str(path))
    importlib.invalidate_caches()
