"""Several command lines, one after another, in the same few processes: what `torchrun` would start for each, without
importing torch anew each time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def carry_out(lines: Sequence[Sequence[str]], folder: Path, ranks: int = 2, seconds: float = 90.0) -> None:
    """Run each command line on so many ranks; AssertionError with what they said where one fails.

    Args:
        seconds: a line may take, on the average: several times what it does, so that only a rank that waits for ever
            is ended by it.
    """
    job = folder / f"lines-{ranks}.json"
    job.write_text(json.dumps([[free_port(), list(line)] for line in lines]))
    common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
    logs = [folder / f"said-{ranks}-{rank}.txt" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(job)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(seconds * len(lines)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(f"rank {rank}: {log.read_text(errors='replace')[-3000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * ranks, said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _main(job: str) -> None:
    from rlhf.cli import main

    for port, line in json.loads(Path(job).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        try:
            main(line)
        except SystemExit as end:
            if end.code:
                print(f"exit code {end.code}: {' '.join(line)}", flush=True)
                os._exit(int(end.code))


if __name__ == "__main__":
    _main(sys.argv[1])
