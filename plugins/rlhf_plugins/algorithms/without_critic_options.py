"""Options of the algorithms without a critic; no torch here."""

from __future__ import annotations

import attrs

from rlhf.api import option


@attrs.frozen(kw_only=True)
class RegularisedConfig:
    """Options of all of them: passes over a step's experience, and what holds the policy."""

    epochs: int = option(1, help="passes over each batch of rollouts", ge=1)
    minibatches: int = option(1, help="optimiser steps a pass", ge=1)
    kl_coef: float = option(0.0, help="weight of the KL to the reference; 0 needs no reference", ge=0)
    kl_in: str = option("loss", help="the KL is part of the loss or taken off the reward", choices=("loss", "reward"))
    kl_estimator: str = option("k3", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))
    kl_correction: bool = option(
        False, help="multiply the KL in the loss by the ratio: its expected gradient is then the KL's own",
        source="DeepSeek-V3.2",
    )  # fmt: skip
    entropy_coef: float = option(
        0.0, help="weight of the entropy bonus; above 0 costs one more reduction a token", ge=0
    )

    def __attrs_post_init__(self) -> None:
        if self.kl_coef and self.kl_in == "loss" and self.kl_estimator == "k1" and not self.kl_correction:
            raise ValueError(
                "kl_estimator k1 in the loss has an expected gradient of zero: give k2 or k3, or kl_correction"
            )
        if self.kl_correction and self.kl_in != "loss":
            raise ValueError("kl_correction is of a KL in the loss: give kl_in loss, or leave it out")
        if self.kl_correction and self.kl_estimator == "k2":
            raise ValueError("kl_correction takes kl_estimator k1 or k3: times the ratio, k2's mean is no KL")


@attrs.frozen(kw_only=True)
class GroupConfig(RegularisedConfig):
    """Options of those that compare a group of responses to one prompt."""

    group_size: int = option(8, help="responses to each prompt", ge=2)
    scale: str = option(
        "group", help="rewards less the group's mean are divided by the group's deviation, the batch's, or nothing",
        choices=("group", "batch", "none"),
    )  # fmt: skip
    several: str = option(
        "sum", help="several rewards are added up, then compared; or each is compared, then they are added up (GDPO)",
        source="GDPO, Liu et al. 2026", choices=("sum", "each"),
    )  # fmt: skip
    drop_flat: bool = option(
        False, help="leave groups whose rewards are all equal out: less to compute, and means are over the rest"
    )
    sampling_rounds: int = option(
        1, help="with drop_flat: times that a step samples at most; further prompts take the place of groups that were "
        "left out, until as many are there as the step has prompts",
        source="DAPO, dynamic sampling", ge=1,
    )  # fmt: skip
    overlong_buffer: int | None = option(
        0, help="the last tokens before the longest response in which a response's reward falls; 0 punishes none",
        unit="tokens", source="DAPO, soft overlong punishment", ge=0,
    )  # fmt: skip
    overlong_penalty: float = option(
        1.0, help="what is taken off the reward at the longest response", unit="reward units", ge=0
    )
    max_length: int | None = option(
        None, help="the longest response, for overlong_buffer and mean constant; left out, the engine's max_new_tokens",
        unit="tokens", ge=1,
    )  # fmt: skip

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.sampling_rounds > 1 and not self.drop_flat:
            raise ValueError("sampling_rounds replaces the groups that drop_flat leaves out: give drop_flat, too")
        shaped = "overlong_buffer" if self.overlong_buffer != 0 else ""
        shaped = "kl_in reward" if self.kl_coef and self.kl_in == "reward" else shaped
        if self.several == "each" and shaped:
            raise ValueError(f"several each compares rewards as they are given, and {shaped} changes their sum")
        if self.several == "each" and self.scale != "group":
            raise ValueError(f"several each divides by each group's deviation: give scale group, not {self.scale}")


_COVARIANCE = "verl, as the authors set it"


