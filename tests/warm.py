"""Ranks kept warm for many runs, and what a run left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent


class Ranks:
    """Processes that carry out one run after another, together; after a failure, new ones."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[subprocess.Popen[str]] = []

    def _start(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the processes
        common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if self._count > 1:  # a process that is alone isn't told that it is a rank
            size = str(self._count)
            common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RLHF_STARTED_BY": "a test",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self._count)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "warm_rank.py")],
                env={**common, **(place if self._count > 1 else {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for place in places
        ]

    def __call__(self, recipe: dict[str, Any], output: Path, resume: bool = False) -> None:
        """A run of these ranks."""
        self._all({"recipe": recipe, "output": str(output), "resume": resume})

    def probe(self, name: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
        """What a function of `sharded_probes` finds in each rank."""
        return self._all({"recipe": recipe, "probe": name})

    def _all(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": "it ended"}
            if "error" in answer:
                self.close()
                self._log.seek(0)
                last = self._log.read()[-3000:].decode(errors="replace")
                raise AssertionError(f"rank {rank}: {answer['error']}\n{last}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def model(output: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """Every saved weight: file in the folder and name -> tensor."""
    from safetensors.torch import load_file

    folder = output / name
    return {
        f"{path.relative_to(folder)}:{key}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def files(output: Path) -> dict[str, Any]:
    """Every file of the saved model but its weights: name -> content."""
    folder, found = output / "model", {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[path.name] = _sorted(json.loads(path.read_text()))
        elif path.is_file() and path.suffix != ".safetensors":
            found[path.name] = path.read_text()
    return found


def _sorted(content: Any) -> Any:
    """Lists of names in order: PEFT writes sets."""
    if isinstance(content, dict):
        return {key: _sorted(value) for key, value in content.items()}
    return sorted(content) if isinstance(content, list) and all(isinstance(x, str) for x in content) else content
