"""What a component makes of a module's memory. Each declares it in its entry, `footprint=...`, and the planner asks.

A footprint is a pure function from a module, as the components before it left it, to the module as it is then. The
usual ones are a line each:

    MemoryEntry(name="zero3", ..., footprint=divided("weights", "gradients", "optimizer"))
    MemoryEntry(name="offload", ..., footprint=on_host("weights", visits=True))
    MemoryEntry(name="ema", ..., footprint=copied("average of weights", bytes_each=4, of="trained"))
    MemoryEntry(name="fp16", ..., footprint=precision(trained=4, frozen=2, compute=2))
    OptimizerEntry(name="lion", ..., footprint=moments(4))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import attrs

from rlhf.planning.architecture import Architecture, Uncountable, Weight

if TYPE_CHECKING:
    from rlhf.plan import Component, Plan

T = TypeVar("T")
Part = Literal["weights", "gradients", "optimizer", "activations"]
"""What a module takes. Activations are what its forward keeps for the backward; on the host, those of them that are
kept layer by layer."""


@attrs.frozen(kw_only=True)
class ModuleMemory:
    """A role's own module: its weights, and what is done to them. Made from `config.json`, changed by footprints."""

    role: str
    trainable: bool
    scalar: bool
    """It ends in a number a position, not in a vocabulary."""
    architecture: Architecture
    weights: tuple[Weight, ...]
    compute: float = 4.0
    """Bytes of a number in matrix products. Less than that of a weight: products are autocast."""
    divided: Mapping[Part, int] = attrs.Factory(dict)
    """Part -> over how many devices it is spread; left out, each holds the whole."""
    host: frozenset[Part] = frozenset()
    """Parts that live in the host's memory."""
    visits: bool = False
    """Weights that live elsewhere come to the device while the module is at work, whole."""
    filed: bool = False
    """Between visits weights are in a file, and in nobody's memory."""
    recomputes: bool = False
    """Of each layer only the input is kept, and the backward computes the rest again."""
    inputs: frozenset[str] = frozenset()
    """Names of linear weights whose products keep their input, though neither they nor adapters of theirs ask for
    it."""
    unpacks: bool = False
    """Weights are packed, and unpacked to the precision of products for each product."""
    copies: Mapping[str, float] = attrs.Factory(dict)
    """Other buffers of its own, bytes by what they are, as long as the run; on its device, but for what begins with
    "host "."""

    @property
    def stream(self) -> float:
        """Bytes of a number between layers: those of the embedding."""
        return next(w.bytes_each for w in self.weights if w.kind == "embedding")

    def over(self, part: Part) -> int:
        """How many devices a part is spread over."""
        return self.divided.get(part, 1)

    @property
    def own(self) -> tuple[Weight, ...]:
        """Without those of another role's base."""
        return tuple(weight for weight in self.weights if not weight.borrowed)

    @property
    def trained(self) -> tuple[Weight, ...]:
        return tuple(weight for weight in self.weights if weight.trained)

    @property
    def saved_inputs(self) -> frozenset[str]:
        """Names of the linear weights whose input is kept for the backward: trained ones, those under adapters, and
        `inputs`."""
        asked = self.inputs | {w.name.rpartition(".")[0] for w in self.weights if w.kind == "adapter"}
        return frozenset({w.name for w in self.weights if w.kind == "linear" and (w.trained or w.name in asked)})


Footprint = Callable[["ModuleMemory", "Plan", "Component"], "ModuleMemory"]
"""Of a memory strategy or a backend: the module as it was, the plan, the component that declares it."""
StateBytes = Callable[[Weight, Any], float]
"""Of an optimiser: bytes that it keeps of one trained tensor (`weight.numel` numbers), given its options."""


