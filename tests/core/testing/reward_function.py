"""A user's reward function."""

from __future__ import annotations


def score(completion: str, word: str) -> float:
    return float(word in completion.lower())
