"""GSPO and LUSPO, CISPO, SAPO: what is averaged how, on the shapes that are tested by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from worked import EXACT, NEW, RHO, close, double, of_group

from rlhf.interfaces import Context
from rlhf_plugins.algorithms.cispo import CISPO
from rlhf_plugins.algorithms.gspo import GSPO
from rlhf_plugins.algorithms.sapo import SAPO
from rlhf_plugins.algorithms.without_critic_options import CISPOConfig, GSPOConfig, LUSPOConfig, SAPOConfig

Make = Callable[..., Any]


S = [math.exp((0.4 - 0.05 - 0.5) / 3), math.exp(0.5)]  # of the responses: .951 and 1.649


def test_gspo_clips_a_response(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    for config, weight in ((GSPOConfig(clip_low=0.1, clip_high=0.2), 1), (LUSPOConfig(clip_low=0.1, clip_high=0.2), 3)):
        logp = double(NEW, True)
        loss = GSPO(config, context).loss(of_group(rollouts, batch, [1.0, 2.0]), hand(policy={"logp": logp}))
        assert float(loss.detach()) == pytest.approx((-S[0] * weight - 2 * 1.2) / 2, **EXACT)  # the second is clipped
        loss.backward()
        assert logp.grad is not None  # A s / n of the first, by its tokens; LUSPO: A s
        close(logp.grad, [-S[0] * weight / 3 / 2] * 3 + [0.0])


def test_gspo_clips_each_side_by_its_own(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = GSPO(GSPOConfig(clip_low=0.01, clip_high=0.5), context)
    loss = algorithm.loss(of_group(rollouts, batch, [-1.0, 1.0]), hand(policy={"logp": double(NEW)}))
    assert float(loss) == pytest.approx((0.99 - 1.5) / 2, **EXACT)


def test_cispo_is_a_mean_over_tokens(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = CISPO(CISPOConfig(cap=1.4), context)
    loss = algorithm.loss(of_group(rollouts, batch, [1.0, -2.0]), hand(policy={"logp": double(NEW)}))
    weights = [1.4, RHO[1], RHO[2], 1.4]
    expected = [-w * a * n for w, a, n in zip(weights, [1, 1, 1, -2], NEW, strict=True)]
    assert float(loss) == pytest.approx(sum(expected) / 4, **EXACT)


def test_sapo_is_a_mean_over_tokens_then_responses(context: Context, rollouts: Make, batch: Make, hand: Make) -> None:
    algorithm = SAPO(SAPOConfig(tau_pos=1.0, tau_neg=2.0), context)
    loss = algorithm.loss(of_group(rollouts, batch, [1.0, -2.0]), hand(policy={"logp": double(NEW)}))
    gate = [4 / tau / (1 + math.exp(-tau * (rho - 1))) for tau, rho in zip([1, 1, 1, 2], RHO, strict=True)]
    assert float(loss) == pytest.approx((-sum(gate[:3]) / 3 + 2 * gate[3]) / 2, **EXACT)
