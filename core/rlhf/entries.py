"""What a plugin offers: small frozen descriptions, made without importing torch.

A plugin's entry module yields these from its hooks (`rlhf.hooks`). An entry says everything that composition needs:
what the component provides, requires and excludes, its options, and where its implementation is. The implementation
is imported only after the plan is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from rlhf import API_VERSION

if TYPE_CHECKING:
    from rlhf.errors import Problem
    from rlhf.plan import Component, Plan
    from rlhf.planning.footprint import AlgorithmFootprint, EngineFootprint, Footprint, PolicyFootprint, StateBytes

Head = Literal["lm", "scalar", "tokens"]
"""`lm`: log-probs of tokens. `scalar`: one number a position; read at each token (values) or at the last (a score).
`tokens`: one number for each token of the vocabulary, such as its Q value; on another role's trunk alone."""


@attrs.frozen
class Follows:
    """Frozen weights that run after trained ones: w + rate (trained - w), after each `every`-th optimiser step."""

    role: str
    """The trained one: a head of the same sort on the same trunk, of which this role starts as a copy; or a whole
    model, as which it starts unless it is given one of its own."""
    rate: float = 1.0
    """1 copies; small ones are Polyak averages."""
    every: int = 1
    """Optimiser steps."""


@attrs.frozen
class Role:
    """A logical model that an algorithm or a reward asks for. Which module serves it is the plan's business."""

    name: str
    """An open name: policy, reference, value, reward, teacher, q, ..."""
    trainable: bool = attrs.field(default=False, kw_only=True)
    head: Head = attrs.field(default="lm", kw_only=True)
    start: str = attrs.field(default="model", kw_only=True)
    """Where the weights come from when the user gives no `--model ROLE=PATH`: "model" is the run's `--model`; another
    role's name is that role's start; "given" means that the user must give it."""
    shares: str | None = attrs.field(default=None, kw_only=True)
    """A role whose trunk this one uses, bringing only a head of its own. Both must be trainable or both frozen, but
    for a frozen head that `follows` a trained one."""
    learning_rate: float | None = attrs.field(default=None, kw_only=True)
    """Overrides the optimiser's for this role's own parameters."""
    head_init: Literal["keep", "zero", "normal"] = attrs.field(default="keep", kw_only=True)
    """How a scalar head that the checkpoint doesn't have starts: "zero", or "normal" with standard deviation
    1/sqrt(d+1) and bias 0 (Stiennon et al. 2020). "keep" takes the checkpoint's and fails where there is none.
    A head that the checkpoint has is always kept."""
    follows: Follows | None = attrs.field(default=None, kw_only=True)
    """Of a frozen role, such as a target network or a reference that is renewed."""
    folded: float = attrs.field(default=0.0, kw_only=True)
    """Of a `tokens` head: where the trunk's owner is saved, so many times what this head says is added to its logits,
    as weights of its vocabulary head: any engine then samples from the sum."""


POLICY = Role("policy", trainable=True)
"""The role that an algorithm has where its entry names none."""

Roles = tuple[Role, ...] | Callable[[Any], tuple[Role, ...]]
Constraint = Callable[["Plan", "Component"], Iterable["Problem"]]
"""A pure function of the drafted plan (facts of model and machine included) and the component that declares it."""
Note = Callable[["Plan", "Component"], Iterable[str]]
"""The same, of what the component settles itself where the user says nothing: each decision with its reason."""


@attrs.frozen
class Times:
    """A default that is so many times what would stand without it: {"optim.learning_rate": Times(10, "SOURCE")}."""

    factor: float
    source: str

    def of(self, value: float) -> float:
        """To 12 digits: 10 times 1e-6 is 1e-5, not the number below it."""
        return float(f"{self.factor * value:.12g}")


def _names(value: Iterable[str]) -> frozenset[str]:
    return frozenset((value,) if isinstance(value, str) else value)


