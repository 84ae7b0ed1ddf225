"""PPO's first batch and what optimiser steps make of it, from the weights to the losses, against float64 code.

What follows takes from the package only the tokens that were sampled. The model is `llama64`; rewards, advantages and
losses are loops over tokens, as in the glossary; AdamW is written out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from llama64 import Llama64
from ppo_step import Seen, carry_out, disturbed
from torch import Tensor

EPOCHS, GAMMA, LAMBDA, KL_COEF, TEMPERATURE = 3, 0.97, 0.9, 0.1, 0.8
CLIP, VALUE_CLIP, VALUE_COEF = 0.1, 0.05, 0.3
RATE, VALUE_RATE, MAX_NORM, BETA1, BETA2, EPS = 1e-4, 3e-4, 1.0, 0.8, 0.99, 1e-8
DECAY = 10.0
"""Far more than anybody uses, so that one step shows it."""
PENALTY = 0.5
"""Taken off the score of a response that didn't end."""
LOGP: dict[str, Any] = {"rel": 0.0, "abs": 5e-5}
"""Nats. Differences of logits, which are sums of some 100 float32 products, and so good to some 1e-5."""
TOKEN: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
"""Of a token's value, reward and advantage: KL_COEF of those errors, and those of the value head."""
MEAN: dict[str, Any] = {"rel": 1e-5, "abs": 5e-6}
"""Of means over the batch, where they cancel."""


@attrs.frozen
class Models:
    policy: Path
    reference: Path
    value: Path
    reward: Path


