"""Make models and rows, in a process of its own: what has loaded torch is too large to be the parent of what is
measured, since a child's peak memory begins with its parent's.

    python -m stepbench.prepare SPEC.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rlhf.data import Feed
from rlhf.peaks import measure
from rlhf_plugins.functional.packing import pack
from stepbench import models, rows
from stepbench.cases import DTYPES, FULL, QUICK, cases


def main(spec_path: str) -> None:
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    work = Path(spec["work"])
    scale = QUICK if spec["quick"] else FULL
    if spec["model"]:
        model = Path(spec["model"])
    else:
        make = models.tiny if spec["quick"] else models.smollm2
        model = models.once(work / "models" / make.__name__, make)
    key = f"{model.name}-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]}"  # two may be of one name
    ppo = models.once(work / "models" / f"{key}-endless", models.endless, model)
    frozen = DTYPES[spec["dtype"]]
    reward = models.once(work / "models" / f"{key}-reward-{frozen}", partial(models.reward, frozen), ppo)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    items: dict[str, list[int]] = {}  # tokens of the packed items of a case, in order
    for case in (case for case in cases(scale) if case.name in spec["cases"]):
        given = spec["data"].get(case.rows)
        if given:
            found = rows.read(Path(given), case.rows, scale.max_length, count)
        else:
            found = rows.rows(case.rows, scale, spec["seed"], count)
        steps = case.warmup + spec["cases"][case.name]
        taken = rows.enough(found, case.batch, steps, scale.max_length if case.packed else None, count)
        folder = work / "rows"
        folder.mkdir(exist_ok=True)
        rows.write(folder / f"{case.name}.jsonl", taken)
        if case.packed:  # both sides pack these, so that TRL is told the items' order instead of the rows'
            lengths = [count("".join(row.values())) + 1 for row in taken]
            packed = [sum(lengths[i] for i in item) for item in pack(lengths, scale.max_length)]
            items[case.name] = [packed[i] for i in order(len(packed), case.batch, steps, spec["seed"])]
            rows.write(folder / f"{case.name}-trl.jsonl", taken)
        else:
            found_order = order(len(taken), case.batch, steps, spec["seed"])
            rows.write(folder / f"{case.name}-trl.jsonl", [taken[i] for i in found_order])
    peaks = measure("cpu", ("bfloat16", "float32"))
    result = {
        "models": {"model": str(model), "ppo": str(ppo), "reward": str(reward)},
        "items": items,
        "peaks": {"flops": dict(peaks.flops), "bandwidth": peaks.bandwidth},
    }
    Path(spec["result"]).write_text(json.dumps(result))


def order(count: int, batch: int, steps: int, seed: int) -> list[int]:
    """The order in which our loop takes so many items."""
    feed = Feed(count, batch, seed, steps)
    return [item for step in range(steps) for item in feed.rows(step)]


if __name__ == "__main__":
    main(*sys.argv[1:])
