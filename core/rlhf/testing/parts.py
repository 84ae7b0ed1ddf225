"""The kit's own components: a reward that any algorithm can raise, and the plainest algorithms, for what isn't one.

They are in the registry of the kit's runs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlhf.entries import POLICY, AlgorithmEntry, Entry, RewardEntry, Role
from rlhf.rows import CompletionRow
from rlhf.testing.model import BAD, GOOD

REWARD, IMITATE, ANCHORED, REINFORCE = "kit-letters", "kit-imitate", "kit-anchored", "kit-reinforce"


def entries() -> Iterator[Entry]:
    """The descriptions, made without torch."""
    yield RewardEntry(name=REWARD, summary="share of good letters", impl="rlhf.testing.parts_at_work:Letters")
    yield AlgorithmEntry(
        name=IMITATE,
        summary="likelihood of completions",
        impl="rlhf.testing.parts_at_work:Imitate",
        data=CompletionRow,
        defaults={"optim.learning_rate": 1e-2},
    )
    yield AlgorithmEntry(
        name=ANCHORED,
        summary="likelihood of completions, near a reference",
        impl="rlhf.testing.parts_at_work:Anchored",
        data=CompletionRow,
        roles=(POLICY, Role("reference", start="policy")),
        defaults={"optim.learning_rate": 1e-2},
    )
    yield AlgorithmEntry(
        name=REINFORCE,
        summary="log-probs times rewards",
        impl="rlhf.testing.parts_at_work:Reinforce",
        requires={"rollouts"},
        defaults={"optim.learning_rate": 1e-2},
    )


def share(texts: Iterable[str]) -> list[float]:
    """Of each text, the share of good letters among good and bad ones; of one without either, a half, which is what
    chance gives."""
    found = []
    for text in texts:
        good, bad = (sum(text.count(letter) for letter in letters) for letters in (GOOD, BAD))
        found.append(good / (good + bad) if good + bad else 0.5)
    return found