@attrs.frozen(kw_only=True)
class GRPOConfig(GroupConfig):
    """Options of `grpo`."""

    clip_low: float = option(0.2, help="how far below 1 the ratio may pull a token", source="PPO, eq. 7", gt=0, le=1)
    clip_high: float = option(0.2, help="how far above 1", source="PPO, eq. 7", gt=0)
    mean: str = option(
        "response", help="losses: a mean over each response's tokens, then over responses; over all tokens; or a sum "
        "divided by responses times max_length", choices=("response", "token", "constant"),
    )  # fmt: skip
    covariance: str = option(
        "none", help="of tokens whose log-prob and advantage vary together most, some have no gradient; or the highest "
        "are pulled back to where they were, and no ratio is clipped",
        source="Clip-Cov and KL-Cov, Cui et al. 2025", choices=("none", "clip", "kl"),
    )  # fmt: skip
    covariance_share: float = option(
        2e-4, help="of all tokens, those that are held back; one at least, where any may be", gt=0, le=1
    )
    covariance_low: float = option(1.0, help="covariance clip: those above it may be drawn", source=_COVARIANCE)
    covariance_high: float = option(5.0, help="covariance clip: those below it", source=_COVARIANCE)
    covariance_coef: float = option(
        1.0, help="covariance kl: weight of the distance", unit="advantage units a nat", source=_COVARIANCE, ge=0
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.covariance_low < self.covariance_high:
            low, high = self.covariance_low, self.covariance_high
            raise ValueError(f"covariance_low {low} must be below covariance_high {high}")


@attrs.frozen(kw_only=True)
class DrGRPOConfig(GRPOConfig):
    """Options of `dr-grpo`."""

    scale: str = option(
        "none", help="rewards less the group's mean are divided by the group's deviation, the batch's, or nothing",
        source="Dr. GRPO", choices=("group", "batch", "none"),
    )  # fmt: skip
    mean: str = option(
        "constant", help="losses: a mean over each response's tokens, then over responses; over all tokens; or a sum "
        "divided by responses times max_length", source="Dr. GRPO", choices=("response", "token", "constant"),
    )  # fmt: skip


@attrs.frozen(kw_only=True)
class DAPOConfig(GRPOConfig):
    """Options of `dapo`."""

    clip_high: float = option(0.28, help="how far above 1", source="DAPO", gt=0)
    mean: str = option(
        "token", help="losses: a mean over each response's tokens, then over responses; over all tokens; or a sum "
        "divided by responses times max_length", source="DAPO", choices=("response", "token", "constant"),
    )  # fmt: skip
    drop_flat: bool = option(
        True, help="leave groups whose rewards are all equal out: less to compute, and means are over the rest"
    )
    sampling_rounds: int = option(
        3, help="with drop_flat: times that a step samples at most; further prompts take the place of groups that were "
        "left out, until as many are there as the step has prompts; the paper has no bound",
        source="DAPO, dynamic sampling", ge=1,
    )  # fmt: skip
    overlong_buffer: int | None = option(
        None, help="the last tokens before the longest response in which a response's reward falls; 0 punishes none; "
        "left out, a fifth of the longest, as published", unit="tokens", source="DAPO, soft overlong punishment", ge=0,
    )  # fmt: skip


@attrs.frozen(kw_only=True)
class GFPOConfig(GRPOConfig):
    """Options of `gfpo`."""

    group_size: int = option(16, help="responses to each prompt", ge=2)
    retain: int = option(8, help="of a group, those that are learnt from", source="GFPO", ge=2)
    prefer: str = option(
        "short", help="which: the shortest, or those with the most reward a token", source="GFPO",
        choices=("short", "efficient"),
    )  # fmt: skip

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.retain > self.group_size:
            raise ValueError(f"retain {self.retain} is more than the group_size {self.group_size}")


@attrs.frozen(kw_only=True)
class RLOOConfig(RegularisedConfig):
    """Options of `rloo`."""

    group_size: int = option(4, help="responses to each prompt", ge=2)
    kl_coef: float = option(0.05, help="weight of the KL to the reference; 0 needs no reference", ge=0)
    kl_in: str = option("reward", help="the KL is part of the loss or taken off the reward", choices=("loss", "reward"))
    kl_estimator: str = option("k1", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))
    clip_low: float = option(0.2, help="how far below 1 the ratio may pull a token", source="PPO, eq. 7", gt=0, le=1)
    clip_high: float = option(0.2, help="how far above 1", source="PPO, eq. 7", gt=0)


@attrs.frozen(kw_only=True)
class ReinforceConfig(RegularisedConfig):
    """Options of `reinforce++`."""

    group_size: int = option(1, help="responses to each prompt; above 1 their mean is taken off the score", ge=1)
    gamma: float = option(1.0, help="discount a token", gt=0, le=1)
    clip_range: float = option(0.2, help="how far the ratio may pull a token", source="PPO, eq. 7", gt=0, le=1)
    kl_coef: float = option(0.01, help="weight of the KL to the reference; 0 needs no reference", ge=0)
    kl_in: str = option("reward", help="the KL is part of the loss or taken off the reward", choices=("loss", "reward"))
    kl_estimator: str = option("k1", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))


