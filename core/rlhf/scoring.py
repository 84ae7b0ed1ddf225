"""The forward that algorithms are handed: scores by role, in micro-batches, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.experience import Experience
from rlhf.floor import Ledger
from rlhf.importance import OffPolicy
from rlhf.interfaces import Engine, LogProbs
from rlhf.models import Models
from rlhf.scores import Comparison, Divergence, ScoreRequest, Scores, join_scores
from rlhf.sequences import Rollouts, Sequences


class Scorer:
    """The forward handed to algorithms: see `rlhf.interfaces.Score`."""

    def __init__(
        self,
        models: Models,
        budget: int,
        engine: Engine | None = None,
        gradient: bool = False,
        ledger: Ledger | None = None,
        off_policy: OffPolicy | None = None,
    ) -> None:
        self._models = models
        self._budget = budget
        self._engine = engine
        self._gradient = gradient
        self._ledger = ledger
        self.off_policy = off_policy or OffPolicy()
        self.asked: set[str] = set()
        """Roles that were asked for, where there is a gradient: those that an optimiser step is of."""
        self.ahead: Ahead | None = None
        """Of a scorer without gradient: where scores are left, graph and all, for a loss that will ask for the same. Of
        one with gradient: where it finds them."""

    def __call__(self, of: Rollouts | Experience | Sequences, role: str, *, entropy: bool = False) -> Scores:
        return self.together(of, role, entropy=entropy)[0]

    def together(self, of: Rollouts | Experience | Sequences, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        sequences = of if isinstance(of, Sequences) else of.sequences
        temperature = 1.0 if isinstance(of, Sequences) else of.temperature

        def forward(part: Sequences, roles: Sequence[str] = roles) -> list[Scores]:
            return self._models.forward([ScoreRequest(role, part, temperature, entropy) for role in roles])

        if self._gradient:
            self.asked.update(roles)
            found = self.ahead.take(sequences, roles, temperature, entropy) if self.ahead else {}
            rest = [role for role in roles if role not in found]
            found.update(zip(rest, forward(sequences, rest) if rest else [], strict=True))
            return tuple(found[role] for role in roles)
        scores = self._plain(sequences, roles, forward, temperature)
        if isinstance(of, Rollouts) and "policy" in roles and of.logp is not None and self._said.usable(of.temperature):
            self.off_policy.compare(of, scores[roles.index("policy")].logp)  # costs nothing: it was asked for anyway
        return scores

    def divergence(
        self,
        of: Rollouts | Experience | Sequences,
        role: str,
        other: str,
        *,
        kind: Divergence,
        beta: float = 0.5,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `rlhf.interfaces.Score`."""

        def forward(part: Sequences) -> list[Scores]:
            compare = Comparison(self._models.read(other, part), kind, beta, temperature)
            return self._models.forward([ScoreRequest(role, part, temperature, compare=compare)])

        sequences = of if isinstance(of, Sequences) else of.sequences
        if self._gradient:
            self.asked.update((role, other))
            return forward(sequences)[0].divergence
        return self._plain(sequences, (role, other), forward, temperature)[0].divergence

    def _plain(
        self,
        sequences: Sequences,
        roles: Sequence[str],
        forward: Callable[[Sequences], list[Scores]],
        temperature: float,
    ) -> tuple[Scores, ...]:
        """Scores without gradient, by forwards in which these roles have a part."""
        with self._models.visiting(roles):
            if self._ledger is not None:
                self._ledger.scored(sequences, roles)
            pieces = list(cut(sequences, self._budget))
            if (
                self.ahead is not None
                and self.ahead.wants(sequences)
                and len(pieces) == 1
                and self._models.apart(roles)
                and self._models.noisy.isdisjoint(roles)
            ):
                with torch.enable_grad():
                    scores = forward(sequences)
                self.ahead.leave(sequences, scores, temperature)
                every = torch.arange(len(sequences))
                return tuple(join_scores([(every, _detached(one))], sequences) for one in scores)
            # A rank without rows makes one forward too, of which it keeps nothing but what there would be; and where
            # each forward is a meeting, ranks make as many.
            fill = 0 if pieces else 1
            backend = self._models.backend
            if backend.sharded:
                fill = int(backend.world.max(torch.tensor(max(len(pieces), 1)))) - len(pieces)
            with torch.no_grad():
                parts = [(rows, forward(sequences.select(rows))) for rows in pieces]
                parts += [(rows, [_none_of(scores) for scores in forward(_ANY)]) for rows in [_NO_ROWS] * fill]
            return tuple(
                join_scores([(rows, scores[i]) for rows, scores in parts], sequences) for i in range(len(parts[0][1]))
            )

    @property
    def _said(self) -> LogProbs:
        return LogProbs(available=False) if self._engine is None else self._engine.logprobs

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        """The engine's log-probs where they are exact; else one more forward of the policy, before it is changed, and
        importance weights for what the engine's are off by.

        Raises:
            RunError: sampling was truncated, so no ratio to what was sampled from is known.
        """
        said = self._said
        if said.truncated:
            what = "the engine sampled from a part of the policy's distribution, and no ratio to it is known"
            raise RunError(f'{what}: leave top-p, top-k, min-p out. (An algorithm that requires "logprobs" is told so '
                           f"before anything is loaded.)")  # fmt: skip
        usable = rollouts.logp is not None and said.usable(rollouts.temperature)
        if usable and said.exact:
            assert rollouts.logp is not None
            return rollouts.logp
        known = self.off_policy.known(rollouts)
        if known is not None:
            return known
        logp = self(rollouts, "policy").logp
        if usable:
            self.off_policy.weigh(rollouts, logp)
        return logp


