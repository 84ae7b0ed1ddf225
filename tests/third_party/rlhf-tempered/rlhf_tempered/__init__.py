"""The manifest; no torch here."""

import attrs

from rlhf.api import AlgorithmEntry, hookimpl, option


@attrs.frozen(kw_only=True)
class TemperedConfig:
    group_size: int = option(8, help="completions per prompt", gt=1)
    temperature: float = option(0.5, help="of the softmax over a group's rewards", unit="reward units", gt=0)


@hookimpl
def rlhf_algorithms():
    yield AlgorithmEntry(
        name="tempered",
        summary="reward-weighted regression within a group",
        config=TemperedConfig,
        impl="rlhf_tempered.algorithm:Tempered",
        requires={"rollouts"},
    )
