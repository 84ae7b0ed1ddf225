"""Advantage-weighted regression on scored completions: an algorithm with a role and data of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from rlhf.api import POLICY, AlgorithmEntry, Role, RowError, hookimpl, option


@attrs.frozen
class ScoredRow:
    """a completion with a score: columns 'prompt', 'completion' and a number 'score'"""

    prompt: str
    completion: str
    score: float

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ScoredRow:
        score = record.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise RowError(f"'score' must be a number, not {score!r}")
        if not isinstance(record.get("prompt"), str) or not isinstance(record.get("completion"), str):
            raise RowError("'prompt' and 'completion' must be text")
        return cls(record["prompt"], record["completion"], float(score))


@attrs.frozen(kw_only=True)
class ScoredConfig:
    temperature: float = option(1.0, help="of the weights", unit="score units", source="Peng et al. 2019, eq. 7", gt=0)
    max_weight: float = option(20.0, help="weights are cut here", source="Peng et al. 2019, section 5", gt=0)


@hookimpl
def rlhf_algorithms() -> Iterable[AlgorithmEntry]:
    yield AlgorithmEntry(
        name="scored",
        summary="advantage-weighted regression on scored completions",
        config=ScoredConfig,
        impl="rlhf_scored.algorithm:Scored",
        data=ScoredRow,
        roles=(POLICY, Role("judge", trainable=True, head="scalar", start="policy", head_init="zero")),
    )
