"""The manifest of process reward modelling: options and entry; no torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import AlgorithmEntry, Passes, Role, StepRow, option


@attrs.frozen(kw_only=True)
class PRMConfig:
    """Options of `prm`."""

    separator: str = option("\n", help="text that closes a step; the step's score is read behind it")

    def __attrs_post_init__(self) -> None:
        """
        Raises:
            ValueError: the separator is empty.
        """
        if not self.separator:
            raise ValueError("separator is empty, so no response could be cut at it")


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield AlgorithmEntry(
        name="prm",
        summary="a process reward model from completions whose steps are judged",
        config=PRMConfig,
        impl="rlhf_plugins.algorithms.prm:PRM",
        data=StepRow,
        roles=(Role("prm", trainable=True, head="scalar", head_init="normal"),),
        footprint=lambda config: Passes(),
        defaults={"optim.learning_rate": 1e-5, "batch_size": 32},
    )