def divided(*parts: Part) -> Footprint:
    """These parts are spread evenly over the ranks of the run. A weight is whole while its layer computes."""

    def of(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
        return attrs.evolve(module, divided={**module.divided, **dict.fromkeys(parts, ranks_of(plan))})

    return of


def on_host(*parts: Part, visits: bool = False) -> Footprint:
    """These parts live in the host's memory; a CPU's run has no other. `visits`: see `ModuleMemory`."""

    def of(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
        return attrs.evolve(module, host=module.host | set(parts), visits=visits or module.visits)

    return of


def on_disk(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
    """Weights lie in a file, and visit the device: see `ModuleMemory`."""
    return attrs.evolve(module, visits=True, filed=True)


def copied(what: str, *, bytes_each: float, of: Literal["trained", "all"] = "all") -> Footprint:
    """One more number for each weight, such as an average or a master.

    Args:
        what: it is, as the plan tells it.
        bytes_each: of a number.
        of: the trained weights, or all.
    """

    def made(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
        weights = module.trained if of == "trained" else module.own
        size = bytes_each * sum(weight.numbers for weight in weights) / module.over("weights")
        return attrs.evolve(module, copies={**module.copies, what: size})

    return made


def precision(*, trained: float, frozen: float, compute: float) -> Footprint:
    """Bytes of a weight where the role is trained and where it isn't, and of a number in matrix products. A scalar
    head stays in 4 bytes."""

    def of(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
        size = trained if module.trainable else frozen
        weights = tuple(w if w.kind == "score" else attrs.evolve(w, bytes_each=size) for w in module.weights)
        return attrs.evolve(module, weights=weights, compute=compute)

    return of


def recomputed(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
    """Gradient checkpointing: see `ModuleMemory.recomputes`."""
    return attrs.evolve(module, recomputes=True)


def unchanged(module: ModuleMemory, plan: Plan, component: Component) -> ModuleMemory:
    """It takes no memory and saves none; what a component that says nothing is not known to do."""
    return module


def moments(*bytes_each: float, beside: float = 0.0) -> StateBytes:
    """An optimiser that keeps one number of each of these sizes for a trained weight, and some bytes a tensor."""

    def of(weight: Weight, config: Any) -> float:
        return weight.numel * sum(bytes_each) + beside

    return of


def ranks_of(plan: Plan) -> int:
    """Processes of the run."""
    return max(plan.run.nproc, plan.machine.world_size)


def asked(component: Component, footprint: Callable[..., T], *arguments: Any) -> T:
    """What a footprint says.

    Raises:
        Uncountable: it failed; names the component. A plugin's fault must not end in a traceback.
    """
    try:
        return footprint(*arguments)
    except Exception as error:
        raise Uncountable(f"{component}: its footprint failed: {type(error).__name__}: {error}") from error


# What a step does


@attrs.frozen(kw_only=True)
class Passes:
    """What an algorithm does in a step, as far as memory and time go."""

    responses: int = 1
    """Sequences that a row or prompt becomes: 2 of a pair, more of a group."""
    grouped: bool = False
    """They share their prompt and stay in one micro-batch."""
    together: tuple[str, ...] | None = None
    """Roles whose activations are kept at once in the update; None: all that are trained."""
    scored: tuple[str, ...] | None = None
    """Roles that score the experience without gradient; None: all of an online algorithm, else the frozen ones."""
    once: bool = False
    """What is scored is kept and not scored again in later passes over the data."""
    epochs: int = 1
    """Passes of the update over a step's experience."""
    entropy: bool = False
    compared: bool = False
    """The update compares whole distributions with another model's: `score.divergence`."""


@attrs.frozen(kw_only=True)
class ForwardBatch:
    """The largest forward of a phase: rows of equal length."""

    rows: int
    """Sequences in it."""
    prompt: int
    """Tokens."""
    response: int
    group: int = 1
    """Sequences that share a prompt."""
    gradient: bool
    scored: bool = True
    """Log-probs or numbers of response tokens are read; False where it only samples."""
    entropy: bool = False
    compared: bool = False

    @property
    def tokens(self) -> int:
        """Padded."""
        return self.rows * (self.prompt + self.response)


@attrs.frozen(kw_only=True)
class Activations:
    """Bytes of a forward, and of its backward where there is one."""

    kept: float
    """For the backward, from the forward's end until it has passed."""
    working: float
    """The most that is alive besides, at any one moment in the layers."""
    head: float
    """The most at the head: logits, their softmax and gradient, of one chunk."""
    host: float = 0.0
    """Kept for the backward in the host's memory."""


PolicyFootprint = Callable[[ModuleMemory, ForwardBatch, "Plan", "Component"], Activations]
EngineFootprint = Callable[[ModuleMemory, ForwardBatch, "Plan", "Component"], Mapping[str, float]]
"""Bytes that an engine takes for so many responses at once, by what they are; "KV cache" and "logits" among them. What
begins with "resident " is held for the whole run, such as an engine's own copy of the weights."""
AlgorithmFootprint = Callable[[Any], Passes]
"""From its options."""