@pytest.fixture(scope="module")
def models(tiny_model: Path, scored_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Four different ones, so that none can stand for another."""
    folder = tmp_path_factory.mktemp("four")
    return Models(
        disturbed(tiny_model, folder / "policy", "lm", 1, noise=0.08),  # unsure, so that its responses differ in length
        disturbed(tiny_model, folder / "reference", "lm", 2),
        disturbed(scored_model, folder / "value", "scalar", 3),
        disturbed(scored_model, folder / "reward", "scalar", 4),
    )


@pytest.fixture(scope="module")
def seen(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return carry_out(
            tmp_path_factory.mktemp("ppo"),
            {
                "model": str(models.policy),
                "roles": {name: {"model": str(getattr(models, name))} for name in ("reference", "value", "reward")},
                "reward": "model",
                "batch_size": 12,
                "algo": {
                    "name": "ppo", "epochs": EPOCHS, "minibatches": 1, "gamma": GAMMA, "lam": LAMBDA,
                    "kl_coef": KL_COEF, "clip_range": CLIP, "value_clip_range": VALUE_CLIP, "value_coef": VALUE_COEF,
                    "value_learning_rate": VALUE_RATE, "missing_eos": "subtract", "missing_eos_value": PENALTY,
                },
                "engine": {"name": "hf", "temperature": TEMPERATURE, "max_new_tokens": 5},
                "optim": {"name": "adamw", "learning_rate": RATE, "weight_decay": DECAY, "max_norm": MAX_NORM,
                          "beta1": BETA1, "beta2": BETA2, "eps": EPS},
            },
            monkeypatch,
        )  # fmt: skip


class Float64:
    """The same, from the weights and the sampled tokens. Every list is by response, then by token."""

    def __init__(self, models: Models, prompts: list[list[int]], responses: list[list[int]], ended: list[bool]) -> None:
        self.prompts, self.responses = prompts, responses
        self.policy, self.value = Llama64(models.policy), Llama64(models.value)
        reference, judge = Llama64(models.reference), Llama64(models.reward)
        self.count = sum(len(response) for response in responses)
        self.learnt = 0
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}

        pairs = list(zip(prompts, responses, strict=True))
        with torch.no_grad():
            self.logp_old = [numbers(self.policy.logps(*pair, TEMPERATURE)) for pair in pairs]
            self.logp_ref = [numbers(reference.logps(*pair, TEMPERATURE)) for pair in pairs]
            self.values_old = [numbers(self.value.scalars(*pair)[0]) for pair in pairs]
            self.scores = [float(judge.scalars(*pair)[1]) for pair in pairs]

        self.rewards, self.advantages, self.returns = [], [], []
        for i in range(len(responses)):
            rewards = [-KL_COEF * (a - b) for a, b in zip(self.logp_old[i], self.logp_ref[i], strict=True)]
            rewards[-1] += self.scores[i] - (0.0 if ended[i] else PENALTY)
            advantages = [0.0] * len(rewards)
            after, value_after = 0.0, 0.0
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + GAMMA * value_after - self.values_old[i][t]
                after = advantages[t] = delta + GAMMA * LAMBDA * after
                value_after = self.values_old[i][t]
            self.rewards.append(rewards)
            self.advantages.append(advantages)
            self.returns.append([a + v for a, v in zip(advantages, self.values_old[i], strict=True)])
        every = [a for advantages in self.advantages for a in advantages]
        mean = sum(every) / self.count
        deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / self.count + 1e-8)
        self.whitened = [[(a - mean) / deviation for a in advantages] for advantages in self.advantages]

    def losses(self) -> tuple[Tensor, dict[str, float]]:
        """(the loss under the present weights, what a step reports)"""
        policy_loss, value_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        told = {"policy/ratio": 0.0, "policy/approx_kl": 0.0, "policy/clip_fraction": 0.0, "value/clip_fraction": 0.0}
        for i, pair in enumerate(zip(self.prompts, self.responses, strict=True)):
            logps, (values, _) = self.policy.logps(*pair, TEMPERATURE), self.value.scalars(*pair)
            for t in range(len(pair[1])):
                log_ratio, advantage = logps[t] - self.logp_old[i][t], self.whitened[i][t]
                ratio = torch.exp(log_ratio)
                free, held = -advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP)
                policy_loss = policy_loss + max(free, held)
                old, target = self.values_old[i][t], self.returns[i][t]
                near = min(max(values[t], old - VALUE_CLIP), old + VALUE_CLIP)
                far_off, near_off = (values[t] - target) ** 2, (near - target) ** 2
                value_loss = value_loss + 0.5 * max(far_off, near_off)
                told["policy/ratio"] += float(ratio.detach())
                told["policy/approx_kl"] += float((ratio - 1 - log_ratio).detach())  # k3 of sampling policy and now
                told["policy/clip_fraction"] += bool(held > free)
                told["value/clip_fraction"] += bool(near_off > far_off)
        loss = (policy_loss + VALUE_COEF * value_loss) / self.count
        told = {name: total / self.count for name, total in told.items()}
        told |= {
            "policy/loss": float(policy_loss.detach()) / self.count,
            "value/loss": float(value_loss.detach()) / self.count,
        }
        return loss, {**told, "loss": float(loss.detach())}

    def learn(self, loss: Tensor) -> float:
        """A step of AdamW, of both models, after clipping to the norm of all gradients, which is returned."""
        trained = [(w, RATE) for w in self.policy.weights.values()]
        trained += [(w, VALUE_RATE) for w in self.value.weights.values()]
        gradients = torch.autograd.grad(loss, [w for w, _ in trained])
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        scale = min(1.0, MAX_NORM / norm)
        self.learnt += 1
        with torch.no_grad():
            for i, ((w, rate), gradient) in enumerate(zip(trained, gradients, strict=True)):
                g = gradient * scale
                mean, square = self.moments.get(i, (torch.zeros_like(w), torch.zeros_like(w)))
                mean, square = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g * g
                self.moments[i] = mean, square
                m, v = mean / (1 - BETA1**self.learnt), square / (1 - BETA2**self.learnt)
                decay = DECAY if w.ndim > 1 else 0.0
                w -= rate * (decay * w + m / (v.sqrt() + EPS))
        return norm


def numbers(tensors: list[Tensor]) -> list[float]:
    return [float(x) for x in tensors]


@pytest.fixture(scope="module")
def expected(models: Models, seen: Seen) -> Float64:
    sequences = seen.rollouts.sequences
    prompts = [sequences.prompt(i).tolist() for i in range(len(sequences))]
    responses = [response.tolist() for response in sequences.responses()]
    end = json.loads((models.policy / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return Float64(models, prompts, responses, [response[-1] == end for response in responses])


@pytest.fixture(scope="module")
def steps(expected: Float64) -> list[dict[str, float]]:
    """What each epoch reports: at the first weights, after one optimiser step, and after two."""
    told = []
    for _ in range(EPOCHS):
        loss, found = expected.losses()
        told.append({**found, "optim/grad_norm": expected.learn(loss)})
    return told


def close(found: list[list[float]], wanted: list[list[float]], tolerance: dict[str, Any] = TOKEN) -> None:
    assert [len(part) for part in found] == [len(part) for part in wanted]
    flat = [x for part in found for x in part]
    assert flat == pytest.approx([x for part in wanted for x in part], **tolerance)


def test_the_batch_has_every_case(expected: Float64, seen: Seen) -> None:
    """Short and long responses, ended and cut ones, and a KL that matters."""
    assert len({len(response) for response in expected.responses}) >= 3
    assert set(seen.rollouts.finish) == {"stop", "length"}
    kl = [
        a - b
        for old, ref in zip(expected.logp_old, expected.logp_ref, strict=True)
        for a, b in zip(old, ref, strict=True)
    ]
    assert max(kl) > 0.5 and min(kl) < -0.1


def test_log_probs_values_and_scores(expected: Float64, seen: Seen) -> None:
    close(seen.responses(seen.experience["logp_old"]), expected.logp_old, LOGP)
    close(seen.responses(seen.logp_ref), expected.logp_ref, LOGP)
    close(seen.responses(seen.experience["values_old"]), expected.values_old)
    assert seen.rollouts.rewards.tolist() == pytest.approx(expected.scores, **TOKEN)


def test_rewards_advantages_and_returns(expected: Float64, seen: Seen) -> None:
    close(seen.responses(seen.rewards), expected.rewards)
    close(seen.responses(seen.advantages), expected.advantages)
    close(seen.responses(seen.experience["returns"]), expected.returns)
    close(seen.responses(seen.experience["advantages"]), expected.whitened)


def test_losses_at_the_first_weights(seen: Seen, steps: list[dict[str, float]]) -> None:
    assert steps[0]["policy/ratio"] == 1.0 and steps[0]["policy/clip_fraction"] == 0.0
    for name, value in steps[0].items():
        assert seen.updates[0][name] == pytest.approx(value, **MEAN), name


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_losses_after_optimiser_steps(seen: Seen, steps: list[dict[str, float]], epoch: int) -> None:
    found, wanted = seen.updates[epoch], steps[epoch]
    assert 0.05 < wanted["policy/clip_fraction"] < 0.95 and 0.05 < wanted["value/clip_fraction"] < 0.95
    assert wanted["policy/approx_kl"] > 0.01
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, **MEAN), name
