"""A plugin's fault is shown from the plugin's own code on, and says how much is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.rank import trace

WORDS = ("--algo", "ppo", "--max-steps", "1", "--eval-rows", "0", "--batch-size", "4", "--track", "none")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A program: `rlhf` with a PPO that fails in its loss."""
    program = tmp_path / "broken.py"
    program.write_text(
        "import rlhf_plugins.algorithms.ppo as ppo\n"
        "def loss(self, batch, score):\n"
        "    return batch['no such field']\n"
        "loss.__globals__['__name__'] = 'rlhf_plugins.broken'\n"  # as if it stood there
        "ppo.PPO.loss = loss\n"
        "from rlhf.cli import main\n"
        "main()\n"
    )
    return program


def ended(program: Path, output: Path, **more: str) -> str:
    command = [sys.executable, str(program), "run", *WORDS, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr


def test_it_begins_in_the_plugin_and_counts_what_is_left_out(broken: Path, tmp_path: Path) -> None:
    said = ended(broken, tmp_path / "short")
    files = [line.strip() for line in said.splitlines() if line.startswith("  File ")]
    assert len(files) == 2 and "broken.py" in files[0] and "experience.py" in files[1]
    assert "KeyError: \"the experience has no 'no such field'" in said
    assert "calls that led to it are left out; RLHF_TRACEBACK=full shows them)" in said
    whole = ended(broken, tmp_path / "full", RLHF_TRACEBACK="full")
    left_out = int(said.rpartition("(")[2].split()[0])
    assert len([line for line in whole.splitlines() if line.startswith("  File ")]) == 2 + left_out
    assert "left out" not in whole


def test_a_fault_of_the_core_is_shown_whole() -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        assert "test_core_trace.py" in trace(error) and "left out" not in trace(error)
