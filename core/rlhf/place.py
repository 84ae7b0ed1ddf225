"""Which of the run's processes this one is: from what torchrun, Slurm or our own launcher put into the environment.
Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import attrs

from rlhf.errors import Problem, RequestError

_FIRST_PORT, _PORTS = 20_000, 20_000


@attrs.frozen
class Place:
    """A process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine: says which GPU is its own."""
    local_size: int = 1
    """Ranks of this machine: share its cores."""
    address: str = "127.0.0.1"
    """Where rank 0 is met."""
    port: int = 0
    source: str = ""
    """What started the ranks, for people: "torchrun", "Slurm"; empty where this process is alone."""

    @property
    def joined(self) -> bool:
        """This process was started as one of the run's ranks; there are none to be started."""
        return bool(self.source)


def here(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place.

    Raises:
        RequestError: the environment says half of it, or what can't be.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        return _torchrun(env)
    if "SLURM_STEP_NUM_TASKS" in env:  # set by srun alone: a batch script is no rank, whatever --ntasks says
        size = _number(env, "SLURM_STEP_NUM_TASKS")
        return _slurm(env, size) if size > 1 else Place()
    return Place()


def _torchrun(env: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not env.get(name)]
    if missing:
        given = ", ".join(f"{name}={env[name]}" for name in names if env.get(name))
        fix = "start the ranks by torchrun, or unset them and let --nproc start them"
        raise RequestError(Problem(f"the environment has {given}, and no {', '.join(missing)}", fix))
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return _checked(
        Place(
            rank=rank,
            size=size,
            local_rank=_number(env, "LOCAL_RANK", rank),
            local_size=_number(env, "LOCAL_WORLD_SIZE", size),
            address=env["MASTER_ADDR"],
            port=_number(env, "MASTER_PORT"),
            source=env.get("RLHF_STARTED_BY", "torchrun"),
        )
    )


def _slurm(env: Mapping[str, str], size: int) -> Place:
    job = _number(env, "SLURM_JOB_ID", 0)
    per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return _checked(
        Place(
            rank=_number(env, "SLURM_PROCID"),
            size=size,
            local_rank=_number(env, "SLURM_LOCALID"),
            local_size=int(per_node.group()) if per_node else size,
            address=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            # The same on every rank, and another for each job that shares the machine.
            port=_number(env, "MASTER_PORT", _FIRST_PORT + job % _PORTS),
            source="Slurm",
        )
    )


def _checked(place: Place) -> Place:
    for name, number, size in (("rank", place.rank, place.size), ("local rank", place.local_rank, place.local_size)):
        if not 0 <= number < size:
            what = f"{place.source}'s environment says {name} {number} of {size}"
            raise RequestError(Problem(what, f"a {name} is from 0 to {size - 1}"))
    return place


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise RequestError(Problem(f"the environment has {name}={text}", "it must be a whole number")) from None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
