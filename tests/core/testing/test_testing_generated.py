"""What `rlhf new plugin` writes is found, keeps its contract, and runs: for every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from breaking import carry_out, failures, offer_to_registry

from rlhf import registry
from rlhf.cli.new import files, write
from rlhf.entries import KINDS

SLOW = ("algo", "mem", "track")
"""Whose contract holds several runs."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """(kind, folder) of a generated package that is as good as installed."""
    kind: str = request.param
    folder = tmp_path / f"rlhf-new-{kind}"
    write(folder, files(f"new-{kind}", kind))
    offer_to_registry(monkeypatch, tmp_path, folder, f"rlhf-new-{kind}", f"rlhf_new_{kind}")
    return kind, folder


def of_kinds(*kinds: str) -> list[object]:
    return [pytest.param(kind, id=kind, marks=pytest.mark.matrix_full if kind in SLOW else ()) for kind in kinds]


@pytest.mark.parametrize("package", KINDS, indirect=True)
def test_it_is_found(package: tuple[str, Path]) -> None:
    kind, _ = package
    found = registry.load()
    offer = found.offer(kind, f"new-{kind}")
    assert offer is not None
    assert (offer.status, offer.distribution) == ("ok", f"rlhf-new-{kind}")
    assert not [text for text in found.warnings if "rlhf-new" in text]


@pytest.mark.parametrize("package", of_kinds(*KINDS), indirect=True)
def test_it_keeps_its_contract(package: tuple[str, Path]) -> None:
    kind, folder = package
    (test,) = (folder / "tests").glob("*.py")
    outcome = carry_out(test)
    assert not failures(outcome)
    assert len(outcome) >= (9 if kind == "launch" else 11)


@pytest.mark.matrix
def test_a_run_of_nothing_but_generated_components(tmp_path: Path) -> None:
    """Really installed, each from a folder of its own, and all in one run of two ranks' launcher."""
    for kind in KINDS:
        write(tmp_path / f"rlhf-new-{kind}", files(f"new-{kind}", kind))
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, *(str(tmp_path / f"rlhf-new-{kind}") for kind in KINDS)], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    rows = tmp_path / "rlhf-new-format" / "example.new-format"
    asked = [word for kind in KINDS if kind != "format" for word in (f"--{kind}", f"new-{kind}")]
    few = ("--max-steps", "2", "--batch-size", "2", "--eval-rows", "2", "--engine.max-new-tokens", "4")
    line = [sys.executable, "-m", "rlhf", "run", *asked, "--mem", "fp32", "--data", str(rows), *few, "--output", "run"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    chosen = [plan[kind] for kind in ("algo", "policy", "engine", "optim", "backend", "launch")]
    chosen += [plan["rewards"][0], plan["trackers"][-1], plan["data"][0]["format"]]
    assert {one["distribution"] for one in chosen} == {f"rlhf-new-{kind}" for kind in KINDS if kind != "mem"}
    assert any(one["distribution"] == "rlhf-new-mem" for one in plan["roles"][0]["mem"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "numbers.csv").read_text().startswith("step,name,value\n")
