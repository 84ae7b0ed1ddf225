"""What each kind of component implements. Imported after the plan is accepted; entry modules don't import this.

Every component is made as `Class(config, context)`. One that keeps anything between steps puts it in `state()`:
what isn't in there is not restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import attrs
import torch
from torch import Tensor, nn

from rlhf.entries import Head
from rlhf.errors import RowError
from rlhf.floor import ModelShape
from rlhf.plan import Plan
from rlhf.rows import Message
from rlhf.sequences import (
    Batch,
    Example,
    Experience,
    Generation,
    Prompt,
    Rollouts,
    Sample,
    ScoreRequest,
    Scores,
    Sequences,
)

State = dict[str, Any]
"""Nested dicts and lists of JSON values and tensors."""


@attrs.define
class Context:
    """What a component may know of its run."""

    plan: Plan
    seed: int = 0
    device: str = "cpu"
    world: World = attrs.Factory(lambda: World())
    metrics: MetricSink = attrs.Factory(lambda: MetricSink())
    policy: Policy | None = None
    """Set for components made after the policy: engines, rewards, algorithms."""
    label: str = ""
    """The component's own key in the plan; for a labelled reward its label."""


class World:
    """The ranks of the run, for components that need global statistics. This one is a single process."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks; every rank gets the same."""
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for every rank."""


class MetricSink:
    """Means that a component reports outside the loss; kept as sums and counts, so that ranks reduce exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def mean(self, name: str, x: Tensor | float, mask: Tensor | None = None) -> None:
        """Add values to the step's mean called `name`. x: any shape; mask: bool, the same shape."""
        values = torch.as_tensor(x, dtype=torch.float64).detach().cpu().reshape(-1)
        if mask is not None:
            values = values[mask.cpu().reshape(-1)]
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + float(values.sum()), count + values.numel())

    def drain(self, world: World) -> dict[str, float]:
        """The means over all ranks, and start anew."""
        names = sorted(set().union(*world.gather(list(self.sums))))
        table = torch.tensor([self.sums.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
        self.sums = {}
        if not names:
            return {}
        table = world.sum(table)
        return {name: float(s / n) for name, (s, n) in zip(names, table.tolist(), strict=True) if n}


class Component:
    """What every component has."""

    def __init__(self, config: Any, context: Context) -> None:
        self.config = config
        self.context = context

    def state(self) -> State:
        """Everything it keeps between steps, for checkpoints."""
        return {}

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""


class Score(Protocol):
    """The forward handed to an algorithm. In `experience` without gradient and of any size; in `loss` with gradient."""

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        """Scores of the rollouts, experience or batch under a role."""

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        """Scores under several roles, in one forward of their shared container: what a loss of two trainable roles
        must use, since a parallel backend takes one forward a backward."""

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        """float32 [N]: log-probs under the weights that sampled: the engine's own where exact, else recomputed."""


class Algorithm(Component):
    """Roles and data (in its entry), sampling requests, experience, loss. Knows no engine, backend or memory strategy.

    Online, a step is: `requests` -> rollouts -> rewards -> `experience` -> minibatches -> `loss`.
    Offline: rows -> `examples` (once, at the start) -> `experience` (once a row, cached) -> `loss`.
    """

    unit: ClassVar[Literal["sequence", "group"]] = "sequence"
    """What a micro-batch must not cut: nothing, or a group (the loss compares its members)."""

    step: int = 0
    """Steps done; set by the loop."""

    @property
    def epochs(self) -> int:
        """Passes over each batch of experience."""
        return int(getattr(self.config, "epochs", 1))

    @property
    def minibatches(self) -> int:
        """Optimiser steps a pass over each batch of experience."""
        return int(getattr(self.config, "minibatches", 1))

    def examples(self, row: Any, codec: Codec) -> Iterable[Example]:
        """Offline: the sequences of a row, one group. Raises RowError for a row that doesn't fit."""
        raise NotImplementedError(f"{type(self).__name__} is offline and must say what a row's sequences are")

    def bundles(self, lengths: Sequence[int]) -> Iterable[Sequence[int]]:
        """Offline: which rows make one item of a batch; packing joins several. lengths: tokens of each row."""
        return ([i] for i in range(len(lengths)))

    def requests(self, prompts: Sequence[Prompt]) -> Iterable[Sample]:
        """Online: what to sample for these prompts."""
        return [Sample(prompt) for prompt in prompts]

    def experience(self, rollouts: Any, score: Score) -> Experience:
        """What the loss needs, computed without gradient. Online: of `Rollouts`, each step. Offline: of an
        `Experience`, once a row; its fields are cached over epochs."""
        return Experience(rollouts)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        """This micro-batch's part of the loss, a scalar: use `token_mean` and the like, so that parts add up."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def minibatch_done(self, metrics: Mapping[str, float]) -> bool:
        """After each optimiser step, with its metrics, the same on every rank. True leaves the batch's rest out."""
        return False

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """After each step, with its metrics, the same on every rank: adapt a coefficient here."""


class Codec(Protocol):
    """Text to tokens and back, with the model's own template."""

    eos: int
    """Token id that ends a response."""

    def prompt(self, prompt: Any) -> Tensor:
        """int64 [P] of a `rows.Prompt`. Raises RowError when longer than the limit and not to be cut."""

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        """int64 [R] of a completion to `prompt`, closed by EOS when `end`."""

    def chat(self, messages: Sequence[Message]) -> tuple[Tensor, Tensor]:
        """(int64 [T] of a whole chat, bool [T] True on what the assistant says, its closing token included)."""

    def decode(self, tokens: Tensor) -> str:
        """Text of tokens, special ones left out."""

    def prompt_text(self, tokens: Tensor) -> str:
        """Text of a prompt's tokens, special ones kept."""


@attrs.frozen
class LoadSpec:
    """How a module is to be loaded; memory strategies rewrite it before the policy loads."""

    role: str
    model: str
    head: Head
    trainable: bool
    head_init: str
    device: str
    weights: torch.dtype = torch.float32
    """Of the weights in memory."""
    compute: torch.dtype | None = None
    """Of matrix products, by autocast; None computes in the weights' own."""
    arguments: Mapping[str, Any] = attrs.Factory(dict)
    """More arguments of `from_pretrained`, such as a quantisation config."""
    trust_remote_code: bool = False
    seed: int = 0


class Policy(Component):
    """Builds the modules behind the roles and scores ragged sequences. Doesn't know the algorithm."""

    def codec(self, model: str) -> Codec:
        """The codec of a model folder or hub id.

        Raises:
            RequestError: it has no tokenizer.
        """
        raise NotImplementedError

    def load(self, spec: LoadSpec) -> nn.Module:
        """Load a module with the head asked for, on its device.

        Raises:
            RequestError: the folder holds no such model.
        """
        raise NotImplementedError

    def add_scalar_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        """A scalar head for the module's trunk: the role's own part where it shares a trunk."""
        raise NotImplementedError

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        """Score sequences by one trunk and the heads asked for, in one forward of the trunk."""
        raise NotImplementedError

    def shape(self, module: nn.Module) -> ModelShape | None:
        """What a forward of the module computes and reads, for `perf/floor_ratio` and `perf/mfu`; None leaves both
        out. Asked for when the module is whole and it is settled what is trained."""
        return None

    def save(self, module: nn.Module, folder: Path, spec: LoadSpec) -> None:
        """Write the module and its tokenizer as a standard HF or PEFT folder."""
        raise NotImplementedError


@attrs.frozen(eq=False)
class HeadRequest:
    """Which head of a trunk is read, and for what."""

    role: str
    head: Head
    scalar_head: nn.Module | None = None
    """A head of the role's own on a shared trunk; None is the module's."""
    temperature: float = 1.0
    entropy: bool = False


@attrs.frozen
class LogProbs:
    """What an engine's log-probs are."""

    available: bool = True
    exact: bool = False
    """They equal the trainer's forward to fp32 rounding: they may stand as old log-probs."""
    after_temperature: bool = True
    truncated: bool = False
    """Sampling was cut by top-p or top-k, so the behaviour distribution isn't the policy's."""


class Engine(Component):
    """Samples responses. Doesn't know the algorithm, nor whether weights are sharded."""

    logprobs: LogProbs = LogProbs()

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """Meet the trainer's module of the role "policy", before the first rollout; an engine in this process samples
        from it, another one copies its weights."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """Sample `request.count` responses for each request, in order.

        Args:
            temperature: overrides the engine's own, for evaluation; 0 is greedy.
        """
        raise NotImplementedError

    def sync(self, weights: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        """Take new weights, streamed by name. Called after every step that changed them."""

    def close(self) -> None:
        """Free what it holds."""


@attrs.frozen
class Failed:
    """A reward that could not be had: the rollout is left out and counted, never a zero."""

    why: str


class Reward(Component):
    """Judges rollouts. Doesn't know how they were made."""

    def judge(self, rollouts: Rollouts, score: Score) -> Sequence[float | Failed] | Tensor:
        """One number a rollout, in order; higher is better. The core refuses another count, text, NaN or infinity."""
        raise NotImplementedError


class MemoryStrategy(Component):
    """How a role's module is loaded, adapted, wrapped, sharded. Override the phases it acts in."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        """LOAD: rewrite how the module is loaded."""
        return spec

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """ADAPT: replace what is trained, such as by adapters.

        Raises:
            RequestError: it doesn't fit the module; lists what would.
        """
        return module

    def wrap(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """WRAP: change how it runs, not what it computes."""
        return module

    def adapters_off(self, module: nn.Module) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which the module is its own base; None where it brings no adapters."""
        return None


class OptimizerStrategy(Component):
    """Parameter groups, the optimiser and its schedule. Doesn't know the process layout."""

    max_norm: float | None = None
    """Gradients are scaled down to this global norm."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """Make the optimiser; each group needs `lr` and `base_lr`."""
        raise NotImplementedError

    def factor(self, step: int, steps: int) -> float:
        """What the schedule multiplies each group's `base_lr` by in step `step` (from 0) of `steps`. By the loop's
        steps, not by optimiser steps: an early stop inside a step must not shift the schedule."""
        return 1.0


@attrs.frozen(eq=False)
class TrainedParameter:
    """A parameter with what the optimiser may want to know of it."""

    name: str
    parameter: nn.Parameter
    role: str
    learning_rate: float | None
    """The role's own, where it has one."""


@attrs.frozen
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    learning_rate: float
    skipped: bool = False
    """The gradients weren't finite, so nothing was changed."""


class Backend(Component):
    """The ranks as one: wraps one container of all trainable roles behind a single forward, owns step, clipping,
    gathering, reductions and shards of state. Doesn't know the algorithm."""

    world: World
    device: str

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        """Take over the container of all trainable roles."""
        raise NotImplementedError

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """One forward of the container, with gradient where it is enabled."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        raise NotImplementedError

    def update(self, factor: float) -> StepResult:
        """Clip, step at `factor` times each group's base learning rate, clear the gradients."""
        raise NotImplementedError

    def weights(self, module: str) -> Iterator[tuple[str, Tensor]]:
        """A trained module's whole weights by name, in buckets, never all at once."""
        raise NotImplementedError


class Format(Component):
    """Reads data into records with the canonical keys of `rlhf.rows`."""

    def read(self, path: str) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
        """(where, record) for each row; `where` is "file:line" or "file, row i".

        Raises:
            RequestError: the file can't be parsed; names file and line.

        A row whose shape is broken may be yielded as `(where, RowError(...))`; it is refused and counted.
        """
        raise NotImplementedError


class Tracker(Component):
    """Hears of the run. One that fails is reported and dropped; the run goes on."""

    def run_started(self, run: Mapping[str, Any]) -> None:
        """`run`: directory, plan, steps, first_step (steps done before: 0, or the checkpoint's), notes. The steps of
        the other events count from 1."""

    def rollout_finished(self, step: int, rollouts: Rollouts) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def checkpoint_saved(self, step: int, path: Path) -> None: ...

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None: ...


class Launcher(Component):
    """Starts the run's processes. The core calls `launch` in the process the user started."""

    def launch(self, run: Callable[[], int]) -> int:
        """Carry out `run` in every rank; returns the exit code. `run` carries out one rank in this process."""
        return run()


CLASS_OF_KIND: dict[str, type[Component]] = {
    "algo": Algorithm,
    "policy": Policy,
    "engine": Engine,
    "reward": Reward,
    "mem": MemoryStrategy,
    "optim": OptimizerStrategy,
    "backend": Backend,
    "format": Format,
    "track": Tracker,
    "launch": Launcher,
}
"""Kind -> what its implementations derive from."""
