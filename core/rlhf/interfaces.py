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

from rlhf.component import Component, Launcher
from rlhf.component import Context as Context
from rlhf.entries import Head
from rlhf.errors import RequestError, RowError
from rlhf.experience import Batch, Experience
from rlhf.floor import ModelShape
from rlhf.rows import Message
from rlhf.scaling import LossScaler
from rlhf.scores import Comparison, Divergence, LogitSource, ScoreRequest, Scores
from rlhf.sequences import Example, Generation, Prompt, Rollouts, Sample, Sequences
from rlhf.world import World

State = dict[str, Any]
"""Nested dicts and lists of JSON values and tensors; of what is spread over ranks, `rlhf.checkpoint.Piece`s."""


class Score(Protocol):
    """The forward handed to an algorithm. In `experience` without gradient and of any size; in `loss` with gradient."""

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        """Scores of the rollouts, experience or batch under a role."""

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        """Scores under several roles, in one forward of their shared container: what a loss of two trainable roles
        must use, since a parallel backend takes one forward a backward."""

    def divergence(
        self, of: Any, role: str, other: str, *, kind: Divergence, beta: float = 0.5, temperature: float = 1.0
    ) -> Tensor:
        """float32 [N], nats: how far a role's distribution before each response token is from that of a frozen role
        with a module of its own, over the whole vocabulary. In `loss` with the gradient of the role.

        Args:
            kind: `rlhf.scores.Divergence`, of `role` from `other`.
            beta: of `js`, between 0 and 1.
            temperature: divides the logits of both; that of sampling plays no part.
        """

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        """float32 [N], nats: log-probs under the weights that sampled: the engine's own where exact. Else they are
        computed, and what is made of these rollouts has weights for the difference: `Experience.importance`."""


