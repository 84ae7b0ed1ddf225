"""Packages of strangers: installed, they run by name; broken ones are reported with their distribution and harm nobody.

By default they are installed into a folder of the test's own. `nox -s third_party` installs them into its environment
and says so by `RLHF_THIRD_PARTY=installed`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOOD = ("rlhf-scored", "rlhf-tempered")
BROKEN = ("broken/rlhf-broken", "broken/rlhf-squatter", "broken/rlhf-heavy")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables under which the strangers' packages are there."""
    if os.environ.get("RLHF_THIRD_PARTY") == "installed":
        return dict(os.environ)
    target = tmp_path_factory.mktemp("site")
    packages = [str(HERE / name) for name in (*GOOD, *BROKEN)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*command, *packages], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}


def rlhf(environment: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_listing_names_every_stranger_and_its_distribution(environment: dict[str, str], tmp_path: Path) -> None:
    done = rlhf(environment, "plugins", "--json", cwd=tmp_path)
    assert done.returncode == 0
    found = {(o["kind"], o["name"], o["distribution"]): o for o in json.loads(done.stdout)}
    assert found["algo", "scored", "rlhf-scored"]["status"] == "ok"
    assert found["algo", "scored", "rlhf-scored"]["version"] == "1.2.0"
    assert found["algo", "tempered", "rlhf-tempered"]["status"] == "ok"
    assert found["algo", "ppo", "rlhf-kit"]["status"] == "ok"
    squatter = found["algo", "ppo", "rlhf-squatter"]
    assert squatter["status"] == "failed" and "taken by rlhf-kit" in squatter["reason"]
    broken = found["", "broken", "rlhf-broken"]
    assert broken["status"] == "failed" and "this plugin can't be imported" in broken["reason"]
    assert found["track", "fake-heavy", "rlhf-heavy"]["status"] == "ok"  # slow, not wrong


def test_every_command_says_what_is_wrong_with_whom(environment: dict[str, str], tmp_path: Path) -> None:
    done = rlhf(environment, "plan", "--algo", "ppo", cwd=tmp_path)
    assert done.returncode == 0  # the squatter harms nobody: ppo is still ours
    assert "PPO with GAE" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert any("rlhf-broken 0.0.1" in line and "can't be imported" in line for line in lines)
    assert any("rlhf-squatter 0.0.2" in line and "ppo" in line for line in lines)
    assert any("rlhf-heavy 0.0.3" in line and "torch" in line for line in lines)
    assert len(lines) == 3


def test_an_algorithm_with_a_role_and_data_of_its_own_runs_by_name(environment: dict[str, str], tmp_path: Path) -> None:
    starter = Path(__file__).parents[2] / "plugins" / "rlhf_plugins" / "starter" / "model"
    rows = [
        {"prompt": f"Question: What is {a} + 2?\nAnswer:", "completion": f" {a + 2}", "score": a % 2} for a in range(40)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x"}]))
    arguments = ("--algo", "scored", "--data", "scored.jsonl", "--model", str(starter), "--max-steps", "3")
    done = rlhf(environment, "run", *arguments, "--batch-size", "8", "--mem", "fp32", "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 refused" in done.stderr and "'score' must be a number, not None" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["scored/weight"] > 0 for line in lines)
    # The judge's head starts at zero, so the first weights are exp(0) and exp(1) as the score says.
    assert 1.0 <= lines[0]["scored/weight"] <= 2.7183
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert (tmp_path / "run" / "model" / "judge" / "config.json").is_file()


def test_an_online_algorithm_of_thirty_lines_runs_by_name(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = (
        "--algo",
        "tempered",
        "--algo.group-size=4",
        "--batch-size",
        "8",
        "--max-steps",
        "2",
        "--eval-rows",
        "16",
    )
    done = rlhf(environment, "run", *arguments, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["algo"]["distribution"] == "rlhf-tempered"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    help_text = rlhf(environment, "run", "--algo", "tempered", "--help", cwd=tmp_path).stdout
    assert "--algo.group-size" in help_text and "completions per prompt" in help_text
