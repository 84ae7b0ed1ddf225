"""One process of a run that has vLLM in it: started by `test_engines_vllm`, with jobs in a file; what each finds goes
to a file of the rank's own."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf import facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.errors import RunError
from rlhf.loop import Loop
from rlhf.parts import Parts
from rlhf.place import here
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rundir import Onlooker, RunDirectory
from rlhf.sequences import Prompt, Sample


def loop_of(recipe: dict[str, Any], output: Path) -> Loop:
    place = here()
    plan = compose(from_mapping(recipe, "a test"), loaded(), facts.machine(place.size))
    parts = assemble(plan, lambda text: None)
    parts.trackers = []
    directory = RunDirectory(output) if place.rank == 0 else Onlooker(output)
    directory.open(plan)
    return Loop(parts, directory, lambda text: None)


def probed(parts: Parts, purpose: str) -> dict[str, float]:
    """Log-probs of fresh responses, the engine's beside the trainer's own forward's."""
    assert parts.sampler is not None
    prompts = parts.sampler.prompts(parts.prompts[:80])
    rollouts = parts.sampler.sample([Sample(prompt, count=6) for prompt in prompts], purpose)
    assert rollouts.logp is not None
    apart = (rollouts.logp - parts.score(rollouts, "policy").logp).abs()
    return {"largest": float(apart.max()), "mean": float(apart.mean()), "tokens": len(apart),
            "version": rollouts.version}  # fmt: skip


def gaps(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """After each of 5 steps."""
    loop = loop_of(recipe, output)
    try:
        loop._sync(0)
        found = [probed(loop.parts, "probe-0")]
        first = {name: tensor.clone() for name, tensor in loop.parts.backend.weights("policy")}
        for step in range(1, 6):
            loop._one_step()
            found.append(probed(loop.parts, f"probe-{step}"))
        moved = max(
            float((tensor - first[name]).abs().max())
            for name, tensor in loop.parts.backend.weights("policy")
            if tensor.is_floating_point()
        )
        return {"steps": found, "moved": moved, "way": loop.parts.sampler.engine._way}  # type: ignore[union-attr]
    finally:
        loop.directory.close()
        loop.parts.close()


def long_prompts(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """More tokens of prompts than vLLM computes at once; several share theirs."""
    loop = loop_of(recipe, output)
    try:
        loop._sync(0)
        parts, draw = loop.parts, torch.Generator().manual_seed(0)
        prompts = [Prompt(torch.randint(5, 300, (n,), generator=draw), parts.prompts[0][0], n) for n in range(280, 310)]
        assert parts.sampler is not None
        rollouts = parts.sampler.sample([Sample(prompt, count=2) for prompt in prompts], "long")
        assert rollouts.logp is not None
        apart = (rollouts.logp - parts.score(rollouts, "policy").logp).abs()
        return {"largest": float(apart.max()), "prompts": sum(len(prompt.tokens) for prompt in prompts)}
    finally:
        loop.directory.close()
        loop.parts.close()


def stale_head(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """As if a tied head were never packed anew."""
    from rlhf_plugins.engines.vllm import worker

    def keeps_the_first(model: torch.nn.Module) -> None:
        for part in model.modules():
            if type(part).__name__ == "ParallelLMHead":
                if not hasattr(part, "first"):
                    part.first = part.weight.detach().clone()
                part.cpu_linear = lambda x, weight, bias, first=part.first: torch.nn.functional.linear(x, first, bias)

    return _broken(recipe, output, functools.partial(setattr, worker, "repack_heads"), worker.repack_heads,
                   keeps_the_first)  # fmt: skip


def lost_weight(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """As if one matrix of a fused one never came; what the engine is compared with is whole."""
    from rlhf_plugins.engines.vllm import check, weights

    original, differing, lost = weights._merged, check.differing, [True]

    def without(module: Any, stream: Any) -> Any:
        for name, tensor in original(module, stream):
            here_now = lost[0] and name.endswith("layers.1.self_attn.v_proj.weight")
            yield name, torch.zeros_like(tensor) if here_now else tensor

    def with_all(*arguments: Any) -> Any:
        lost[0] = False
        return differing(*arguments)

    check.differing = with_all
    try:
        return _broken(recipe, output, functools.partial(setattr, weights, "_merged"), original, without)
    finally:
        check.differing = differing


def _broken(recipe: dict[str, Any], output: Path, put: Callable[[Any], None], right: Any, wrong: Any) -> dict[str, Any]:
    put(wrong)
    loop = loop_of(recipe, output)
    try:
        loop._sync(0)
        for _ in range(4):
            loop._one_step()
        return {"caught": "", "step": loop.step}
    except RunError as error:
        return {"caught": str(error), "step": loop.step}
    finally:
        put(right)
        loop.directory.close()
        loop.parts.close()


JOBS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "gaps": gaps, "long-prompts": long_prompts, "stale-head": stale_head, "lost-weight": lost_weight,
}  # fmt: skip


def main(file: str) -> None:
    content = json.loads(Path(file).read_text())
    folder, rank = Path(content["folder"]), here().rank
    found: dict[str, Any] = {}
    for name, job in content["jobs"].items():
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(job["port"])
        try:
            found[name] = JOBS[job["do"]](job["recipe"], folder / name)
        except Exception:  # told by the test that it is of; ranks are out of step after it, so no other follows
            found[name] = {"error": traceback.format_exc()[-3000:]}
            break
        finally:
            (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # without waiting for threads of a transport whose other end is gone