@attrs.frozen(kw_only=True)
class Entry:
    """What every component has. Subclasses name the kind."""

    kind: ClassVar[str]
    name: str
    """What the user types: `--algo NAME`. Lower case, digits, and one of - + . between."""
    summary: str
    """One line for `rlhf plugins`."""
    impl: str
    """`module:Class`, imported only after the plan is accepted."""
    config: type | None = None
    """An attrs class whose fields are made by `option`; each becomes `--KIND.FIELD`."""
    provides: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    requires: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    """Capabilities that some component of the plan, or the machine, must provide."""
    conflicts: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    """Capabilities that nothing else in the plan may provide."""
    constraints: tuple[Constraint, ...] = ()
    notes: tuple[Note, ...] = ()
    """What `rlhf plan` tells of it, beside what the core decides."""
    modules: Mapping[str, str] = attrs.Factory(dict)
    """Importable module -> how to install it, for what the core doesn't bring."""
    rank: int = 0
    """Where the user names nothing, the highest rank among the legal is taken; 0 is never taken unasked."""
    worthwhile: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    """Capabilities of the machine without which it is legal, but not taken unasked."""
    defaults: Mapping[str, Any] = attrs.Factory(dict)
    """Recipe keys that an algorithm sets where the user doesn't: {"optim.learning_rate": 1e-6, "batch_size": 64}.
    Of a memory strategy they hold where every trained role has it, after the algorithm's; and it may multiply those:
    `Times`."""
    roles: Roles = ()
    """The models it asks for, or a function from its config to them."""
    eases: tuple[str, ...] = ()
    """Options, whole numbers, that take less memory the smaller they are and change no results: where a plan doesn't
    fit, smaller ones are offered."""
    api_version: int = API_VERSION


@attrs.frozen(kw_only=True)
class AlgorithmEntry(Entry):
    """A whole algorithm. With `requires={"rollouts"}` it is online: an engine samples and rewards judge."""

    kind: ClassVar[str] = "algo"
    roles: Roles = (POLICY,)
    data: type | None = None
    """The row type that it reads (`rlhf.rows`, or an attrs class of its own with `from_record`). Left out: prompts."""
    rewards: bool = True
    """Whether an online algorithm needs reward sources."""
    objective: tuple[str, Literal["max", "min"]] | None = None
    """The held-out metric that says which checkpoint is best. Left out: reward/mean online, loss offline."""
    footprint: AlgorithmFootprint | None = None
    """What it does in a step, for the resource planner, from its options. Left out: a response a row, one pass, all
    trained roles at once."""


@attrs.frozen(kw_only=True)
class PolicyEntry(Entry):
    """How models are loaded, how text becomes tokens, and how ragged sequences are scored."""

    kind: ClassVar[str] = "policy"
    footprint: PolicyFootprint | None = None
    """Bytes of a forward and its backward. Left out: those of a plain decoder that holds all logits at once."""


@attrs.frozen(kw_only=True)
class EngineEntry(Entry):
    """Samples responses. Every engine provides "rollouts"; see `rlhf.interfaces.Engine` for its log-prob contract."""

    kind: ClassVar[str] = "engine"
    provides: frozenset[str] = attrs.field(default=frozenset({"rollouts"}), converter=_names)
    footprint: EngineFootprint | None = None
    """Bytes that it takes beside the trained weights, such as its cache. Left out, a plan says that they lack."""


@attrs.frozen(kw_only=True)
class RewardEntry(Entry):
    """Judges rollouts. Several add up with weights."""

    kind: ClassVar[str] = "reward"
    columns: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    """Columns of the prompt rows that it cannot do without, or a function from its config to them."""


