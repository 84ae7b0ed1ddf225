"""Rewards, each with one error."""

from __future__ import annotations

from typing import Any

from rlhf.api import Failed, Reward, Rollouts, Score, State


class Plain(Reward):
    """The length of the text."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [float(len(text)) for text in rollouts.texts]


class Short(Plain):
    """One number too few."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return super().judge(rollouts, score)[:-1]


class ByOrder(Plain):
    """Numbers by the place in the batch."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [float(i) for i in range(len(rollouts))]


class OfTheBatch(Plain):
    """Less the batch's mean."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        lengths = super().judge(rollouts, score)
        return [length - sum(lengths) / len(lengths) for length in lengths]


class NeedsRollouts(Plain):
    """Looks for the longest of none."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        max(rollouts.texts)
        return super().judge(rollouts, score)


class NeedsText(Plain):
    """Reads the first letter of nothing."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [float(ord(text[0])) for text in rollouts.texts]


class NothingForFailure(Plain):
    """None where there is no number."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [None if " " in text else 1.0 for text in rollouts.texts]


class Silent(Plain):
    """A failure without a reason."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [Failed("") if " " in text else 1.0 for text in rollouts.texts]


class Meddling(Plain):
    """Writes into the rows."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        for row in rollouts.rows:
            row.extra["seen"] = True
        return super().judge(rollouts, score)


class HiddenColumn(Plain):
    """Reads a column that it doesn't name."""

    def judge(self, rollouts: Rollouts, score: Score) -> Any:
        return [float(row.extra["answer"] == text) for row, text in zip(rollouts.rows, rollouts.texts, strict=True)]


class Unsaved(Plain):
    """A state that no checkpoint can hold."""

    def state(self) -> State:
        return {"seen": {1}}
