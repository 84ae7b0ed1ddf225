"""Whether each algorithm learns: the embedded example, a held-out score before and after, for several seeds; prints a
table.

    python tests/learns.py                              every algorithm, 3 seeds
    python tests/learns.py --only grpo,rloo --seeds 1   some of them

`answers` is the share of held-out sums that are answered right: of an online algorithm its own held-out reward; of an
offline one that of its model, sampled like the online ones'. What learns from preferences has the mean `margin` by
which it holds the held-out ones, in its loss's own units, and that must rise; the answers are shown, and may not: most
of these losses only part two answers, and may move both away from what is sampled. What trains a judge has the share
that it judges right.

Exit codes: 0 every score that must rise rose; 1 one did not; 2 the request was wrong.
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

import attrs

import rlhf_plugins.starter
from rlhf.entries import AlgorithmEntry
from rlhf.registry import load

STARTER = Path(rlhf_plugins.starter.__file__).parent
JUDGES = {"reward": ("judged right", "reward/accuracy"), "prm": ("judged right", "step/accuracy")}
"""Of those whose model judges: what, and the held-out metric."""
MARGIN = "reward/margin"
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


@attrs.frozen
class Score:
    """Before and after one run."""

    what: str
    before: float
    after: float
    rises: bool = True
    """Whether it must."""

    @property
    def rose(self) -> bool:
        return not self.rises or self.after > self.before


def scores(name: str, online: bool, seed: int, threads: int) -> list[Score]:
    """Of a run of little but the algorithm's name and the seed."""
    words = ["--algo", name, "--seed", str(seed)]
    if name in NEEDS:
        words += ["--model", f"teacher={teacher(NEEDS[name], seed, threads)[1]}"]
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder) / "run", threads, *words)
        before, after = found["heldout_before"], found["heldout_after"]
        if online:
            return [Score("answers", before["reward/mean"], after["reward/mean"])]
        if name in JUDGES:
            what, metric = JUDGES[name]
            return [Score(what, before[metric], after[metric])]
        answers = sampled(STARTER / "model", seed, threads), sampled(Path(folder) / "run" / "model", seed, threads)
        if MARGIN not in after:
            return [Score("answers", *answers)]
        return [Score("margin", before[MARGIN], after[MARGIN]), Score("answers", *answers, rises=False)]


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

    def rows(name: str) -> tuple[list[str], bool]:
        begun = time.monotonic()
        online = "rollouts" in known[name].requires
        by_seed = [scores(name, online, seed, threads) for seed in seeds]
        taken = time.monotonic() - begun
        found = []
        for of_all in zip(*by_seed, strict=True):
            cells = " | ".join(f"{score.before:.3f} to {score.after:.3f}" for score in of_all)
            found.append(f"| `{name}` | {of_all[0].what} | {cells} | {taken:.0f} |")
        return found, all(score.rose for of_seed in by_seed for score in of_seed)

    rose = True
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found: Iterator[tuple[list[str], bool]] = pool.map(rows, names)
        for lines, more in found:
            print(*lines, sep="\n", flush=True)
            rose &= more
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
