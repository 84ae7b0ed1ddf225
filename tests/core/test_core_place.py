"""Which rank a process is, from what started it."""

from __future__ import annotations

import pytest

from rlhf.errors import RequestError
from rlhf.place import Place, first_host, here

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-a",
            "MASTER_PORT": "29400"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "8"}  # fmt: skip


def test_alone() -> None:
    assert here({}) == Place() and not here({}).joined
    assert here({"WORLD_SIZE": "1"}) == Place()  # some clusters set it for everybody


def test_torchrun() -> None:
    assert here(TORCHRUN) == Place(3, 4, 1, 2, "node-a", 29400, "torchrun")
    one = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert here(one).joined and here(one).size == 1


def test_srun() -> None:
    found = here(SRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.address, found.source) == ("gpu07", "Slurm")
    assert found.port == here({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port  # all ranks find the same
    assert here({**SRUN, "MASTER_ADDR": "boss", "MASTER_PORT": "5"}).address == "boss"
    assert here({**SRUN, "MASTER_ADDR": "boss", "MASTER_PORT": "5"}).port == 5


def test_a_batch_script_is_no_rank() -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS too; the script itself would wait for ranks that never come."""
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert here(script) == Place()
    assert here({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == Place()  # srun --pty bash


def test_torchrun_inside_srun_goes_by_torchrun() -> None:
    assert here({**SRUN, **TORCHRUN}).source == "torchrun"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "8"}, "has WORLD_SIZE=8, and no RANK, MASTER_ADDR, MASTER_PORT"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "and no MASTER_PORT"),
        ({**TORCHRUN, "RANK": "4"}, "says rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "says local rank -1 of 2"),
        ({**TORCHRUN, "RANK": "first"}, "has RANK=first"),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        here(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("node1", "node1"), ("a,b", "a"), ("rack[2]-node,x", "rack2-node"), ("", "")],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
