"""Modules as their components make them, and what there is to say of their bytes: by role, by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from rlhf.entries import (
    AlgorithmEntry,
    BackendEntry,
    MemoryEntry,
    OptimizerEntry,
)
from rlhf.plan import Plan, RolePlan
from rlhf.planning.architecture import Uncountable, Weight, architecture
from rlhf.planning.footprint import ModuleMemory, Passes, asked, moments, ranks_of

Phase = Literal["load", "rollout", "reward", "experience", "update", "save"]
PHASES: tuple[Phase, ...] = ("load", "rollout", "reward", "experience", "update", "save")
PROCESS_BYTES = 0.5 * 2**30
"""Of a process before its first model: Python, torch, transformers, peft. On a GPU about as much is its context's."""
SLACK = 0.05
"""Of a GPU's peak, lost between the blocks of an allocator: what PyTorch's usually reserves beyond what it has given
out. Not measured here."""
GAPS = 1 / 6
"""On a CPU, of what comes and goes: what its heap grows by where a block fits into none of the gaps that others left.
In runs of a 135M model, adapters trained, 16 to 18 hundredths of activations and logits; weights and moments come
once."""


@attrs.frozen(kw_only=True)
class Lengths:
    """Of the sequences that a plan is made for. Data isn't read."""

    prompt: int
    """Tokens."""
    response: int


@attrs.frozen(kw_only=True)
class RoleBytes:
    """What one role takes on one device, in bytes."""

    role: str
    module: str
    parameters: int
    """Numbers; of a role without a module of its own 0."""
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward of one micro-batch; of a frozen role what its forward has alive at once."""
    head: float
    """Logits of a chunk, their softmax and gradient."""
    other: float
    """Copies that a component keeps, such as an average."""
    host: tuple[str, ...] = ()
    """Parts that live in the host's memory."""
    sharding: str = "replicated"


@attrs.frozen(kw_only=True)
class PhaseBytes:
    """The most that is alive at once in a phase, by what it is; on the device, and on the host beside it."""

    phase: Phase
    device: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


@attrs.frozen(kw_only=True)
class Memory:
    """The prediction, of one device of as many as there are ranks."""

    lengths: Lengths
    ranks: int
    cpu: bool
    """There is no memory but the host's."""
    roles: tuple[RoleBytes, ...]
    phases: tuple[PhaseBytes, ...]
    missing: tuple[str, ...]
    """Roles that couldn't be counted."""
    notes: tuple[str, ...]
    """Why not, and what else is not known."""

    @property
    def peak(self) -> PhaseBytes:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak_bytes(self) -> float:
        """With what an allocator loses; without the process's own."""
        return self.peak.total * (1 if self.cpu else 1 + SLACK)

    @property
    def needed(self) -> float:
        """Of a device's memory, or on a CPU of a process's share of the machine's."""
        return self.peak_bytes + PROCESS_BYTES


@attrs.frozen
class Counted:
    """The modules of a plan."""

    modules: dict[str, ModuleMemory]
    """By the role that owns it, or has adapters of its own on another's."""
    missing: tuple[str, ...]
    """Roles whose module can't be counted."""
    notes: list[str]
    """Why, and which components tell no footprint."""


def assumed_lengths(plan: Plan) -> Lengths:
    """Prompts of 512 tokens and responses of the engine's limit, or 512, as far as the model's context holds them."""
    context = min((role.model.context or 1 << 30 for role in plan.roles), default=1 << 30)
    asked = getattr(plan.engine.config, "max_new_tokens", None) if plan.engine else None
    response = min(int(asked) if asked else 512, max(1, context - 1))
    return Lengths(prompt=max(1, min(512, context - response)), response=response)


def modules(plan: Plan) -> Counted:
    """Every module of the plan as its strategies and the backend make it."""
    found: dict[str, ModuleMemory] = {}
    notes: list[str] = []
    missing: list[str] = []
    for role in plan.roles:
        if role.chooses:
            try:
                made = _made(role, plan, notes)
                found[role.name] = made if role.view == "own" else _joined(made)
            except Uncountable as error:
                notes.append(f"role {role.name}: {error}")
                missing.append(role.name)
    for role in plan.roles:
        if role.view == "trunk" and role.module in found:
            found[role.module] = _with_head(found[role.module], role)
    return Counted(found, tuple(missing), list(dict.fromkeys(notes)))


def _made(role: RolePlan, plan: Plan, notes: list[str]) -> ModuleMemory:
    module = _fresh(role)
    for component in (*role.mem, plan.backend):
        entry = component.entry
        assert isinstance(entry, MemoryEntry | BackendEntry)
        if entry.footprint is None:
            notes.append(f"{component}: tells no footprint; counted as if it changed nothing")
        else:
            module = asked(component, entry.footprint, module, plan, component)
    assert isinstance(plan.optim.entry, OptimizerEntry)
    if plan.optim.entry.state_on_host and module.trainable:
        module = attrs.evolve(module, host=module.host | {"optimizer"})
    return module


