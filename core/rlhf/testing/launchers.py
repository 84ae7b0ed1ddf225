"""The contract of launchers: `LauncherContract`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.errors import RunError
from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.testing.kit import Kit

_RANK = """
import json, os, pathlib, sys, time
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
rank = os.environ.get("RANK", "none")
told = {name: os.environ[name] for name in names if name in os.environ}
pathlib.Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(told))
if sys.argv[2] == rank:
    sys.exit(3)
if sys.argv[2] != "none":
    time.sleep(float(sys.argv[3]))
"""
"""A rank that writes down what it was told; one of them fails, and the others would wait."""


class LauncherContract(Contract):
    """What a launcher must keep: every rank is started and told who it is, and one that fails ends them all.

    class TestMine(LauncherContract):
        name = "mine"
    """

    kind = "launch"
    seconds: ClassVar[float] = 60.0
    """In which ranks must have ended after one has failed."""

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.IMITATE, "data": str(kit.once("data", kit.data))}

    def launch(self, kit: Kit, count: int, fails: str = "none") -> tuple[int, Path]:
        """Start so many ranks; returns the exit code, and the folder that they write into. A single one may also be
        carried out in this process."""
        from rlhf.component import Context

        self.implementation(kit)
        plan = self.plan(kit, nproc=count)
        folder = kit.fresh("ranks")
        folder.mkdir()

        def run() -> int:
            (folder / "rank-0.json").write_text(json.dumps({"RANK": "0", "WORLD_SIZE": "1"}), encoding="utf-8")
            return 3 if fails == "0" else 0

        made = self.implementation(kit)(plan.launch.config, Context(plan=plan))
        return made.launch(run, [sys.executable, "-c", _RANK, str(folder), fails, str(2 * self.seconds)]), folder

    # The terms

    def test_a_single_rank(self, rlhf_kit: Kit) -> None:
        code, folder = self.launch(rlhf_kit, 1)
        require(code == 0, f"a rank that ended well gives the exit code {code}")
        require([path.name for path in folder.iterdir()] == ["rank-0.json"], "not just one rank was carried out")

    def test_every_rank_is_told_who_it_is(self, rlhf_kit: Kit) -> None:
        code, folder = self.launch(rlhf_kit, 2)
        require(code == 0, f"ranks that ended well give the exit code {code}")
        started = sorted(path.stem for path in folder.iterdir())
        require(started == ["rank-0", "rank-1"], f"of two ranks, {', '.join(started) or 'none'} was started")
        for rank in range(2):
            told = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
            lacking = {
                "RANK",
                "WORLD_SIZE",
                "LOCAL_RANK",
                "LOCAL_WORLD_SIZE",
                "MASTER_ADDR",
                "MASTER_PORT",
            } - told.keys()
            require(not lacking, f"rank {rank} isn't told {', '.join(sorted(lacking))}")
            require(told["WORLD_SIZE"] == "2", f"rank {rank} is told that it is one of {told['WORLD_SIZE']}, not of 2")

    def test_a_rank_that_fails_ends_the_run(self, rlhf_kit: Kit) -> None:
        """The others would wait for it for ever."""
        start = time.monotonic()
        try:
            code, _ = self.launch(rlhf_kit, 2, fails="1")
        except RunError:
            code = 1
        except Exception as error:
            broken(f"when a rank fails it raises {type(error).__name__}, not RunError: {error}")
        require(code != 0, "when a rank fails, the exit code is 0")
        took = time.monotonic() - start
        require(took <= self.seconds, f"when a rank fails, the other one goes on for {took:.0f} s")