@attrs.frozen(kw_only=True)
class MemoryEntry(Entry):
    """How a role's module is loaded, adapted, wrapped, sharded."""

    kind: ClassVar[str] = "mem"
    phase: Literal["load", "adapt", "wrap", "shard"]
    """Strategies act in this order, whatever the order typed."""
    applies: Literal["all", "trainable", "frozen"] = "all"
    """The roles that `--mem NAME` without a role means."""
    slot: str = ""
    """At most one strategy per slot and role, such as "precision". A slot with ranked members is always filled."""
    footprint: Footprint | None = None
    """What it makes of a module's memory: `divided`, `on_host`, `copied`, `precision`, or a function of one's own.
    Left out, it is counted as if it changed nothing, and a plan says so."""

    def acts_on(self, role: Role) -> bool:
        """Whether it is for this role where the user doesn't say for which."""
        return self.applies == "all" or (self.applies == "trainable") == role.trainable


@attrs.frozen(kw_only=True)
class OptimizerEntry(Entry):
    """Parameter groups, the optimiser and its schedule."""

    kind: ClassVar[str] = "optim"
    footprint: StateBytes | None = None
    """Bytes that it keeps of a trained tensor: `moments(4, 4)`. Left out, that is what is counted."""
    at_work: StateBytes | None = None
    """Bytes that its step takes besides, while it changes a tensor on a CPU."""
    state_on_host: bool = False
    """They are in the host's memory, wherever the weights are."""


@attrs.frozen(kw_only=True)
class BackendEntry(Entry):
    """Makes the ranks of a run act as one."""

    kind: ClassVar[str] = "backend"
    footprint: Footprint | None = None
    """As of a memory strategy: what it spreads over ranks, what it keeps beside. `unchanged` where that is nothing."""


@attrs.frozen(kw_only=True)
class FormatEntry(Entry):
    """Reads data files into records."""

    kind: ClassVar[str] = "format"
    suffixes: tuple[str, ...] = ()
    """File name endings that it claims where the user gives no `--format`, such as ".jsonl"; the longest wins."""


@attrs.frozen(kw_only=True)
class TrackerEntry(Entry):
    """Hears of the run's events: logs, reports, callbacks. Those with a rank listen unasked, but for `--track none`."""

    kind: ClassVar[str] = "track"


@attrs.frozen(kw_only=True)
class LauncherEntry(Entry):
    """Starts the run's processes."""

    kind: ClassVar[str] = "launch"


@attrs.frozen(kw_only=True)
class StarterEntry:
    """What a run uses where the user names no model or no data: an example that ships with a plugin.

    `model` and `data` are paths or `package:file` resources. The settings under `with_model` apply when the model is
    the starter's own, those under `with_data` (such as the reward) when the data is, `with_both` when both are.
    """

    name: str
    summary: str
    data_type: type
    """The row type its data has; a starter is offered to the algorithms that read it."""
    algorithms: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    """When given, only for the algorithms of these names."""
    model: str
    data: str
    eval_data: str
    with_model: Mapping[str, Any] = attrs.Factory(dict)
    with_data: Mapping[str, Any] = attrs.Factory(dict)
    with_both: Mapping[str, Any] = attrs.Factory(dict)
    rank: int = 0


ENTRY_TYPES: tuple[type[Entry], ...] = (
    AlgorithmEntry,
    PolicyEntry,
    EngineEntry,
    RewardEntry,
    MemoryEntry,
    OptimizerEntry,
    BackendEntry,
    FormatEntry,
    TrackerEntry,
    LauncherEntry,
)
KINDS: dict[str, type[Entry]] = {entry.kind: entry for entry in ENTRY_TYPES}
"""Kind = flag = YAML key -> its entry type."""
MANY = frozenset({"reward", "mem", "track"})
"""Kinds of which a plan may hold several."""
NONE = "none"
"""No component's name: `--track none` leaves out those that listen unasked, too."""
SINGLE = ("policy", "engine", "optim", "backend", "launch")
"""Kinds of which a plan holds one at most, beside its algorithm."""


def address(kind: str, key: str) -> str:
    """How options speak of a component: "algo", "mem.lora"; `key` is its label or else its name."""
    return f"{kind}.{key}" if kind in MANY else kind
