"""The tables of errors fit the source as it is, and the program tells caught from survived."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import named
import pytest
import systematic
from mutants import ROOT, TableError, replaced

HERE = Path(__file__).parent


def test_every_named_error_is_found_once_and_makes_python() -> None:
    found = list(named.mutants())  # raises, naming each one that isn't
    assert len(found) == sum(len(rows) for _, _, rows in named.TABLES) >= 60
    assert all(mutant.source != (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in found)


def test_the_docs_say_about_how_many_there_are() -> None:
    page = (ROOT / "docs" / "mutation.md").read_text(encoding="utf-8")
    for what, found in (("by name", list(named.mutants())), ("by rule", list(systematic.mutants()))):
        said = re.search(rf"\| {what} \| (\d+) \|", page)
        assert said and int(said[1]) == pytest.approx(len(found), rel=0.05), (what, len(found))


def test_the_tests_that_should_catch_them_exist() -> None:
    for mutant in named.mutants():
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), f"{mutant.name}: {test}"
            function = name.partition("[")[0]
            source = (ROOT / file).read_text(encoding="utf-8")
            assert not name or re.search(rf"^def {function}\(", source, re.M), f"{mutant.name}: {test}"


def test_every_error_by_rule_makes_python_and_every_equivalent_one_is_still_made() -> None:
    found = list(systematic.mutants())  # raises where not
    assert len({mutant.name for mutant in found}) == len(found) > 300
    assert {mutant.file for mutant in found} == set(systematic.MODULES)


def test_a_text_that_is_not_there_once_is_an_error() -> None:
    assert replaced("a + b", "+", "-", "x") == "a - b"
    for source in ("a", "a + b + c"):
        with pytest.raises(TableError, match="x: expected exactly once"):
            replaced(source, "+", "-", "x")


def test_rules_change_one_place_and_leave_messages_alone() -> None:
    lines = [
        "def f(x: int | None, n=0):", '    """1 + 1"""', "    if not x < 2:",
        '        raise ValueError("a" + f"{x - 1}")', "    return max(x, -n)",
    ]  # fmt: skip
    source = "\n".join(lines)
    made = {source[: e.start] + e.new + source[e.end :] for e in systematic.edits(source)}
    changed = {line.strip() for text in made for line in text.splitlines() if line not in lines}
    assert changed == {
        "def f(x: int | None, n=1):", "if x < 2:", "if not x <= 2:", "if not x > 2:", "if not x < 3:",
        "return min(x, -n)", "return max(x, n)",
    }  # fmt: skip


PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
from mutants import ROOT, Mutant, replaced
from planting import Harness, scratch

file, tests = "plugins/rlhf_plugins/functional/kl.py", ("tests/plugins/functional/test_functional_kl.py",)
source = (ROOT / file).read_text()
k1 = "return logp - logp_ref"
changes = {{
    "sign": "return logp_ref - logp", "nothing": "return logp - (logp_ref)", "no name": "return logp - reference",
    "for ever": "while True: pass",
}}
mutants = [Mutant(name, file, replaced(source, k1, new, name), name, tests, True) for name, new in changes.items()]
with scratch() as folder:
    harness = Harness(folder, 1, patience=1.0)
    assert harness.baseline(tests) == ""
    found = []
    harness.run(mutants, found.append)
    assert (folder / "slot-0" / file).read_text() == source
print(json.dumps({{o.mutant.name: [o.verdict, o.good, o.by] for o in found}}))
"""


def test_caught_survived_broken_and_late_are_told_apart() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM.format(here=str(HERE))]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: (verdict, good) for name, (verdict, good, _) in found.items()} == {
        "sign": ("caught", True), "nothing": ("survived", False), "no name": ("broken", False),
        "for ever": ("late", False),
    }  # fmt: skip
    assert "test_functional_kl.py::test_worked_values[k1-0.5]" in found["sign"][2]


def test_a_request_that_matches_nothing_is_wrong() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--only", "no such error"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "matches none" in done.stderr
