"""Planned seconds beside measured ones: each phase of a step, on a model of SmolLM2-135M's shape.

    python tests/planning/times.py [--only NAME ...]

Each case is a run of the real command, of which the first steps, that touch memory for the first time, don't count; the
plan is told the run's own peaks and lengths. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
from truth import SMOLLM2, Case, Scale, arguments, make_model

CASES = (
    Case("sft", "fp32"),
    Case("sft", "bf16"),
    Case("sft", "fp32,checkpointing"),
    Case("sft", "fp32,lora"),
    Case("dpo", "fp32"),
    Case("dpo", "fp32,lora"),
    Case("reward", "fp32"),
    Case("ppo", "fp32"),
    Case("ppo", "fp32,lora"),
    Case("sft", "fp32", ("--backend", "ddp"), ranks=2),
    Case("sft", "fp32,zero3", ranks=2),
)
PHASES = ("rollout", "reward", "experience", "update")
SCALE = Scale(rows=4, words=32, steps=6)
_FIRST = 3
"""Steps that don't count."""


@attrs.frozen
class Times:
    """Of a case, in seconds by phase."""

    case: Case
    planned: dict[str, float]
    measured: dict[str, float]
    floor_ratio: float

    @property
    def ratio(self) -> float:
        """Planned to measured: above 1 where the plan says more."""
        return sum(self.planned.values()) / sum(self.measured.values())


def _rlhf(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "rlhf", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"rlhf {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def lengths(case: Case, model: Path, scale: Scale) -> dict[str, int]:
    """Tokens of a prompt and of a response: rows are of one length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "1 " * scale.words
    prompt = len(tokenizer(text.strip()).input_ids)
    return {"prompt": prompt, "response": scale.words if case.algo == "ppo" else len(tokenizer(text).input_ids) + 1}


def measure(case: Case, model: Path, folder: Path, scale: Scale) -> Times:
    """
    Raises:
        RuntimeError: a command failed.
    """
    words = arguments(case, model, folder, scale)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        output = Path(fresh) / "run"
        _rlhf("run", *words, "--output", str(output), "--track", "none")
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][_FIRST:]
        known = [word for name, n in lengths(case, model, scale).items() for word in (f"--{name}-tokens", str(n))]
        plan = json.loads(_rlhf("plan", *words, "--peaks", str(output), *known, "--json"))
    planned = plan["prediction"]["seconds"]["phases"]
    return Times(
        case=case,
        planned={phase: planned.get(phase, 0.0) for phase in PHASES},
        measured={phase: statistics.median(step[f"time/{phase}"] for step in steps) for phase in PHASES},
        floor_ratio=statistics.median(step["perf/floor_ratio"] for step in steps),
    )


def table(found: Sequence[Times]) -> Iterator[str]:
    """Markdown."""
    yield (
        "| case | " + " | ".join(f"{phase}, planned / measured" for phase in PHASES) + " | step | ratio | floor ratio |"
    )
    yield "|---|" + "---|" * len(PHASES) + "---|---|---|"
    for times in found:
        cells = [_pair(times.planned[phase], times.measured[phase]) for phase in PHASES]
        whole = _pair(sum(times.planned.values()), sum(times.measured.values()))
        yield f"| {times.case.name} | {' | '.join(cells)} | {whole} | {times.ratio:.2f} | {times.floor_ratio:.1f} |"


def _pair(planned: float, measured: float) -> str:
    return f"{planned:.2f} / {measured:.2f}" if planned or measured > 0.005 else ""


def main() -> int:
    """All cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases by name")
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model", SMOLLM2)
        for case in CASES:
            if not asked.only or case.name in asked.only:
                found.append(measure(case, model, folder, SCALE))
                print(list(table(found))[-1], file=sys.stderr, flush=True)
    print(*table(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
