"""Scores without a model: each role a small table, differentiable, of no padding and no batch, so that what an
algorithm makes of them is judged by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf.entries import Role
from rlhf.errors import RowError
from rlhf.experience import Experience
from rlhf.rows import Message
from rlhf.scores import Divergence, Scores
from rlhf.sequences import Rollouts, Sequences

VOCABULARY = 48
_WIDTH = 6
FIELDS = ("logp", "entropy", "values", "score", "divergence")


@attrs.frozen(eq=False)
class Asked:
    """What was asked for under gradient, and what was answered."""

    sequences: Sequences
    role: str
    fields: dict[str, Tensor]
    """Name in `FIELDS` -> [N] or [B], their gradients retained."""


class Table:
    """See `rlhf.interfaces.Score`. The logits of a token are a matrix times a running mean of what came before it."""

    def __init__(self, roles: Iterable[Role], seed: int = 0, noise: float = 0.0) -> None:
        """
        Args:
            noise: added to what is said of tokens that aren't the policy's own, of every role and every field.
        """
        generator = torch.Generator().manual_seed(seed)
        self._noise = noise
        self._embedding = torch.randn(VOCABULARY, _WIDTH, generator=generator, dtype=torch.float64)
        self.roles = {role.name: role for role in roles}
        self.parameters: dict[str, Tensor] = {}
        for role in self.roles.values():
            size = (_WIDTH, 1 if role.head == "scalar" else VOCABULARY)
            drawn = torch.randn(size, generator=generator, dtype=torch.float64)
            self.parameters[role.name] = drawn.requires_grad_(role.trainable)
        self.asked: list[Asked] = []
        self.logp_old_asked = False
        self._calls = 0

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        return self.together(of, role, entropy=entropy)[0]

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        sequences: Sequences = of if isinstance(of, Sequences) else of.sequences
        temperature = 1.0 if isinstance(of, Sequences) else float(of.temperature)
        return tuple(self._scores(sequences, role, temperature, entropy) for role in roles)

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        self.logp_old_asked = True
        assert rollouts.logp is not None
        return rollouts.logp

    def divergence(
        self, of: Any, role: str, other: str, *, kind: Divergence, beta: float = 0.5, temperature: float = 1.0
    ) -> Tensor:
        sequences: Sequences = of if isinstance(of, Sequences) else of.sequences
        found = []
        for (ours, _), (theirs, _) in zip(self._said(sequences, role), self._said(sequences, other), strict=True):
            p, q = (torch.log_softmax(logits / temperature, dim=-1) for logits in (ours, theirs))
            found.append(_apart(p, q.detach(), kind, beta))
        whole = self._made("divergence", found, sequences)
        if torch.is_grad_enabled() and self.parameters[role].requires_grad:
            whole.retain_grad()
            self.asked.append(Asked(sequences, role, {"divergence": whole}))
        return whole

    def _said(self, sequences: Sequences, role: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each sequence, what a role says before each token of the response [R, V] or [R, 1], and at the end."""
        if role not in self.roles:
            raise KeyError(f"the entry names no role {role!r}; its roles: {', '.join(self.roles)}")
        for i, response in enumerate(sequences.responses()):
            tokens = torch.cat([sequences.prompt(i), response])
            count = torch.arange(1, len(tokens) + 1, dtype=torch.float64)
            states = torch.tanh(self._embedding[tokens].cumsum(0) / count.sqrt()[:, None])  # [P + R, width]
            said = states @ self.parameters[role]
            yield said[len(tokens) - len(response) - 1 : -1], said[-1:]

    def _scores(self, sequences: Sequences, role: str, temperature: float, entropy: bool) -> Scores:
        fields: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
        head = self.roles[role].head if role in self.roles else ""
        for response, (before, last) in zip(sequences.responses(), self._said(sequences, role), strict=True):
            if head == "scalar":
                fields["values"].append(before[:, 0])
                fields["score"].append(last[:, 0])
                continue
            logp = torch.log_softmax(before / (temperature if head == "lm" else 1.0), dim=-1)
            fields["logp"].append(logp.gather(1, response[:, None])[:, 0])
            fields["entropy"].append(-(logp.exp() * logp).sum(-1))
            fields["values"].append(before.gather(1, response[:, None])[:, 0])
        named = {"lm": ("logp", "entropy") if entropy else ("logp",), "scalar": ("values", "score")}
        wanted = named.get(head, ("values", "logp"))
        found = {name: self._made(name, fields[name], sequences) for name in wanted}
        if torch.is_grad_enabled() and self.parameters[role].requires_grad:
            for tensor in found.values():
                tensor.retain_grad()
            self.asked.append(Asked(sequences, role, found))
        return Scores(role, **{f"{name}_": tensor for name, tensor in found.items()})

    def _made(self, name: str, parts: Sequence[Tensor], sequences: Sequences) -> Tensor:
        whole = torch.cat(list(parts)).float() if parts else torch.zeros(0)
        if name == "score" or not self._noise:
            return whole * 1.0  # a tensor of this call's own, whose gradient can be retained
        self._calls += 1  # what was said of a token before isn't what is said of it now
        drawn = self._noise * torch.sin(self._calls + torch.arange(len(whole)))
        return whole + torch.where(sequences.mask, 0.0, drawn)


def _apart(p: Tensor, q: Tensor, kind: Divergence, beta: float) -> Tensor:
    """See `rlhf.scores.Divergence`. p, q: [R, V], log-probs. [R]"""
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


class LetterCodec:
    """A token a character. See `rlhf.interfaces.Codec`."""

    eos = 1

    def prompt(self, prompt: Any) -> Tensor:
        text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        return torch.tensor([_token(letter) for letter in text] or [0])

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        tokens = [*(_token(letter) for letter in text), *([self.eos] if end else [])]
        if not tokens:
            raise RowError("the response is empty")
        return torch.tensor(tokens)

    def chat(self, messages: Sequence[Message]) -> tuple[Tensor, Tensor]:
        parts = [self.response(message["content"]) for message in messages]
        own = [torch.full((len(part),), m["role"] == "assistant") for part, m in zip(parts, messages, strict=True)]
        return torch.cat(parts), torch.cat(own)

    def decode(self, tokens: Tensor) -> str:
        return "".join(chr(97 + token % 26) for token in tokens.tolist() if token > 1)

    def prompt_text(self, tokens: Tensor) -> str:
        return self.decode(tokens)


def _token(letter: str) -> int:
    return 2 + ord(letter) % (VOCABULARY - 2)


def rows_of(experience: Experience) -> dict[tuple[int, int], dict[str, Tensor]]:
    """What each row of an experience holds: its group and its place there -> its fields, numbers a token among them."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    places: dict[int, int] = {}
    sequences = experience.sequences
    lengths = sequences.lengths.tolist()
    tokens = {name: value.split(lengths) for name, value in experience.of_tokens.items()}
    responses = sequences.responses()
    for row, group in enumerate(sequences.group.tolist()):
        places[group] = places.get(group, -1) + 1
        numbers = {name: value[row] for name, value in experience.of_responses.items()}
        of_tokens = {name: parts[row] for name, parts in tokens.items()}
        found[group, places[group]] = {"its tokens": responses[row], **of_tokens, **numbers}
    return found
