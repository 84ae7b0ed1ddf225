"""Rows of an offline algorithm: encoded once, bundled into items of a batch, experience computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlhf.data import Rows
from rlhf.interfaces import Algorithm, Score, State
from rlhf.sequences import Example, Experience, Sequences

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

    def experience(self, items: Sequence[int], score: Score) -> Experience:
        """The experience of these items; what isn't known yet is computed and kept."""
        rows = [row for item in items for row in self.items[item]]
        if type(self._algorithm).experience is Algorithm.experience:
            return self._encoded(rows)
        missing = list(dict.fromkeys(row for row in rows if row not in self._kept))
        if missing:
            self._keep(missing, self._algorithm.experience(self._encoded(missing), score))
        whole = self._encoded(rows)
        kept = [self._kept[row] for row in rows]
        tokens = {name: torch.cat([k.tokens[name] for k in kept]) for name in kept[0].tokens}
        responses = {name: torch.cat([k.responses[name] for k in kept]) for name in kept[0].responses}
        return Experience(whole, tokens, **responses)

    def _encoded(self, rows: Sequence[int]) -> Experience:
        examples = [(i, example) for i, row in enumerate(rows) for example in self.rows[row]]
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
            group=[i for i, _ in examples],
        )
        names = sorted({name for _, example in examples for name in example.fields})
        fields = {name: torch.tensor([float(e.fields[name]) for _, e in examples]) for name in names}
        return Experience(sequences, None, **fields)

    def _keep(self, rows: Sequence[int], experience: Experience) -> None:
        per_row = [len(self.rows[row]) for row in rows]
        tokens_per_row = [sum(len(e.response) for e in self.rows[row]) for row in rows]
        tokens = {name: value.split(tokens_per_row) for name, value in experience.of_tokens.items()}
        responses = {name: value.split(per_row) for name, value in experience.of_responses.items()}
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
        rows: list[int] = state.get("rows", [])
        per_row = [len(self.rows[row]) for row in rows]
        tokens_per_row = [sum(len(e.response) for e in self.rows[row]) for row in rows]
        tokens = {name: value.split(tokens_per_row) for name, value in state.get("tokens", {}).items()}
        responses = {name: value.split(per_row) for name, value in state.get("responses", {}).items()}
        for i, row in enumerate(rows):
            self._kept[row] = _Kept(
                {name: parts[i] for name, parts in tokens.items()},
                {name: parts[i] for name, parts in responses.items()},
            )
