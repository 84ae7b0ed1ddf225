"""The kit is there for pytest, and for nobody else: it costs no torch until it is used, and rlhf needs no pytest."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import testing
from rlhf.testing.contract import Contract

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
CORE = ROOT / "core" / "rlhf"
CONTRACTS = [name for name in testing.__all__ if name.endswith("Contract")]


def test_importing_all_of_it_imports_no_torch() -> None:
    code = "import sys; from rlhf.testing import *; import rlhf.testing.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_collecting_contracts_imports_no_torch(tmp_path: Path) -> None:
    classes = "".join(f"class Test{name}({name}):\n    name = 'x'\n\n" for name in CONTRACTS)
    (tmp_path / "test_all.py").write_text(f"from rlhf.testing import {', '.join(CONTRACTS)}\n\n{classes}")
    code = (
        "import pytest, sys; code = pytest.main(['--collect-only', '-q', '-p', 'rlhf.testing.plugin', '-p', "
        f"'no:cacheprovider', {str(tmp_path)!r}]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("test_its_entry_module_is_light") == len(CONTRACTS) == 10


def test_nothing_else_of_the_core_imports_pytest() -> None:
    for path in CORE.rglob("*.py"):
        if CORE / "testing" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = [*names, getattr(node, "module", None) or ""]
            assert not any(name.partition(".")[0] == "pytest" or name == "rlhf.testing" for name in modules), path


def test_pytest_finds_it_by_its_entry_point() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert about["entry-points"]["pytest11"] == {"rlhf.testing.plugin": "rlhf.testing.plugin"}
    assert not any(name.startswith("pytest") for name in about["dependencies"])


@pytest.mark.parametrize("name", CONTRACTS)
def test_each_contract_says_how_it_is_used(name: str) -> None:
    contract = getattr(testing, name)
    assert issubclass(contract, Contract)
    assert f"({name}):\n" in (contract.__doc__ or "") and "name = " in (contract.__doc__ or "")
    assert contract.kind
