"""Runs tests against mutants, each in a forked child of one process that has imported all that is heavy.

A child puts a copy of our packages with the error in it first on the path and runs pytest there, so an error costs what
its tests cost: torch and transformers are imported once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import hypothesis
import pytest
from mutants import PACKAGES, ROOT, Mutant

_NO_TEST = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError")
"""Errors that say that the mutant is no program: whoever planted it made a mistake."""


@attrs.frozen
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    """caught, late (past its limit of time), survived, or broken (no program, or no tests)."""
    by: str
    """The test that caught it, with what it raised; or what is wrong."""
    seconds: float

    @property
    def good(self) -> bool:
        return self.verdict == "caught" or (self.verdict == "late" and not self.mutant.named)


class Slot:
    """A copy of our packages of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for package in PACKAGES:  # times are copied too, so that compiled files stay valid
            shutil.copytree(ROOT / package, folder / package)

    @property
    def path(self) -> list[str]:
        return [str(self.folder / package) for package in PACKAGES]

    def write(self, file: str, source: str) -> None:
        place = self.folder / file
        place.write_text(source, encoding="utf-8")
        for compiled in (place.parent / "__pycache__").glob(f"{place.stem}.*.pyc"):
            compiled.unlink()


class _Watch:
    """A pytest plugin: writes down how long each test took, and which one failed first, of what."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed = ""
        self.error = ""
        self.broken = ""
        self._kind = ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.broken:
            self.broken = f"{report.nodeid} is not collected: {_last_line(report)}"

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None:
            self._kind = call.excinfo.type.__name__

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed, self.error = report.nodeid, f"{self._kind}: {_last_line(report)}"
            if self._kind in _NO_TEST:
                self.broken = f"{report.nodeid}: {_last_line(report)}"


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line for line in str(text).strip().splitlines() if line.strip()]
    return lines[0][:160] if lines and crash is not None else (lines[-1][:160] if lines else "")


def run_tests(slot: Slot, tests: Sequence[str], first_only: bool) -> dict[str, Any]:
    """In this process, which must be a child made for it: what pytest found, with the slot's packages imported."""
    sys.path[:0] = slot.path
    os.environ["PYTHONPATH"] = os.pathsep.join(slot.path)  # for programs that tests start
    # No examples kept from mutants, none shrunk, and the same ones each time, so that the same test catches.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", database=None, deadline=None, derandomize=True, phases=phases)
    hypothesis.settings.load_profile("mutation")
    watch = _Watch()
    options = ["-q", "--tb=short", f"--rootdir={ROOT}", f"--basetemp={slot.folder / 'tmp'}", "-p", "no:cacheprovider"]
    options += ["-p", "no:unraisableexception"]  # it collects garbage twice, which takes longer than most tests here
    before = set(sys.modules)
    code = pytest.main([*options, *(["-x"] if first_only else []), *tests], plugins=[watch])
    return {
        "code": int(code),
        "seconds": watch.seconds,
        "failed": watch.failed,
        "error": watch.error,
        "broken": watch.broken,
        "modules": sorted(set(sys.modules) - before),
    }


@attrs.define
class _Child:
    mutant: Mutant | None
    slot: Slot
    pid: int
    started: float
    limit: float
    answer: Path
    seen: float
    waited: float = 0.0
    status: int = 0


