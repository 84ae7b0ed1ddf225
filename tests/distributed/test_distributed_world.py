"""Real ranks that meet: what they add up and send, and who is named when one doesn't come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port

pytestmark = pytest.mark.matrix

PROGRAM = """
import json, os, sys, time
import torch
from rlhf.errors import RankLost
from rlhf.place import here
from rlhf.world import join
place = here()
world = join(place, "gloo", float(os.environ.get("DEADLINE", "60")))
rank = world.rank
def tell(**found):
    print(json.dumps(found), flush=True)
"""


def run(body: str, count: int = 3, **environment: str) -> list[dict[str, Any]]:
    """What each rank told last, by rank."""
    common = {**os.environ, **environment, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS":
              "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, "-c", PROGRAM + body]
    processes = [
        subprocess.Popen(line, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(count)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=180)
        lines = out.splitlines()
        found.append(json.loads(lines[-1]) if lines else {"error": err[-2000:]})
    return found


def test_sums_maxima_and_values() -> None:
    found = run("""
x = torch.tensor([1e8, 1.0, -1e8][rank])
value = {"a": [rank, None, float("inf")], "b": torch.full((rank,), rank, dtype=torch.bfloat16), "c": "\\u00e9"}
parts = world.gather(value)
tell(
    sum=float(world.sum(x)),  # in float32, 1e8 + 1 is 1e8
    counts=world.sum(torch.tensor([rank, 2**53 + 1])).tolist(),
    most=world.max(torch.tensor([-rank, rank])).tolist(),
    anywhere=world.max(torch.tensor([rank == 1, False])).tolist(),
    heard=[[p["a"][0], p["b"].tolist(), str(p["b"].dtype), p["c"]] for p in parts],
    second=world.broadcast(value if rank == 1 else None, 1)["a"][0],
    empty=world.sum(torch.zeros(0)).tolist(),
    seconds=world.seconds > 0,
    alone=torch.equal(x, torch.tensor([1e8, 1.0, -1e8][rank])),  # what was given is left as it is
)
world.barrier()
world.close()
""")
    assert found[0] == found[1] == found[2]
    assert found[0] == {
        "sum": 1.0,
        "counts": [3, 3 * (2**53 + 1)],
        "most": [0, 2],
        "anywhere": [True, False],
        "heard": [[r, [float(r)] * r, "torch.bfloat16", "é"] for r in range(3)],
        "second": 1,
        "empty": [],
        "seconds": True,
        "alone": True,
    }


def test_a_rank_that_is_late_is_named_with_where_it_was() -> None:
    found = run(
        """
world.now = "step 3, rollout"
world.barrier()
if rank == 1:
    time.sleep(8)
    os._exit(0)
world.now = "step 3, update"
try:
    world.sum(torch.tensor(1.0))
except RankLost as error:
    tell(said=str(error))
os._exit(0)
""",
        DEADLINE="3",
    )
    late = "rank 1 (last at barrier of step 3, rollout) did not arrive at sum of step 3, update within 3 s"
    assert late in [rank.get("said") for rank in (found[0], found[2])], found


def test_a_rank_that_is_gone_is_named_at_once() -> None:
    found = run("""
world.now = "step 1"
world.barrier()
if rank == 1:
    os._exit(1)
start = time.monotonic()
try:
    world.barrier()
    world.barrier()
except RankLost as error:
    tell(said=str(error), seconds=time.monotonic() - start)
os._exit(0)
""")
    said = [r["said"] for r in (found[0], found[2])]
    assert all("lost contact with" in text for text in said), said
    # the first to notice ends, too, and takes the other by surprise: that one may not get to ask who it was
    assert any("lost contact with rank 1" in text for text in said), said
    assert all(r["seconds"] < 20 for r in (found[0], found[2]))


def test_ranks_that_do_not_meet_say_where_they_waited(tmp_path: Path) -> None:
    body = "from rlhf.world import rendezvous, join\n"
    program = PROGRAM.replace(
        'world = join(place, "gloo", float(os.environ.get("DEADLINE", "60")))',
        body
        + """
try:
    join(place, "gloo", 2.0)
except RankLost as error:
    print(json.dumps({"said": str(error)}))
    os._exit(0)
""",
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    said = json.loads(done.stdout.splitlines()[-1])["said"]
    assert "the 2 ranks did not meet at 127.0.0.1:" in said and "within 2 s" in said
