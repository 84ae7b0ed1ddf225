"""Runs real commands, each in a process of its own, and writes down what they held: `python observe.py JOBS.json`.

What every run imports is imported once, before the processes part, so that a table takes minutes less.

Counts are of real tensors: weights when the models stand, gradients just before an optimiser step, the optimiser's
state just after it; of what is spread over ranks, the rank's own. The resident memory before the first model is the
process's own. Of several ranks each writes what it saw, and the largest of each number counts.

On a GPU it is the GPU's memory that counts: weights there, and the most that torch's allocator held.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf import assemble, cli, loop
from rlhf.cli.run import settle

IMPORTED = ("peft", "bitsandbytes", "transformers.models.llama.modeling_llama", "rlhf_plugins.policies.hf",
            "rlhf_plugins.engines.hf", "rlhf_plugins.memory.lora", "rlhf_plugins.memory.quantised")  # fmt: skip


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def weights(models: Any) -> int:
    """Of all modules, with what bitsandbytes keeps beside a packed weight, such as the magnitudes of its blocks."""
    found: list[torch.Tensor] = []
    for part in (*models.trained.modules(), *models.frozen.modules()):
        own = list(part.parameters(recurse=False))
        states = [getattr(parameter, "quant_state", None) for parameter in own]
        found += [held(parameter) for parameter in own]
        for state in filter(None, states):
            found += [state.absmax, state.code, *((state.offset, state.state2.absmax) if state.nested else ())]
        scales = [getattr(holder, "SCB", None) for holder in (*own, getattr(part, "state", None))]
        found += [scale for scale in scales if scale is not None]
    return nbytes(tensor for tensor in found if tensor.is_cuda == torch.cuda.is_available())


def held(parameter: Any) -> torch.Tensor:
    """What this rank has of it."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor  # type: ignore[no-any-return]
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data  # type: ignore[no-any-return]


def gradients(backend: Any, trained: Iterable[torch.Tensor]) -> int:
    if hasattr(backend, "_engine"):  # DeepSpeed's are in its own lists
        return nbytes(part for parts in backend._engine.optimizer.averaged_gradients.values() for part in parts or ())
    adder = getattr(backend, "_adder", None)
    if adder is not None:  # ddp's are on their way, in its buckets
        return nbytes(
            bucket.flat if bucket.flat is not None else parameter.grad
            for bucket in adder._buckets
            for parameter in bucket.parameters
            if bucket.flat is not None or parameter.grad is not None
        )
    return nbytes(held(parameter.grad) for parameter in trained if parameter.grad is not None)


def optimizer_state(backend: Any) -> int:
    optimizer = getattr(backend, "_base", None) or getattr(backend, "_optimizer", None) or backend._steps.optimizer
    maps = {"qmap1", "qmap2"}  # of adamw8bit: one table for all tensors, 2 KiB
    return nbytes(
        held(x)
        for state in optimizer.state.values()
        for name, x in state.items()
        if isinstance(x, torch.Tensor) and name not in maps
    )


def observed(out: str, arguments: list[str]) -> None:
    """Run it, and write what was seen."""
    seen: dict[str, Any] = {}
    build = assemble.build

    def built(plan: Any, policy: Any, backend: Any, optimizer: Any, context: Any) -> Any:
        seen["process"] = (
            torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        )
        models = build(plan, policy, backend, optimizer, context)
        seen["weights"] = weights(models)
        trained = [p for p in models.trained.parameters() if p.requires_grad]
        update = backend.update

        def updated(factor: float) -> Any:
            seen["gradients"] = gradients(backend, trained)
            result = update(factor)
            seen["optimizer"] = optimizer_state(backend)
            return result

        backend.update = updated
        return models

    start = loop.Loop.__init__

    def started(self: Any, parts: Any, *rest: Any) -> None:
        start(self, parts, *rest)
        prompts = [tokens for _, tokens in parts.prompts]
        responses = [parts.sampler.engine.config.max_new_tokens] if parts.sampler else []
        for rows in parts.data.rows if parts.data else ():
            prompts += [example.prompt for example in rows]
            responses += [len(example.response) for example in rows]
        seen["prompt"], seen["response"] = max(map(len, prompts)), max(responses)

    assemble.build, loop.Loop.__init__ = built, started  # type: ignore[assignment,method-assign]
    try:
        cli.main(arguments)
    finally:
        seen["peak"] = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else loop.peak_rss()
        Path(out).write_text(json.dumps(seen))


def main(jobs: str) -> None:
    """Each job is {"out": FILE, "arguments": [...], "ranks": COUNT}. One after the other; a line is printed as each
    ends."""
    settle()
    for name in IMPORTED:
        importlib.import_module(name)
    for job in json.loads(Path(jobs).read_text()):
        children = [parted(job, place) for place in places(job["ranks"])]
        print(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children), flush=True)


def places(ranks: int) -> list[dict[str, str]]:
    """What each rank finds in its environment."""
    if ranks == 1:
        return [{}]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "RLHF_STARTED_BY": "the planning table"}  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def parted(job: dict[str, Any], place: dict[str, str]) -> int:
    """A process for a rank of a job; returns its id, and in the process itself never."""
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)  # what the run itself prints
    os.environ.update(place)
    try:
        observed(f"{job['out']}.{place.get('RANK', 0)}", job["arguments"])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
