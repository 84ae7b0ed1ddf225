"""One rank that carries out runs one after another, so that the libraries are imported once: started by `warm.Ranks`,
told what to do by lines of JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch


def carry_out(job: dict[str, Any], place: Any) -> dict[str, Any]:
    from rlhf import assemble as assembly
    from rlhf import facts, rank
    from rlhf.compose import compose
    from rlhf.recipe import from_mapping
    from rlhf.registry import loaded

    plan = compose(from_mapping(job["recipe"], "a test"), loaded(), facts.machine(place.size))
    if job.get("probe"):
        sys.path.append(str(Path(__file__).parent / "distributed"))
        import sharded_probes as probes

        parts = assembly.assemble(plan, print if place.rank == 0 else lambda text: None)
        found: dict[str, Any] = getattr(probes, job["probe"])(parts)
        return found
    rank._run(rank.Job(plan, Path(job["output"]), job["resume"]), place, lambda text: None)
    return {}


def main() -> None:
    from rlhf.place import here
    from rlhf.world import Ranks

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Ranks.close = lambda self: None  # type: ignore[method-assign]  # the next run meets in the same groups
    place = here()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever is printed meanwhile
    for line in sys.stdin:
        try:
            answer = carry_out(json.loads(line), place)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
