"""The manifest of the algorithms that learn values from given completions: options and entry; no torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import POLICY, AlgorithmEntry, Follows, Passes, RewardedRow, Role, option


@attrs.frozen(kw_only=True)
class ILQLConfig:
    """Options of `ilql`."""

    tau: float = option(
        0.7, help="expectile: 0.5 is the mean over what was done, towards 1 the best that was done", source="trlX",
        gt=0, lt=1,
    )  # fmt: skip
    gamma: float = option(0.99, help="discount a token", gt=0, le=1)
    cql_coef: float = option(0.1, help="weight of the loss that keeps unseen tokens' Q values down", ge=0)
    awac_coef: float = option(1.0, help="weight of the likelihood of the completions", ge=0)
    awac_beta: float = option(
        0.0,
        help="each token's likelihood weighs e to the power of its advantage times this, 100 at most; 0: alike",
        ge=0,
    )
    polyak: float = option(
        0.005, help="share of the Q heads that their targets take over each optimiser step", gt=0, le=1
    )
    shift: float = option(
        1.0, help="beta: so many times the Q values, the mean of the target heads, are added to the saved policy's "
        "logits; 0: none", ge=0,
    )  # fmt: skip


def ilql_roles(config: ILQLConfig) -> tuple[Role, ...]:
    """The policy, and on its trunk a value head, two Q heads and their targets."""
    value = Role("value", trainable=True, head="scalar", start="policy", shares="policy", head_init="zero")
    heads: list[Role] = []
    for name in ("q1", "q2"):
        follows = Follows(name, config.polyak)
        heads += [
            Role(name, trainable=True, head="tokens", start="policy", shares="policy", head_init="normal"),
            Role(f"target_{name}", head="tokens", start="policy", shares="policy", head_init="normal",
                 follows=follows, folded=config.shift / 2),
        ]  # fmt: skip
    return (POLICY, value, *heads)


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield AlgorithmEntry(
        name="ilql",
        summary="implicit language Q-learning from completions with rewards; the saved policy leans to higher Q values",
        config=ILQLConfig,
        impl="rlhf_plugins.algorithms.ilql:ILQL",
        data=RewardedRow,
        roles=ilql_roles,
        conflicts={"adapters"},
        footprint=lambda config: Passes(scored=()),
        defaults={"optim.learning_rate": 1e-5, "batch_size": 32},
    )
