"""Whether each algorithm learns: the embedded task, held-out score before and after, for several seeds; prints a table.

    python tests/learns.py                              every online algorithm, 3 seeds
    python tests/learns.py --only grpo,rloo --seeds 1   some of them

Exit codes: 0 every score rose; 1 one did not; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf.entries import AlgorithmEntry
from rlhf.registry import load


def online() -> list[str]:
    """Those that sample, of this distribution."""
    entries = (offer.entry for offer in load().offers if offer.kind == "algo" and offer.distribution == "rlhf-kit")
    return [e.name for e in entries if isinstance(e, AlgorithmEntry) and "rollouts" in e.requires]


def score(name: str, seed: int, words: list[str]) -> tuple[float, float]:
    """Held-out reward before and after one run of nothing but the algorithm's name and the seed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf", "run", "--algo", name, "--seed", str(seed), "--track", "none"]
        subprocess.run([*command, "--output", f"{folder}/run", *words], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return summary["heldout_before"]["reward/mean"], summary["heldout_after"]["reward/mean"]


def main() -> int:
    known = online()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(known), help="names, joined by commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    arguments, words = parser.parse_known_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {','.join(unknown)}: no such algorithm; there are {', '.join(known)}")
    print("| algorithm | seed | before | after | seconds |\n|---|---|---|---|---|", flush=True)
    rose = True
    for name in names:
        for seed in range(arguments.seeds):
            started = time.monotonic()
            before, after = score(name, seed, words)
            rose &= after > before
            print(f"| `{name}` | {seed} | {before:.3f} | {after:.3f} | {time.monotonic() - started:.0f} |", flush=True)
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