class Algorithm(Component):
    """Roles and data (in its entry), sampling requests, experience, loss. Knows no engine, backend or memory strategy.

    Online, a step is: `requests` -> rollouts -> rewards -> `keep` -> `experience` -> minibatches -> `loss`; where there
    are `sampling_rounds`, up to `keep` again for further prompts in place of what isn't kept.
    Offline: rows -> `examples` (once, at the start) -> `experience` (once a row, cached) -> `loss`.
    Before the losses of an optimiser step comes `prepare`, for an algorithm that looks at all of it at once.
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

    @property
    def sampling_rounds(self) -> int:
        """Online: how often a step samples at most. From the second time on further prompts, those that come next in
        the data, take the place of groups that `keep` left out; what then still lacks, lacks, and is counted."""
        return int(getattr(self.config, "sampling_rounds", 1))

    def keep(self, rollouts: Rollouts) -> Tensor | None:
        """Online: which of a round's judged rollouts are learnt from, bool [B]; None: all, on every rank
        alike. A group is kept where any of its members is. Ranks as in `experience`. The core counts what is left
        out."""
        return None

    def experience(self, rollouts: Any, score: Score) -> Experience:
        """What the loss needs, computed without gradient. Online: of `Rollouts`, each step. Offline: of an
        `Experience`, once a row; its fields are cached over epochs.

        Of several ranks, each has its own part of the batch, whole groups, perhaps none; what must be known of the
        whole batch comes from `context.world`."""
        return Experience(rollouts)

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        """What the loss must know of the whole minibatch under the weights as they are now, computed without gradient:
        before each optimiser step, and before the held-out loss. Ranks as in `experience`."""
        return minibatch

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
    loaded: tuple[Callable[[nn.Module], None], ...] = ()
    """What is done to the module as soon as its weights are there, before its first forward."""
    trust_remote_code: bool = False
    seed: int = 0
    joins: bool = False
    """The module is another role's: this one has adapters, and a head, of its own on it."""


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

    def add_token_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        """A head of one number a token of the vocabulary for the module's trunk: at "normal" a tenth of what a scalar
        one starts from, so that its numbers start near 0, and two heads apart.

        Raises:
            RequestError: the module's logits aren't its vocabulary head's output as it is, so that the two couldn't be
                added up as weights; or this policy has no such heads. They are optional: roles with the head "tokens"
                alone ask for them.
        """
        raise RequestError(f"the policy {type(self).__name__} has no heads of tokens")

    def own_head(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """The scalar head of a role that joins another's module: the checkpoint's, where the spec's has one.

        Raises:
            RequestError: it has none, and the role keeps one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no heads for roles that share a base")

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        """Score sequences by one trunk and the heads asked for, in one forward of the trunk."""
        raise NotImplementedError

    def read(self, module: nn.Module, sequences: Sequences) -> LogitSource:
        """What logits before the response tokens are made from, by a frozen module; one forward of its trunk. Optional:
        it is asked for by `Score.divergence` alone.

        Raises:
            RequestError: this policy can't.
        """
        raise RequestError(f"the policy {type(self).__name__} can't compare whole distributions")

    def shape(self, module: nn.Module) -> ModelShape | None:
        """What a forward of the module computes and reads, for `perf/floor_ratio` and `perf/mfu`; None leaves both
        out. Asked for when the module is whole and it is settled what is trained."""
        return None

    def save(
        self,
        module: nn.Module,
        folder: Path,
        spec: LoadSpec,
        head: nn.Module | None = None,
        weights: Mapping[str, Tensor] | None = None,
        folded: Sequence[tuple[float, nn.Module]] = (),
    ) -> None:
        """Write the module and its tokenizer as a standard HF or PEFT folder; of a role that joins another's module,
        its adapters and its own scalar head. Called on rank 0 alone.

        Args:
            weights: by the module's own names, where they are spread over ranks; None: the module has them.
            folded: heads of tokens, each with its factor, to be added to the vocabulary head in what is written. Given
                only where a role asks for it (`Role.folded`).
        """
        raise NotImplementedError

    @classmethod
    def export(cls, spec: LoadSpec, folder: Path, dtype: torch.dtype | None) -> Mapping[str, Any]:
        """Write a saved model as a plain folder that needs nothing else: adapters merged, quantised weights unpacked.

        Args:
            spec: `model` is what `save` wrote, or a folder of the same sort; the rest is as the role was loaded.
            dtype: of the weights written; None is the type that the model they were trained from is stored in.

        Returns:
            What is worth telling, for people: "weights", "dtype", "merged", ...

        Raises:
            RequestError: it can't be had, or can't be written so.
        """
        raise RequestError(f"the policy {cls.__name__} writes no plain folder")


@attrs.frozen(eq=False)
class HeadRequest:
    """Which head of a trunk is read, and for what."""

    role: str
    head: Head
    scalar_head: nn.Module | None = None
    """A head of the role's own on a shared trunk; None is the module's."""
    temperature: float = 1.0
    entropy: bool = False
    compare: Comparison | None = None
    """What is asked of an `lm` head is divergences, and no log-probs."""


@attrs.frozen
class LogProbs:
    """What an engine's log-probs are; what follows from it, see `docs/architecture.md`, "Log-probs that differ"."""

    available: bool = True
    exact: bool = False
    """They equal the trainer's forward to fp32 rounding: they stand as old log-probs, and no forward is spent."""
    after_temperature: bool = True
    """Of the logits divided by the temperature, which is what was sampled from. Those from before it are of use at
    temperature 1 alone."""
    truncated: bool = False
    """Sampling was cut by top-p, top-k or min-p, so the distribution sampled from isn't the policy's, and no ratio to
    it is known: refused for algorithms that require "logprobs"."""
    dtype: str = "float32"
    """Of the matrix products that gave them."""

    def usable(self, temperature: float) -> bool:
        """Whether they say how likely what was sampled at this temperature was to be."""
        return self.available and not self.truncated and (self.after_temperature or temperature == 1.0)


class Weights(Protocol):
    """A module's weights by its own names, to be run through on every rank at once, as often as an engine likes."""

    def __call__(self, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        """In buckets, each tensor whole, and never all of them at once.

        Args:
            only: which names are wanted, the same on every rank; what isn't, isn't gathered.
        """


class Engine(Component):
    """Samples responses. Doesn't know the algorithm, nor whether weights are sharded."""

    logprobs: LogProbs = LogProbs()
    borrows: ClassVar[bool] = False
    """It samples from the very module that it was attached to, which must be whole then."""
    trainer_logp: Callable[[Sequences, float], Tensor] | None = None
    """Set before `attach`: log-probs of response tokens by the policy's own forward, at a temperature; float32 [N],
    without gradient. For an engine that holds a copy of the weights, to see that it is one. A meeting of all ranks, in
    `generate` as in `sync`: each with sequences of its own, perhaps none."""

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """Meet the trainer's module of the role "policy", before the first rollout; an engine in this process samples
        from it, another one copies its weights."""

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """Sample `request.count` responses for each request, in order. Called on every rank with its own requests,
        perhaps none.

        Args:
            temperature: overrides the engine's own, for evaluation; 0 is greedy.
        """
        raise NotImplementedError

    def sync(self, weights: Weights, version: int) -> None:
        """Take new weights. Called on every rank, before the first rollout and after every step that changed them.

        Args:
            version: of the weights; what is sampled from now on is of this version (`Generation.version`).
        """

    def close(self) -> None:
        """Free what it holds."""


@attrs.frozen
class Failed:
    """A reward that could not be had: the rollout is left out and counted, never a zero."""

    why: str


class Reward(Component):
    """Judges rollouts. Doesn't know how they were made."""

    columns: Sequence[str] = ()
    """Columns of the prompt rows that it cannot do without, where only the implementation knows them; what the options
    alone say is `RewardEntry.columns`. Rows without are refused before any model is loaded."""

    def check(self, row: Any) -> None:
        """Look at a prompt row that has the columns it needs, before any model is loaded.

        Raises:
            RowError: no response to it could be judged, such as for a reference that can't be read; the row is refused
                and counted, training and held-out ones alike.
        """

    def judge(self, rollouts: Rollouts, score: Score) -> Sequence[float | Failed] | Tensor:
        """One number a rollout, in order; higher is better. The core refuses another count, text, NaN or infinity."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what it holds outside this process; it may be asked again."""


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

    def join(self, module: nn.Module, spec: LoadSpec) -> None:
        """ADAPT, for a role that joins another's module: put what is its own into the module, under `spec.role`, and
        change nothing of the others'.

        Raises:
            RequestError: it doesn't fit the module.
        """

    def adapters_off(self, module: nn.Module) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which the module is its own base; None where it brings no adapters."""
        return None

    def as_role(self, module: nn.Module, role: str) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which a module that several roles share is this one's; None where it keeps no parts apart.
        It lasts for a forward; a backward comes after it, so it must not change what is trained."""
        return None

    def visit(self, module: nn.Module) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which a frozen module's weights are on the device; None where they always are. It may be
        entered again inside itself."""
        return None

    def settled(self, parameters: Sequence[TrainedParameter]) -> None:
        """What is trained of the role is settled: these. Before the first step."""

    def stepped(self) -> None:
        """An optimiser step has changed the weights."""

    def stand_in(self, purpose: Literal["evaluate", "save"]) -> contextlib.AbstractContextManager[Any] | None:
        """A context in which the role's trained weights are those to be evaluated, or saved; None where they are."""
        return None

    def loss_scaler(self) -> LossScaler | None:
        """What keeps gradients in the range of the products' precision; None where that has range enough."""
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
    loss_scale: float | None = None
    """What the loss was multiplied by, where it was."""


class Backend(Component):
    """The ranks as one: wraps one container of all trainable roles behind a single forward, owns step, clipping,
    gathering, reductions and shards of state. Doesn't know the algorithm."""

    world: World
    device: str
    sharded: ClassVar[bool] = False
    """A module's parameters are spread over ranks, so that each forward of it is a meeting of all ranks, and the
    module alone can't be saved. The run then has every rank make the same number of forwards (ranks with less work
    repeat a group at weight 0), and saves a model from `weights`."""
    scaler: LossScaler | None = None
    """Set before `prepare` where the precision of products needs one: `backward` scales by it, `update` takes the
    scale out before it clips, and `state` holds its own."""

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        """Take over the container of all trainable roles."""
        raise NotImplementedError

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """One forward of the container, with gradient where it is enabled."""
        raise NotImplementedError

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Add a micro-batch's gradients: the step's are the sum over micro-batches and ranks, not a mean.

        Args:
            last: this rank makes no further micro-batch of the step, so ranks may begin to add up. Ranks need not have
                made as many unless the backend is `sharded`; one that had no work at all is never called.
        """
        raise NotImplementedError

    def update(self, factor: float) -> StepResult:
        """Add the gradients up over ranks, clip by their global norm, step at `factor` times each group's base
        learning rate, clear the gradients. Called on every rank, once a step; the result is the same on all."""
        raise NotImplementedError

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        """A trained module's whole weights by name, in buckets, never all at once. Every rank runs through all of
        them, at the same time: each may be a meeting.

        Args:
            only: which names are wanted; the others needn't be gathered.
        """
        raise NotImplementedError

    def gathered(self, module: str) -> contextlib.AbstractContextManager[None]:
        """A context in which a trained module is whole on every rank and can be called there by itself, without the
        others; no forward of the container meanwhile. For an engine that samples from it: it is gathered once, and
        not layer by layer for every token."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Leave the other ranks."""


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
