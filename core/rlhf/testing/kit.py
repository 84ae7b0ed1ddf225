"""What contracts work with: a folder, what is installed, a tiny model and its data, plans, and runs at work.

Plans are made for a machine that no test runs on: two cores, no GPU, no bfloat16. So the numbers are of fp32, and what
the registry ranks highest among the legal is what a component is tested beside.
"""

from __future__ import annotations

import functools
import json
import random
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf import registry as registries
from rlhf.assemble import assemble
from rlhf.checkpoint import from_json, to_json
from rlhf.compose import compose
from rlhf.errors import Interrupted
from rlhf.facts import Machine
from rlhf.floor import Peaks
from rlhf.loop import Loop, resume_from
from rlhf.parts import Parts, reseed
from rlhf.plan import Plan
from rlhf.recipe import from_mapping
from rlhf.rundir import RunDirectory
from rlhf.testing import parts as own
from rlhf.testing.model import BAD, GOOD, write_model

MACHINE = Machine(cpus=2, cpu_flags=frozenset(), memory_bytes=8 << 30, gpus=(), world_size=1)
_OF_THE_MACHINE = ("time/", "perf/", "memory/")
_ROWS = 32


class Kit:
    """One a session of pytest; what is costly is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[Any, Any] = {}
        """What contracts keep from one test to the next."""
        self._count = 0

    @functools.cached_property
    def registry(self) -> registries.Registry:
        """What is installed, and the kit's own parts."""
        found = registries.load()
        for entry in own.entries():
            found.add(entry, registries._Source("kit", "rlhf.testing", "of the kit"))
        return found

    @functools.cached_property
    def model(self) -> Path:
        """A model folder with tokenizer and chat template. Not to be written to."""
        return write_model(self.folder / "model")

    @functools.cached_property
    def scalar_model(self) -> Path:
        """The like with a scalar head, as a reward model has. Not to be written to."""
        return write_model(self.folder / "scalar-model", seed=1, scalar=True)

    def fresh(self, name: str) -> Path:
        """A folder that isn't there yet."""
        self._count += 1
        return self.folder / f"{self._count:03d}-{name}"

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under this key, or is made now."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    def data(self, records: Iterable[Mapping[str, Any]] | None = None) -> Path:
        """A data file of these records; left out, of rows that every row type of `rlhf.rows` can be made of."""
        lines = [json.dumps(record) for record in (default_records() if records is None else records)]
        path = self.fresh("data").with_suffix(".jsonl")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """Compose a recipe, on the tiny model unless it names another.

        Raises:
            RequestError: it isn't legal.
        """
        base = {"model": str(self.model), "max_steps": 2, "batch_size": 8, "eval_rows": 0, "track": "none",
                "save_every": 1000, "micro_batch_tokens": 4096}  # fmt: skip
        return compose(from_mapping({**base, **recipe}, "the kit's recipe"), self.registry, MACHINE)

    def work(self, plan: Plan, folder: Path | None = None, change: Callable[[Parts], None] | None = None) -> Work:
        """A plan at work."""
        return Work(plan, folder or self.fresh("run"), change)


def default_records(count: int = _ROWS) -> list[dict[str, Any]]:
    """Prompts of letters, each with a completion of good letters and one of bad ones: a prompt to sample from, a
    completion to learn, a pair to prefer by, a label that is right, steps of which one is."""
    rng = random.Random(0)

    def word(letters: str, most: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, most)))

    rows: list[dict[str, Any]] = []
    for i in range(count):
        good, bad, label = word(GOOD, 5), word(BAD, 5), i % 2 == 0
        chosen = {"chosen": good, "rejected": bad, "completion": good if label else bad, "label": label}
        steps = {"steps": [good, bad] if label else [bad, good], "labels": [label, not label]}
        rows.append({"prompt": word("mnopqrst", 7) + " ", **chosen, **steps, "answer": good})
    return rows


@attrs.frozen
class Done:
    """What a run has left."""

    metrics: list[dict[str, float]]
    """By step, without those that depend on the machine."""
    weights: dict[str, Tensor]
    """What is trained, by name."""
    said: list[str]


class _Stops:
    """Hears of a run and stops it after a step, as a signal would."""

    def __init__(self, loop: Loop, after: int) -> None:
        self._loop, self._after = loop, after

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *arguments: None

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._after:
            self._loop._stop = signal.SIGTERM


class Work:
    """A run as `rlhf run` carries it out, in this process, without measuring the machine."""

    def __init__(self, plan: Plan, folder: Path, change: Callable[[Parts], None] | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.said: list[str] = []
        reseed(0)
        self.parts = assemble(plan, self.said.append)
        if change is not None:
            change(self.parts)

    def go(self, resume: bool = False, stop_after: int | None = None) -> Done:
        """Carry it out, or a part of it.

        Args:
            resume: go on from the folder's checkpoint.
            stop_after: save a checkpoint after so many steps, and stop.
        """
        directory = RunDirectory(self.folder)
        directory.open(self.plan)
        try:
            found = resume_from(directory, self.said.append) if resume else None
            if resume:
                directory.cut_back(found[1]["loop"]["step"] if found else 0)
            loop = Loop(self.parts, directory, self.said.append)
            loop._measure = lambda: None  # type: ignore[method-assign]
            loop._peaks = Peaks(dict.fromkeys(("float32", "bfloat16", "float16"), 1e12), 1e10)
            if stop_after is not None:
                loop._trackers.append(_Stops(loop, stop_after))  # type: ignore[arg-type]
            try:
                loop.run(found[1] if found else None)
            except Interrupted:
                if stop_after is None:
                    raise
        finally:
            directory.close()
        return Done(metrics_of(self.folder), self.weights(), self.said)

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by name; copies."""
        named = self.parts.models.trained.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """By step, without those that depend on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(_OF_THE_MACHINE)} for line in lines]


def written_and_read(state: Any) -> Any:
    """A component's state as a checkpoint gives it back.

    Raises:
        TypeError: it holds what a checkpoint can't: neither JSON's values nor tensors.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(to_json(state, "", tensors)))
    return from_json(tree, {name: tensor.detach().clone() for name, tensor in tensors.items()})


def same(a: Any, b: Any) -> bool:
    """Nested dicts and lists of JSON values and tensors, equal to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)
