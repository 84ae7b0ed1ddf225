"""How the C library hands out memory, which on a CPU decides a sixth to a quarter of a step's time.

glibc returns every large block to the system as soon as it is freed. The next tensor of that size then has each of its
pages cleared and mapped anew: for a [512, 49152] matrix of logits that takes five times as long as computing it. So
where training is on the CPU, large blocks are kept and reused, in huge pages. Measured on a 135M model (bfloat16, two
cores): PPO and DPO steps 1.2 to 1.3 times as fast, peak memory 3 to 8 percent higher.

glibc reads its tunables when a process starts, so the command starts itself once more, in the same process id. Whoever
sets GLIBC_TUNABLES, even to nothing, is asked nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
_TRAINS = ("run", "pipeline", "eval")


def restart_with_tunables(arguments: Sequence[str]) -> None:
    """Replace this process by itself with the tunables set; returns where that would change nothing."""
    if not arguments or arguments[0] not in _TRAINS or {"-h", "--help", "--dry-run"} & set(arguments):
        return
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or os.environ.get("LD_PRELOAD"):
        return  # another allocator is preloaded
    if os.path.exists("/dev/nvidiactl"):
        return  # there, what is loaded on its way to the GPU should go back to the system
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": TUNABLES})
