"""The manifest of the algorithms that learn from preferences: options and entries; no torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs

from rlhf.api import POLICY, AlgorithmEntry, LabelledRow, Passes, PreferenceRow, Role, option

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "aot", "aot_unpaired", "sft",
)  # fmt: skip
DPO_SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
"""Those with label smoothing."""
DPO_DIVERGENT = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
"""Those of the difference of two scores, which other divergences put in the place of log-ratios."""


def weighted(text: str, known: Sequence[str]) -> dict[str, float]:
    """Weights by name, of text such as "sigmoid:0.8,sft:0.2"; a name alone weighs 1.

    Raises:
        ValueError: another name, one twice, or a weight that is no number above 0.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        name, colon, number = (part.strip() for part in item.partition(":"))
        if name not in known:
            raise ValueError(f"loss must be of {', '.join(known)}, with weights or without, not {name!r} in {text!r}")
        if name in found:
            raise ValueError(f"loss {text!r} names {name} twice")
        try:
            found[name] = float(number) if colon else 1.0
        except ValueError:
            found[name] = math.nan
        if not (math.isfinite(found[name]) and found[name] > 0):
            raise ValueError(f"loss {text!r}: the weight of {name} must be a number above 0, not {number!r}")
    return found


@attrs.frozen(kw_only=True)
class DPOConfig:
    """Options of `dpo`."""

    beta: float = option(0.1, help="how strongly the policy is held to the reference", gt=0)
    loss: str = option(
        "sigmoid", help=f"one, or several with their weights, as sigmoid:0.8,sft:0.2: {' | '.join(DPO_LOSSES)}"
    )
    label_smoothing: float | None = option(
        None, help=f"assumed share of swapped pairs, of {', '.join(DPO_SMOOTHED)}; left out: 0, and of exo_pair 0.001",
        source="cDPO, eq. 3", ge=0, lt=0.5,
    )  # fmt: skip
    divergence: str = option(
        "reverse_kl", help="what holds the policy to the reference", source="Wang et al. 2023, table 1",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    )  # fmt: skip
    alpha: float = option(0.5, help="of divergence alpha: 1 is forward_kl, towards 0 it is reverse_kl", gt=0, le=1)
    discopop_tau: float = option(0.05, help="temperature of discopop's blend", source="Lu et al. 2024", gt=0)

    def __attrs_post_init__(self) -> None:
        losses = self.losses
        if self.label_smoothing and not set(losses) & set(DPO_SMOOTHED):
            raise ValueError(f"label_smoothing is defined for loss {', '.join(DPO_SMOOTHED)}, not {self.loss}")
        if "exo_pair" in losses and self.label_smoothing == 0:
            raise ValueError("exo_pair needs a label_smoothing above 0; leave it out for 0.001")
        fixed = sorted(set(losses) - {*DPO_DIVERGENT, "sft"})
        if self.divergence != "reverse_kl" and fixed:
            raise ValueError(
                f"divergence {self.divergence} is defined for loss {', '.join(DPO_DIVERGENT)}, not {fixed[0]}"
            )

    @property
    def losses(self) -> dict[str, float]:
        """Weight of each loss."""
        return weighted(self.loss, DPO_LOSSES)


@attrs.frozen(kw_only=True)
class SimPOConfig:
    """Options of `simpo`."""

    beta: float = option(2.0, help="scale of the mean log-probs that stand for rewards", source="SimPO, 2 to 10", gt=0)
    gamma: float = option(1.0, help="reward by which the chosen should be ahead", source="SimPO, eq. 6", ge=0)
    sft_coef: float = option(0.0, help="weight of the chosen completions' negative log-likelihood a token", ge=0)


@attrs.frozen(kw_only=True)
class ORPOConfig:
    """Options of `orpo`."""

    odds_coef: float = option(0.1, help="lambda, weight of the log odds ratio", source="ORPO, eq. 6", ge=0)


@attrs.frozen(kw_only=True)
class CPOConfig:
    """Options of `cpo`."""

    beta: float = option(0.1, help="scale of the summed log-probs that stand for rewards", gt=0)
    sft_coef: float = option(1.0, help="weight of the chosen completions' negative log-likelihood a token", ge=0)
    label_smoothing: float = option(0.0, help="assumed share of swapped pairs", source="cDPO, eq. 3", ge=0, lt=0.5)


@attrs.frozen(kw_only=True)
class KTOConfig:
    """Options of `kto`."""

    beta: float = option(0.1, help="how strongly the policy is held to the reference", gt=0)
    desirable_weight: float = option(
        1.0, help="weight of a good completion; times their number it should be like the bad ones'", gt=0
    )
    undesirable_weight: float = option(1.0, help="weight of a bad completion", gt=0)
    kl_baseline: str = option(
        "mismatched", help="what log-ratios are compared with: the minibatch's mean over prompts with another row's "
        "completion, over its own completions, or 0",
        source="KTO, section 4.1", choices=("mismatched", "matched", "none"),
    )  # fmt: skip


def kto_passes(config: KTOConfig) -> Passes:
    """The reference of each row once; and what the baseline takes, each step."""
    scored = {"mismatched": ("policy", "reference"), "matched": ("policy", "reference"), "none": ("reference",)}
    return Passes(scored=scored[config.kl_baseline], once=config.kl_baseline != "mismatched")


def entries() -> Iterable[AlgorithmEntry]:
    """All of them."""
    yield AlgorithmEntry(
        name="dpo",
        summary="direct preference optimisation, 15 losses: sigmoid, IPO, robust, AOT, ...",
        config=DPOConfig,
        impl="rlhf_plugins.algorithms.dpo:DPO",
        data=PreferenceRow,
        roles=(POLICY, Role("reference", start="policy")),
        footprint=lambda config: Passes(responses=2, grouped=True, once=True),
        defaults={"optim.learning_rate": 1e-6, "batch_size": 32},
    )
    for name, summary, config, impl in (
        ("simpo", "simple preference optimisation: mean log-probs with a margin, no reference", SimPOConfig, "SimPO"),
        ("orpo", "fine-tuning and preference in one, by odds ratios, no reference", ORPOConfig, "ORPO"),
        (
            "cpo",
            "contrastive preference optimisation: likelihoods and the chosen learnt, no reference",
            CPOConfig,
            "CPO",
        ),
    ):
        yield AlgorithmEntry(
            name=name,
            summary=summary,
            config=config,
            impl=f"rlhf_plugins.algorithms.{name}:{impl}",
            data=PreferenceRow,
            footprint=lambda config: Passes(responses=2, grouped=True),
            defaults={"optim.learning_rate": 1e-6, "batch_size": 32},
        )
    yield AlgorithmEntry(
        name="kto",
        summary="Kahneman-Tversky optimisation: completions marked good or bad",
        config=KTOConfig,
        impl="rlhf_plugins.algorithms.kto:KTO",
        data=LabelledRow,
        roles=(POLICY, Role("reference", start="policy")),
        footprint=kto_passes,
        defaults={"optim.learning_rate": 1e-6, "batch_size": 32},
    )