class Ahead:
    """Scores of a step's sequences that were computed before its first loss and are what that loss asks for: then the
    same forward needn't run again. They hold the graph of a micro-batch, so there must be only one."""

    def __init__(self, only: Sequences | None = None) -> None:
        """`only`: the one set of sequences whose scores are worth keeping; None: any."""
        self._only = only
        self._sequences: Sequences | None = None
        self._scores: dict[str, tuple[Scores, float]] = {}

    def wants(self, sequences: Sequences) -> bool:
        """Whether a loss may ask for scores of these."""
        return self._only is None or self._only is sequences

    def leave(self, sequences: Sequences, scores: Iterable[Scores], temperature: float) -> None:
        """Keep these, and those left of the same sequences before."""
        if self._sequences is not sequences:
            self.clear()
        self._sequences = sequences
        self._scores.update((one.role, (one, temperature)) for one in scores)

    def take(self, sequences: Sequences, roles: Iterable[str], temperature: float, entropy: bool) -> dict[str, Scores]:
        """What is there of these very sequences, and log-probs at this temperature, by role; each once, since a
        backward frees its graph. Of others it is freed: the first loss asks for all it will."""
        if self._sequences is not sequences:
            self.clear()
            return {}
        kept = {role: self._scores.pop(role) for role in roles if role in self._scores}
        return {
            role: one
            for role, (one, its_own) in kept.items()
            if one.logp_ is None or (its_own == temperature and (not entropy or one.entropy_ is not None))
        }

    def clear(self) -> None:
        """Free what nobody asked for."""
        self._sequences = None
        self._scores.clear()


_ANY = Sequences.of([torch.tensor([0])], [torch.tensor([0])])
"""Two tokens that any model knows."""
_NO_ROWS = torch.zeros(0, dtype=torch.long)
_PARTS = ("logp_", "entropy_", "values_", "score_", "divergence_")


def _detached(scores: Scores) -> Scores:
    return attrs.evolve(scores, **{n: t.detach() for n in _PARTS if (t := getattr(scores, n)) is not None})


def _none_of(scores: Scores) -> Scores:
    return attrs.evolve(scores, **{n: getattr(scores, n)[:0] for n in _PARTS if getattr(scores, n) is not None})


def cut(sequences: Sequences, budget: int, keep_groups: bool = False) -> Iterator[Tensor]:
    """Cut sequences into micro-batches of at most `budget` padded tokens (one unit at least), alike in length so that
    little is padded, a group's members side by side so that its prompt is shared.

    Yields row numbers, int64. How it cuts changes speed, not results: means divide by the step's totals.
    """
    lengths = sequences.total_lengths()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(sequences.group.tolist()):
        groups.setdefault(group, []).append(row)
    ordered = sorted(groups.values(), key=lambda rows: (max(lengths[row] for row in rows), rows[0]))
    units = ordered if keep_groups else [[row] for rows in ordered for row in rows]
    taken: list[int] = []
    longest = 0
    for unit in units:
        longest_then = max(longest, *(lengths[row] for row in unit))
        if taken and longest_then * (len(taken) + len(unit)) > budget:
            yield torch.tensor(taken, dtype=torch.long)
            taken, longest_then = [], max(lengths[row] for row in unit)
        taken, longest = taken + unit, longest_then
    if taken:
        yield torch.tensor(taken, dtype=torch.long)


def trainer_logp(models: Models, budget: int) -> Callable[[Sequences, float], Tensor]:
    """See `Engine.trainer_logp`. It isn't of a step's work, so no ledger counts it."""
    score = Scorer(models, budget)

    def of(sequences: Sequences, temperature: float) -> Tensor:
        asked = Experience(sequences)
        asked.temperature = temperature
        return score(asked, "policy").logp

    return of
