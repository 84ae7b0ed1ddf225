"""What `--reward math` offers."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.api import Plan, PlannedComponent, RewardEntry, option


@attrs.frozen(kw_only=True)
class MathConfig:
    weight: float = option(1.0, help="factor of this source in the sum of rewards; may be negative")
    answer_column: str = option(
        "answer", help="column of the data that holds the reference, as text or LaTeX; what follows a #### counts"
    )
    extract: str = option(
        "auto",
        help="what of a response is its answer: its last \\boxed{}, or auto: that where there is one, else its last "
        "expression, as math-verify finds it",
        choices=("auto", "boxed"),
    )
    correct: float = option(1.0, help="score of an answer that equals the reference")
    wrong: float = option(0.0, help="score of another answer, or of none")
    format_weight: float = option(0.0, help="added where a response has an answer in \\boxed{}, right or wrong")
    seconds: float = option(
        5.0, help="of a processor, for one comparison; one that isn't decided by then is wrong", unit="seconds", gt=0
    )
    workers: int = option(2, help="processes that compare, of each rank", ge=1)


def _notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    config = component.config
    yield (
        f"--reward {component.key}: answers are compared by math-verify in {config.workers} processes beside each "
        f"rank, {config.seconds:g} s of a processor for each"
    )


MATH = RewardEntry(
    name="math",
    summary="right or wrong by value: formulas, fractions, sets, intervals, through math-verify",
    config=MathConfig,
    impl="rlhf_plugins.rewards.math.reward:Math",
    columns=lambda config: (config.answer_column,),
    modules={"math_verify": "pip install 'rlhf-kit[math]'"},
    notes=(_notes,),
)
