"""`rlhf` with a vLLM beside it that is killed in the middle of rollouts: started by `test_engines_vllm_lost` as

python vllm_killed.py FOLDER KILLS rlhf's own arguments

Each engine kills its process at the fourth token of its second rollout: the first that it owes since the one before it
was killed, it delivers. A kill is the operating system's: nothing in the process hears of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_plugins.engines.vllm.sampler import Answer, Ask, Settings

AT = 4
"""Steps of vLLM, each a token of every response."""


def dying(settings: Settings) -> Any:
    """The real vLLM, but for that."""
    from rlhf_plugins.engines.vllm.inside import InProcess

    class Dying(InProcess):
        rollouts = 0

        def sample(self, asks: Sequence[Ask]) -> list[Answer]:
            self.rollouts += 1
            steps, own = 0, self._llm.llm_engine.step

            def step() -> Any:
                nonlocal steps
                steps += 1
                if steps == AT and self.rollouts == 2:
                    self.die()
                return own()

            self._llm.llm_engine.step = step
            try:
                return super().sample(asks)
            finally:
                self._llm.llm_engine.step = own

        def die(self) -> None:
            folder, kills = os.environ["KILLS"].split(":")
            killed = list(Path(folder).iterdir())
            if len(killed) < int(kills):
                (Path(folder) / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)

    return Dying(settings)


if __name__ == "__main__":
    from rlhf import cli
    from rlhf_plugins.engines.vllm import places

    os.environ["KILLS"] = f"{sys.argv[1]}:{sys.argv[2]}"
    places.Beside = partial(places.Beside, sampler="vllm_killed:dying")  # type: ignore[misc,assignment]
    cli.main(sys.argv[3:])
