"""The manifest of `ifeval`; no torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import RewardEntry, hookimpl, option


@attrs.frozen(kw_only=True)
class IFEvalConfig:
    """Options of `ifeval`."""

    weight: float = option(1.0, help="factor of this source in the sum of rewards; may be negative")
    partial: bool = option(
        False, help="score the share of a row's instructions that are followed, instead of 1 where all are and else 0"
    )
    names_column: str = option(
        "instruction_id_list", help="column with the names of a row's instructions, such as punctuation:no_comma",
        source="IFEval's data set",
    )  # fmt: skip
    arguments_column: str = option(
        "kwargs", help="column with their arguments, a mapping for each name in turn; null stands for none",
        source="IFEval's data set",
    )  # fmt: skip


@hookimpl
def rlhf_rewards() -> Iterable[RewardEntry]:
    yield RewardEntry(
        name="ifeval",
        summary="verifiable instructions in the manner of IFEval: lengths, keywords, formats, case, ends",
        config=IFEvalConfig,
        impl="rlhf_ifeval.reward:IFEval",
        columns=lambda config: (config.names_column, config.arguments_column),
        api_version=1,
    )
