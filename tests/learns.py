"""Whether each algorithm learns: the embedded example, a held-out score before and after, for several seeds; prints a
table.

    python tests/learns.py                              every algorithm, 3 seeds
    python tests/learns.py --only grpo,rloo --seeds 1   some of them

The score is the share of held-out sums that are answered right: of an online algorithm its own held-out reward; of an
offline one that of its model, sampled like the online ones'. What trains a judge has its held-out accuracy.

Exit codes: 0 every score rose; 1 one did not; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rlhf_plugins.starter
from rlhf.entries import AlgorithmEntry
from rlhf.registry import load

STARTER = Path(rlhf_plugins.starter.__file__).parent
JUDGES = {"reward": "reward/accuracy", "prm": "step/accuracy"}
"""Of those whose model judges: the held-out metric."""
NEEDS = {"distill": "sft", "distill-offline": "sft"}
"""Those that learn from a teacher -> what the teacher is trained by: the example has no larger model."""


def algorithms() -> dict[str, AlgorithmEntry]:
    """By name, of this distribution."""
    entries = (offer.entry for offer in load().offers if offer.kind == "algo" and offer.distribution == "rlhf-kit")
    return {entry.name: entry for entry in entries if isinstance(entry, AlgorithmEntry)}


def run(folder: Path, threads: int, *words: str) -> dict[str, Any]:
    """The summary of a run."""
    command = [sys.executable, "-m", "rlhf", "run", *words, "--track", "none", "--output", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@functools.cache
def sampled(model: Path, seed: int, threads: int) -> float:
    """Share of the held-out sums that a model answers right: an online run's held-out reward before its first step."""
    data = ["--data", f"{STARTER}/data/prompts_train.jsonl", "--eval-data", f"{STARTER}/data/prompts_eval.jsonl"]
    words = ["--algo", "reinforce++", "--model", str(model), *data, "--reward", "answer", "--seed", str(seed)]
    few = ["--engine.max-new-tokens", "8", "--max-steps", "1", "--batch-size", "8"]
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder) / "run", threads, *words, *few)
    return float(found["heldout_before"]["reward/mean"])


@functools.cache
def teacher(algo: str, seed: int, threads: int) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """(what removes it when it is forgotten, its folder)."""
    kept = tempfile.TemporaryDirectory()
    run(Path(kept.name) / "run", threads, "--algo", algo, "--seed", str(seed))
    return kept, Path(kept.name) / "run" / "model"


def score(name: str, online: bool, seed: int, threads: int) -> tuple[float, float]:
    """Before and after one run of little but the algorithm's name and the seed."""
    words = ["--algo", name, "--seed", str(seed)]
    if name in NEEDS:
        words += ["--model", f"teacher={teacher(NEEDS[name], seed, threads)[1]}"]
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder) / "run", threads, *words)
        before, after = found["heldout_before"], found["heldout_after"]
        if online or name in JUDGES:
            measure = JUDGES.get(name, "reward/mean")
            return before[measure], after[measure]
        return sampled(STARTER / "model", seed, threads), sampled(Path(folder) / "run" / "model", seed, threads)


def main() -> int:
    known = algorithms()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(known), help="names, joined by commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="algorithms at once, which share the cores (1)")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {','.join(unknown)}: no such algorithm; there are {', '.join(known)}")
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    seeds = range(arguments.seeds)
    print("| algorithm | score | " + " | ".join(f"seed {seed}" for seed in seeds) + " | seconds |")
    print("|---|---|" + "---|" * len(seeds) + "---:|", flush=True)

    def row(name: str) -> tuple[str, bool]:
        begun = time.monotonic()
        online = "rollouts" in known[name].requires
        found = [score(name, online, seed, threads) for seed in seeds]
        cells = " | ".join(f"{before:.3f} to {after:.3f}" for before, after in found)
        what = JUDGES.get(name, "answers")
        return f"| `{name}` | {what} | {cells} | {time.monotonic() - begun:.0f} |", all(b < a for b, a in found)

    rose = True
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows: Iterator[tuple[str, bool]] = pool.map(row, names)
        for text, more in rows:
            print(text, flush=True)
            rose &= more
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