class Harness:
    """A pool of slots."""

    def __init__(self, folder: Path, workers: int, patience: float = 10.0) -> None:
        """`patience`: seconds of processor time that any mutant has, besides five times what its tests take."""
        self._patience = patience
        self._free = [Slot(folder / f"slot-{i}") for i in range(workers)]
        self._originals: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def baseline(self, tests: Sequence[str]) -> str:
        """Run tests on the unmutated copy; returns what is wrong, if anything. Then imports here all that they
        imported and isn't ours, so that no child has to."""
        child = self._start(None, tests, 3600.0, first_only=False)
        while not self._ended(child):
            time.sleep(0.05)
        found = self._answer(child)
        self._free.append(child.slot)
        if found is None:
            return "the unmutated tests did not come to an end"
        if found["broken"] or found["failed"] or found["code"] != 0:
            if not found["failed"]:
                return found["broken"] or f"pytest ended with {found['code']}"
            return f"{found['failed']}: {found['error']}"
        self._seconds = found["seconds"]
        ours = ("rlhf", "rlhf_plugins", "conftest", "test_", "tests")
        for name in found["modules"]:
            if not name.startswith(ours) and name.split(".")[0] not in sys.builtin_module_names:
                with contextlib.suppress(Exception):  # a module of a test's own, or one that takes another's place
                    importlib.import_module(name)
        gc.collect()
        gc.freeze()  # what is there now is in every child, and is no child's garbage
        return ""

    def run(self, mutants: Sequence[Mutant], done: Callable[[Outcome], None]) -> None:
        """Every mutant, several at a time."""
        waiting, active = list(mutants), list[_Child]()
        try:
            while waiting or active:
                while waiting and self._free:
                    mutant = waiting.pop(0)
                    active.append(self._start(mutant, mutant.tests, self._limit(mutant), first_only=True))
                for child in [c for c in active if self._ended(c)]:
                    active.remove(child)
                    assert child.mutant is not None
                    child.slot.write(child.mutant.file, self._original(child.mutant.file))
                    self._free.append(child.slot)
                    done(self._judge(child))
                time.sleep(0.005)
        finally:
            for child in active:
                _kill(child.pid)

    def _limit(self, mutant: Mutant) -> float:
        """Seconds of processor time: many times what its tests take."""
        usual = sum(s for node, s in self._seconds.items() if any(_is_of(node, test) for test in mutant.tests))
        return self._patience + 5.0 * usual

    def _original(self, file: str) -> str:
        if file not in self._originals:
            self._originals[file] = (ROOT / file).read_text(encoding="utf-8")
        return self._originals[file]

    def _start(self, mutant: Mutant | None, tests: Sequence[str], limit: float, first_only: bool) -> _Child:
        slot = self._free.pop()
        if mutant is not None:
            slot.write(mutant.file, mutant.source)
        answer = slot.folder / "answer.json"
        answer.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()  # so that what it starts can be ended with it
                hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
                resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, hard))
                with (slot.folder / "output.txt").open("w") as out:
                    os.dup2(out.fileno(), 1)
                    os.dup2(out.fileno(), 2)
                os.chdir(ROOT)
                found = run_tests(slot, tests, first_only)
                partial = answer.with_suffix(".part")
                partial.write_text(json.dumps(found))
                partial.rename(answer)
            finally:
                os._exit(0)
        now = time.monotonic()
        return _Child(mutant, slot, pid, now, limit, answer, now)

    def _ended(self, child: _Child) -> bool:
        pid, child.status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            _kill(child.pid)  # what it may have started
            return True
        now = time.monotonic()
        child.waited += min(now - child.seen, 1.0)  # while this process itself is stopped, nobody waits
        child.seen = now
        if child.waited > 6 * child.limit:  # asleep: it uses no processor
            _kill(child.pid)
            _, child.status = os.waitpid(child.pid, 0)
            return True
        return False

    def _answer(self, child: _Child) -> dict[str, Any] | None:
        return json.loads(child.answer.read_text()) if child.answer.exists() else None

    def _judge(self, child: _Child) -> Outcome:
        assert child.mutant is not None
        found, seconds = self._answer(child), time.monotonic() - child.started
        if found is None:
            number = os.WTERMSIG(child.status) if os.WIFSIGNALED(child.status) else 0
            if number in (signal.SIGXCPU, signal.SIGKILL):
                return Outcome(child.mutant, "late", f"ended past {child.limit:.0f} s of processor time", seconds)
            return Outcome(child.mutant, "broken", f"the tests' process died: signal {number}", seconds)
        if found["broken"]:
            return Outcome(child.mutant, "broken", found["broken"], seconds)
        if found["failed"]:
            return Outcome(child.mutant, "caught", f"{_short(found['failed'])}  {found['error']}", seconds)
        if found["code"] != 0:
            return Outcome(child.mutant, "broken", f"pytest ended with {found['code']}", seconds)
        return Outcome(child.mutant, "survived", "", seconds)


def _is_of(node: str, test: str) -> bool:
    return node == test or node.startswith((f"{test}::", f"{test}[", f"{test}/"))


def _short(node: str) -> str:
    return node.rpartition("/")[2]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rlhf-mutation-") as folder:
        yield Path(folder)
