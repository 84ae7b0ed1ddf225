"""`rlhf run --nproc 2` as a user has it: what it says, Ctrl-C, a rank that is killed, going on afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from rlhf.cli import main

LINE = ("--algo", "ppo", "--batch-size", "8", "--max-steps", "10", "--save-every", "1", "--eval-rows", "8",
        "--algo.epochs", "2", "--algo.minibatches", "2", "--nproc", "2")  # fmt: skip
ENDLESS = ("--max-steps", "1000")
"""So that it isn't done before it is told to stop."""


class Run:
    """A run at work in processes of its own."""

    def __init__(self, folder: Path, *more: str, line: Sequence[str] = LINE) -> None:
        self.folder, self.said = folder / "run", folder / "said.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", "run", *line, "--output", str(self.folder), *more],
            stdout=subprocess.DEVNULL,
            stderr=self.said.open("wb"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, as they appear."""
        found = {}
        children = psutil.Process(self.process.pid).children(recursive=True)
        for child in sorted(children, key=lambda child: child.create_time()):
            try:
                if "rlhf.rank" in child.cmdline():  # and so, for a moment, what a rank starts: the first is the rank
                    found.setdefault(int(child.environ()["RANK"]), child)
            except psutil.Error:
                continue
        return found

    def until(self, steps: int) -> dict[int, psutil.Process]:
        """Wait until so many steps are logged, or until both ranks are there; returns them."""
        log, end = self.folder / "metrics.jsonl", time.monotonic() + 240
        while time.monotonic() < end and self.process.poll() is None:
            ranks = self.ranks()
            if len(ranks) == 2 and (not steps or (log.is_file() and log.read_bytes().count(b"\n") >= steps)):
                return ranks
            time.sleep(0.02)
        raise AssertionError(self.said.read_text())

    def end(self, seconds: float) -> tuple[int, str]:
        """(exit code, what was said); nobody is left behind."""
        ranks = self.ranks().values()
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        psutil.wait_procs(list(ranks), 5)
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
        return code, self.said.read_text()


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/", "memory/"))} for line in lines]


def weights(folder: Path) -> dict[str, list[float]]:
    return {n: t.flatten().tolist() for p in (folder / "model").rglob("*.safetensors") for n, t in load_file(p).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder)
    code, said = run.end(300)
    assert code == 0, said
    assert said.count("done: 10 steps") == 1  # only one rank speaks
    assert "2 processes" in said
    return run.folder


FULL = pytest.mark.matrix_full


@pytest.mark.parametrize(
    ("victim", "steps"),
    [pytest.param(1, 0, marks=FULL), pytest.param(1, 3, marks=FULL), pytest.param(0, 5, marks=pytest.mark.matrix)],
)
def test_a_killed_rank_ends_the_run_and_it_goes_on(tmp_path: Path, whole: Path, victim: int, steps: int) -> None:
    run = Run(tmp_path)
    run.until(steps)[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, said = run.end(60)
    assert time.monotonic() - start < 30
    assert code == 1, said
    assert f"error: rank {victim} of 2 was ended by signal 9 (SIGKILL)" in said
    code, said = Run(tmp_path, "--resume").end(300)
    assert code == 0, said
    assert numbers(tmp_path / "run") == numbers(whole)
    assert weights(tmp_path / "run") == weights(whole)


SHORT = ("--algo", "sft", "--batch-size", "8", "--max-steps", "6", "--save-every", "1", "--eval-rows", "0",
         "--optim.eps", "1e-3", "--track", "none", "--mem", "fp32")  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.raises(SystemExit) as end:
        main(["run", *SHORT, "--output", str(folder / "run")])
    assert end.value.code == 0
    return [line["loss"] for line in numbers(folder / "run")]


# While it starts, while it trains, and that rank on which the others wait for the store
@pytest.mark.parametrize(
    ("words", "victim", "steps"),
    [
        pytest.param(("--backend", "fsdp2"), 0, 3, marks=FULL),
        pytest.param(("--mem", "zero2"), 1, 0, marks=FULL),
        pytest.param(("--mem", "zero3", "--mem.zero3.keep-whole", "0"), 1, 2, marks=pytest.mark.matrix),
    ],
)
def test_where_weights_are_spread_too(
    tmp_path: Path, alone: list[float], words: tuple[str, ...], victim: int, steps: int
) -> None:
    line = (*SHORT, *words, "--nproc", "2")
    run = Run(tmp_path, line=line)
    run.until(steps)[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, said = run.end(60)
    assert time.monotonic() - start < 30
    assert code == 1 and f"error: rank {victim} of 2 was ended by signal 9 (SIGKILL)" in said, said
    made = len(numbers(tmp_path / "run")) if steps else 0
    assert steps <= made < 6
    code, said = Run(tmp_path, "--resume", line=line).end(300)
    assert code == 0, said
    found = [line["loss"] for line in numbers(tmp_path / "run")]
    # float32 sums in another order: what tests/distributed holds of runs that nobody kills
    assert found == pytest.approx(alone, abs=1e-5)


@pytest.mark.matrix
def test_ctrl_c_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    run = Run(tmp_path, *ENDLESS)
    run.until(2)
    run.process.send_signal(signal.SIGINT)
    code, said = run.end(60)
    assert code == 130, said
    assert said.count("stopping after this step") == 1 and said.count("checkpoint saved") == 1
    steps = len(numbers(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}" / "manifest.json").is_file()


@pytest.mark.matrix
def test_a_request_to_stop_that_one_rank_hears_stops_them_all(tmp_path: Path) -> None:
    run = Run(tmp_path, *ENDLESS)
    run.until(2)[1].send_signal(signal.SIGTERM)
    code, said = run.end(120)
    assert code == 130 and "stopped by SIGTERM after step" in said


@pytest.mark.matrix
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ranks = run.until(1).values()
    run.process.kill()
    gone, alive = psutil.wait_procs(list(ranks), 60)  # a loaded machine needs seconds
    assert len(gone) == 2 and not alive


@pytest.mark.matrix
def test_a_reward_that_raises_on_one_rank_is_told_with_its_rank(tmp_path: Path) -> None:
    judge = "import os\ndef score(completion):\n    return 1 / (1 - int(os.environ['RANK']))\n"
    (tmp_path / "judge.py").write_text(judge)
    run = Run(tmp_path, "--reward", "python", "--reward.python.path", f"{tmp_path}/judge.py:score", "--eval-rows", "0")
    code, said = run.end(120)
    assert code == 1, said
    assert "error: rank 1: reward 'python'" in said and "ZeroDivisionError" in said


@pytest.mark.matrix
def test_under_torchrun_the_run_joins_its_processes(tmp_path: Path, whole: Path) -> None:
    line = LINE[: LINE.index("--nproc")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "rlhf", "run",
         *line, "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 10 steps") == 1
    assert numbers(tmp_path / "run") == numbers(whole)