def _joined(module: ModuleMemory) -> ModuleMemory:
    """Of a module made for a role with adapters and a head of its own on another's base: no original is kept beside
    the head."""
    heads = [w for w in module.weights if w.kind == "score"]
    return attrs.evolve(module, weights=(*(w for w in module.weights if w.kind != "score"), *heads[-1:]))


def holder(role: RolePlan) -> str:
    """The role whose module, in `Counted.modules`, a forward of this one is."""
    return role.name if role.view == "adapter" else role.module


def _fresh(role: RolePlan) -> ModuleMemory:
    """A module as it is loaded where no strategy says otherwise: in float32, all of it trained where the role is; on
    another's base, the head alone is its own."""
    counted = architecture(role.model)
    scalar = role.role.head == "scalar"
    weights = [w for w in counted.weights if not (scalar and w.kind == "head")]
    if scalar:
        weights.append(Weight(name="score", shape=(1, counted.hidden), kind="score"))
    return ModuleMemory(
        role=role.name,
        trainable=role.role.trainable,
        scalar=scalar,
        architecture=counted,
        weights=tuple(
            attrs.evolve(w, trained=False, borrowed=True)
            if role.view == "adapter" and w.kind != "score"
            else attrs.evolve(w, trained=role.role.trainable)
            for w in weights
        ),
    )


def _with_head(module: ModuleMemory, role: RolePlan) -> ModuleMemory:
    """A scalar head, or one of tokens, on another role's trunk."""
    width = module.architecture.hidden
    if role.role.head == "tokens":
        shape = (module.architecture.vocabulary, width)
        of_tokens = Weight(name=f"{role.name}.weight", shape=shape, kind="score", trained=role.role.trainable)
        return attrs.evolve(module, weights=(*module.weights, of_tokens))
    head = [
        Weight(name=f"{role.name}.weight", shape=(1, width), kind="score", trained=role.role.trainable),
        Weight(name=f"{role.name}.bias", shape=(1,), kind="score", trained=role.role.trainable),
    ]
    return attrs.evolve(module, weights=(*module.weights, *head))


def passes_of(plan: Plan) -> Passes:
    """What the algorithm says of its step; of one that says nothing, the usual."""
    assert isinstance(plan.algo.entry, AlgorithmEntry)
    told = plan.algo.entry.footprint
    return asked(plan.algo, told, plan.algo.config) if told is not None else Passes()


def optimizer_bytes(plan: Plan, weight: Weight) -> float:
    """State of all the tensors of a trained weight, on one device that has the whole."""
    entry = plan.optim.entry
    assert isinstance(entry, OptimizerEntry)
    told = entry.footprint or moments(4.0, 4.0)
    return weight.count * asked(plan.optim, told, weight, plan.optim.config)


def step_bytes(plan: Plan, weights: Iterable[Weight]) -> float:
    """The most that the optimiser's step takes besides, on a CPU: tensors are changed one after the other."""
    entry = plan.optim.entry
    assert isinstance(entry, OptimizerEntry)
    told = entry.at_work
    if told is None:
        return 0.0
    return max((asked(plan.optim, told, weight, plan.optim.config) for weight in weights), default=0.0)


def micro_batch(plan: Plan, lengths: Lengths, *, gradient: bool) -> tuple[int, int]:
    """(sequences of a forward, forwards of a step), as the run cuts them: padded tokens up to the limit, a unit at
    least. Rows are dealt over the ranks."""
    passes = passes_of(plan)
    each = lengths.prompt + lengths.response
    unit = passes.responses if passes.grouped and gradient else 1
    rows = -(-plan.run.batch_size // ranks_of(plan)) * passes.responses
    if gradient:
        rows = -(-rows // max(1, int(getattr(plan.algo.config, "minibatches", 1))))
    most = max(plan.run.micro_batch_tokens // (each * unit), 1) * unit
    size = min(rows, most)
    return size, -(-rows // size)


def judges_of(plan: Plan) -> tuple[str, ...]:
    """Roles that rewards ask for."""
    found: list[str] = []
    for component in plan.rewards:
        roles = component.entry.roles
        asked = roles(component.config) if callable(roles) else roles
        found += [component.label or role.name for role in asked]
    return tuple(role.name for role in plan.roles if role.name in found)


def scored_roles(plan: Plan) -> tuple[str, ...]:
    """Roles that score the experience without gradient."""
    told = passes_of(plan).scored
    if told is not None:
        return tuple(role.name for role in plan.roles if role.name in told)
    judges = judges_of(plan)
    return tuple(r.name for r in plan.roles if r.name not in judges and (plan.online or not r.role.trainable))