@attrs.frozen(kw_only=True)
class ReinforceBaselineConfig(ReinforceConfig):
    """Options of `reinforce++-baseline`."""

    group_size: int = option(8, help="responses to each prompt; above 1 their mean is taken off the score", ge=2)
    kl_coef: float = option(0.01, help="weight of the KL to the reference; 0 needs no reference", ge=0)
    kl_in: str = option("loss", help="the KL is part of the loss or taken off the reward", choices=("loss", "reward"))
    kl_estimator: str = option("k2", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))


@attrs.frozen(kw_only=True)
class RemaxConfig(RegularisedConfig):
    """Options of `remax`."""

    clip_range: float = option(0.2, help="how far the ratio may pull a token", source="PPO, eq. 7", gt=0, le=1)
    kl_coef: float = option(0.01, help="weight of the KL to the reference; 0 needs no reference", ge=0)
    kl_in: str = option("reward", help="the KL is part of the loss or taken off the reward", choices=("loss", "reward"))
    kl_estimator: str = option("k1", help="of the KL a token", source="Schulman 2020", choices=("k1", "k2", "k3"))


_CLIP_SOURCE = "GSPO, section 5.1"
_LUSPO = "LUSPO, section 5.1, as TRL has it"


@attrs.frozen(kw_only=True)
class GSPOConfig(GroupConfig):
    """Options of `gspo`."""

    clip_low: float = option(3e-4, help="how far below 1 a response's ratio may pull", source=_CLIP_SOURCE, gt=0, le=1)
    clip_high: float = option(4e-4, help="how far above 1", source=_CLIP_SOURCE, gt=0)
    mean: str = option("response", help="of a response's losses, before the mean over responses",
                       choices=("response", "sum"))  # fmt: skip


@attrs.frozen(kw_only=True)
class LUSPOConfig(GSPOConfig):
    """Options of `luspo`."""

    clip_low: float = option(2e-3, help="how far below 1 a response's ratio may pull", source=_LUSPO, gt=0, le=1)
    clip_high: float = option(2.5e-3, help="how far above 1", source=_LUSPO, gt=0)
    mean: str = option("sum", help="of a response's losses, before the mean over responses",
                       source="LUSPO", choices=("response", "sum"))  # fmt: skip


@attrs.frozen(kw_only=True)
class CISPOConfig(GroupConfig):
    """Options of `cispo`."""

    cap: float = option(5.0, help="the largest ratio that a token is weighed by", source="ScaleRL, as TRL has it", gt=0)


@attrs.frozen(kw_only=True)
class SAPOConfig(GroupConfig):
    """Options of `sapo`."""

    tau_pos: float = option(1.0, help="temperature where the advantage is above 0", source="SAPO", gt=0)
    tau_neg: float = option(1.05, help="temperature elsewhere", source="SAPO", gt=0)


@attrs.frozen(kw_only=True)
class VESPOConfig(GroupConfig):
    """Options of `vespo`."""

    power_pos: float = option(2.0, help="k of the weight where the advantage is 0 or above", source="VESPO", gt=0)
    rate_pos: float = option(
        3.0, help="lambda there; the weight is highest at a ratio of k / lambda", source="VESPO", gt=0
    )
    power_neg: float = option(3.0, help="k where it is below 0", source="VESPO", gt=0)
    rate_neg: float = option(2.0, help="lambda there", source="VESPO", gt=0)


@attrs.frozen(kw_only=True)
class DPPOConfig(GroupConfig):
    """Options of `dppo`."""

    divergence: str = option(
        "tv", help="of the sampled token against all others: total variation, or KL from the old policy",
        source="DPPO", choices=("tv", "kl"),
    )  # fmt: skip
    delta_low: float | None = option(
        None, help="the divergence up to which a token is made less likely; left out, .15 of tv, .05 of kl",
        source="DPPO", gt=0,
    )  # fmt: skip
    delta_high: float | None = option(None, help="up to which it is made more likely; left out, the same", gt=0)
    cap: float = option(20.0, help="the largest ratio that a token is weighed by", source="DPPO, as TRL had it", gt=0)
