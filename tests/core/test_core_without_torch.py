"""Where torch isn't installed, as `nox -s core` installs the package, or where it is hidden: what plans works, what
runs says what to install, and nothing is written."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli import run

_HIDDEN = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'numpy', 'safetensors', 'peft', "
    "'datasets', 'accelerate'))); from rlhf.cli import main; main(sys.argv[1:])"
)


def rlhf(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that can import none of what only a run imports."""
    command = [sys.executable, "-c", _HIDDEN, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plugins",),
        ("plugins", "show", "ppo"),
        ("run", "--algo", "ppo", "--help"),
        ("plan", "--algo", "ppo"),
        ("plan", "--algo", "dpo", "--mem", "lora", "--device", "a100"),
        ("matrix", "--algo", "sft"),
        ("pipeline", "--list"),
        ("pipeline", "sft-dpo", "--dry-run"),
    ],
)
def test_what_plans_needs_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = rlhf(tmp_path, *words)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--algo", "ppo"),
        ("run", "--algo", "sft", "--output", "there"),
        ("pipeline", "sft-dpo"),
        ("eval", "nothing"),
        ("export", "nothing", "--output", "there"),
    ],
)
def test_what_runs_says_what_to_install(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = rlhf(tmp_path, *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: torch isn't installed, and this command needs it\n    pip install ")
    assert ended.stderr.count("\n") == 2
    assert list(tmp_path.iterdir()) == []


def test_all_that_lacks_is_named_with_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"attrs", "datasets"}
    wanted = ["attrs>=23.2", "datasets>=4.0", "torch>=2.6", "transformers<6,>=5.16",
              "nvidia-ml-py>=12; platform_system == 'Linux'", "ray>=2.50; extra == 'ray'"]  # fmt: skip

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run._install_line() == "pip install 'torch>=2.6' 'transformers<6,>=5.16' 'nvidia-ml-py>=12'"
