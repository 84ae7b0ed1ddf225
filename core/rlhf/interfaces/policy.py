"""What loads models and scores sequences: a policy, its codec, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from rlhf.component import Component
from rlhf.entries import Head
from rlhf.errors import RequestError
from rlhf.floor import ModelShape
from rlhf.rows import Message
from rlhf.scores import Comparison, LogitSource, Scores
from rlhf.sequences import Sequences


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
        raise NotImplementedError  # abstract: each implementation has its own

    def load(self, spec: LoadSpec) -> nn.Module:
        """Load a module with the head asked for, on its device.

        Raises:
            RequestError: the folder holds no such model.
        """
        raise NotImplementedError  # abstract: each implementation has its own

    def add_scalar_head(self, module: nn.Module, role: str, init: str, seed: int) -> nn.Module:
        """A scalar head for the module's trunk: the role's own part where it shares a trunk."""
        raise NotImplementedError  # abstract: each implementation has its own

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
        # abstract for those alone whose roles may share a base
        raise NotImplementedError(f"{type(self).__name__} has no heads for roles that share a base")

    def score(self, module: nn.Module, sequences: Sequences, heads: Sequence[HeadRequest]) -> list[Scores]:
        """Score sequences by one trunk and the heads asked for, in one forward of the trunk."""
        raise NotImplementedError  # abstract: each implementation has its own

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
        raise NotImplementedError  # abstract: each implementation has its own

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
