"""The reference is what the code says, and says all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from rlhf import api, options
from rlhf.recipe import RunOptions
from rlhf.registry import Registry

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}write it anew with: python docs/generate.py"


def test_writing_it_imports_no_torch() -> None:
    code = "import sys, generate; generate.pages(); sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join([str(ROOT / "docs"), *sys.path])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}).returncode == 0


def test_every_component_and_every_option_is_in_it(installed: Registry) -> None:
    seen = 0
    for offer in installed.offers:
        if offer.distribution != "rlhf-kit":
            continue
        assert offer.entry is not None
        page = (REFERENCE / f"{offer.kind}.md").read_text(encoding="utf-8")
        assert f"\n## `{offer.name}`" in page
        # several have an option of one name, each in its own part; what all of a kind have is told once
        parts = (page.partition(f"\n## `{offer.name}`\n")[2].partition("\n## ")[0], page)
        for name, field in options.fields(offer.entry.config).items() if offer.entry.config else ():
            flag = f".{name.replace('_', '-')}` |"
            found = ({x for x in part.split("\n") if flag in x and _of(offer.kind, offer.name, x)} for part in parts)
            (row,) = next(filter(None, found))
            assert all(f"`{choice}`" in row for choice in options.info(field).choices), row
            seen += 1
    assert seen > 80


def _of(kind: str, name: str, line: str) -> bool:
    """The row is of this component, where components of a kind are told apart by name."""
    return line.startswith((f"| `--{kind}.{name}.", f"| `--{kind}.")) and (
        kind not in ("reward", "mem", "track") or line.startswith(f"| `--{kind}.{name}.")
    )


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(RunOptions)])
def test_every_run_option_is_a_key_and_a_flag(field: str) -> None:
    flag = f"--{field.replace('_', '-')}"
    assert f"| `{field}` | `{flag}` |" in (REFERENCE / "recipe.md").read_text(encoding="utf-8")
    assert f"| `{flag}" in (REFERENCE / "command-line.md").read_text(encoding="utf-8")


def test_every_public_name_has_a_heading_and_something_said_of_it() -> None:
    page = (REFERENCE / "api.md").read_text(encoding="utf-8")
    for name in api.__all__:
        _, heading, after = page.partition(f"\n### {name}\n")
        assert heading, f"rlhf.api.{name} is not in the reference"
        said = [line for line in after.split("\n#")[0].split("```")[-1].split("\n") if line.strip()]
        assert said, f"rlhf.api.{name} has no docstring"


def test_a_bound_and_a_choice_reach_the_reference() -> None:
    rows = (REFERENCE / "algo.md").read_text(encoding="utf-8")
    assert "| `--algo.clip-range` | number | `0.2` | How far the ratio may pull a token. Range: > 0, <= 1." in rows
    assert "| `--algo.loss` | text | `sigmoid` |" in rows


def test_every_algorithm_has_a_paper_a_size_and_tests() -> None:
    """As the page of them side by side tells; small enough to be read in one sitting."""
    page = (REFERENCE / "algorithm-sizes.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) >= 28
    readme = (REFERENCE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"The {len(rows)} here are files" in readme
    for name, paper, file, own, step, tests in rows:
        assert "20" in paper and "trains " in step, name
        assert tests.startswith("`test_"), f"{name} has no tests of its numbers"
        lines = sum(int(number) for number in re.findall(r"` (\d+)", file + own))
        assert 20 < lines < 300, (name, lines)
    median = int(re.search(r"counted: (\d+) at the median", page).group(1))
    assert 20 < median <= 120
