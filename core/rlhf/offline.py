"""Rows of an offline algorithm: encoded once, bundled into items of a batch, experience computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlhf.data import Rows
from rlhf.experience import Experience
from rlhf.interfaces import Algorithm, Score, State
from rlhf.sequences import Example, Sequences
from rlhf.shares import share
from rlhf.world import ALONE, World

_Fields = dict[str, Tensor]


@attrs.define
class _Kept:
    """The experience of one row."""

    tokens: _Fields  # [tokens of the row]
    responses: _Fields  # [sequences of the row]


class OfflineData:
    """Encoded rows. An item of a batch is a row, or several packed together."""

    def __init__(self, rows: Rows[list[Example]], algorithm: Algorithm) -> None:
        self.rows = [examples for _, examples in rows.items]
        lengths = [sum(len(e.prompt) + len(e.response) for e in examples) for examples in self.rows]
        self.items = [list(bundle) for bundle in algorithm.bundles(lengths)]
        bundled = sorted(row for item in self.items for row in item)
        if bundled != list(range(len(self.rows))):
            raise ValueError(f"{type(algorithm).__name__}.bundles must put each of {len(self.rows)} rows in one bundle")
        self._algorithm = algorithm
        self._kept: dict[int, _Kept] = {}

    def __len__(self) -> int:
        return len(self.items)

    def experience(self, items: Sequence[int], score: Score, world: World = ALONE) -> Experience:
        """This rank's part of the experience of these items; what isn't known yet is computed, by all ranks together,
        and kept by each.

        Args:
            items: of all ranks, the same on each.
        """
        own = set(share([self._tokens(self.items[item]) for item in items], world.size)[world.rank])
        places: list[tuple[int, int]] = []  # (place among the rows of all ranks, row) of this rank's
        before = 0
        for i, item in enumerate(items):
            rows = self.items[item]
            places += [(before + j, row) for j, row in enumerate(rows)] if i in own else []
            before += len(rows)
        whole = self._encoded([row for _, row in places], [place for place, _ in places])
        if type(self._algorithm).experience is Algorithm.experience:
            return whole
        wanted = (row for item in items for row in self.items[item])
        missing = list(dict.fromkeys(row for row in wanted if row not in self._kept))
        if missing:
            self._compute(missing, score, world)
        kept = [self._kept[row] for _, row in places]
        names = next(iter(self._kept.values()))
        tokens = {name: _joined([k.tokens[name] for k in kept]) for name in names.tokens}
        responses = {name: _joined([k.responses[name] for k in kept]) for name in names.responses}
        return Experience(whole, tokens, **responses)

    def _compute(self, missing: Sequence[int], score: Score, world: World) -> None:
        """The experience of rows, cut over ranks and shared: a row may be another rank's when it comes again."""
        mine = [missing[i] for i in share([self._tokens([row]) for row in missing], world.size)[world.rank]]
        found = self._algorithm.experience(self._encoded(mine), score)
        for part in world.gather([mine, found.of_tokens, found.of_responses]):
            if part[0]:
                self._keep(*part)

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(len(e.prompt) + len(e.response) for row in rows for e in self.rows[row])

    def _encoded(self, rows: Sequence[int], groups: Sequence[int] | None = None) -> Experience:
        """The sequences of rows. `groups`: each row's number; left out, its place here."""
        numbers = range(len(rows)) if groups is None else groups
        examples = [(n, example) for n, row in zip(numbers, rows, strict=True) for example in self.rows[row]]
        prompts: list[Tensor] = []
        prompt_of: list[int] = []
        for row in rows:
            first = len(prompts)
            for example in self.rows[row]:  # the sequences of a row often share their prompt, such as a pair
                same = [i for i in range(first, len(prompts)) if torch.equal(prompts[i], example.prompt)]
                if not same:
                    prompts.append(example.prompt)
                prompt_of.append(same[0] if same else len(prompts) - 1)
        sequences = Sequences.of(
            prompts,
            [example.response for _, example in examples],
            prompt_of=prompt_of,
            masks=[example.mask for _, example in examples],
            group=[n for n, _ in examples],
        )
        # A rank without rows has the fields of them too, empty: an algorithm's `experience` may ask for one.
        of = [example for _, example in examples] or [example for row in self.rows[:1] for example in row]
        names = sorted({name for example in of for name in example.fields})
        fields = {name: torch.tensor([float(e.fields[name]) for _, e in examples]) for name in names}
        of_tokens = sorted({name for example in of for name in example.token_fields})
        tokens = {name: _joined([e.token_fields[name].float() for _, e in examples]) for name in of_tokens}
        return Experience(sequences, tokens, **fields)

    def _keep(self, rows: Sequence[int], of_tokens: _Fields, of_responses: _Fields) -> None:
        per_row = [len(self.rows[row]) for row in rows]
        tokens_per_row = [sum(len(e.response) for e in self.rows[row]) for row in rows]
        tokens = {name: value.split(tokens_per_row) for name, value in of_tokens.items()}
        responses = {name: value.split(per_row) for name, value in of_responses.items()}
        for i, row in enumerate(rows):
            self._kept[row] = _Kept(
                {name: parts[i].clone() for name, parts in tokens.items()},
                {name: parts[i].clone() for name, parts in responses.items()},
            )

    def digest(self) -> str:
        """Of the rows as encoded."""
        found = hashlib.sha256()
        for row in self.rows:
            for example in row:
                found.update(example.prompt.numpy().tobytes() + b"/" + example.response.numpy().tobytes() + b"/")
                found.update(repr(sorted((name, float(x)) for name, x in example.fields.items())).encode())
                if example.mask is not None:
                    found.update(b"mask" + example.mask.numpy().tobytes() + b"/")
                for name in sorted(example.token_fields):
                    found.update(name.encode() + example.token_fields[name].float().numpy().tobytes() + b"/")
        return found.hexdigest()

    def state(self) -> State:
        rows = sorted(self._kept)
        if not rows:
            return {}
        first = self._kept[rows[0]]
        return {
            "rows": rows,
            "tokens": {name: torch.cat([self._kept[row].tokens[name] for row in rows]) for name in first.tokens},
            "responses": {
                name: torch.cat([self._kept[row].responses[name] for row in rows]) for name in first.responses
            },
        }

    def load_state(self, state: State) -> None:
        self._kept = {}
        self._keep(state.get("rows", []), state.get("tokens", {}), state.get("responses", {}))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)
