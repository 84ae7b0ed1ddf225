"""PPO: a batch and its optimiser steps against those of TRL 1.12, the last release that had PPO.

Sampling can't be made equal, so TRL is handed the tokens that our run sampled; everything after that is its own. What
its `train` computes on the way are local variables, which are read where it whitens and where it logs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from peers import CLOSE, Close, needs_trl
from ppo_step import Seen, carry_out, disturbed
from torch import Tensor

pytestmark = [pytest.mark.peer, needs_trl("1.12.0")]
BATCH, EPOCHS, RATE, TEMPERATURE, MAX_NORM = 12, 4, 1e-4, 0.8, 0.3
GAMMA, LAMBDA, KL_COEF, CLIP, VALUE_CLIP, VALUE_COEF, PENALTY = 0.97, 0.9, 0.1, 0.1, 0.05, 0.3, 0.5

Rows = list[list[float]]


@attrs.define
class Theirs:
    """What TRL computed, by response in the order of ours; padded to the longest."""

    local: Mapping[str, Tensor]
    """Variables of `train` at the end of the rollout, [B, T] or [B]."""
    epochs: Mapping[str, list[float]]
    """Of each epoch, which is one optimiser step."""

    def rows(self, name: str, lengths: list[int]) -> Rows:
        return [row[:n] for row, n in zip(self.local[name].tolist(), lengths, strict=True)]


@pytest.fixture(scope="module")
def models(tiny_model: Path, scored_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("four")
    return {
        "steady": disturbed(tiny_model, folder / "steady", "lm", 1),  # a space and two digits, then the end
        "unsure": disturbed(tiny_model, folder / "unsure", "lm", 1, noise=0.08),  # responses of many lengths
        "reference": disturbed(tiny_model, folder / "reference", "lm", 2),
        "value": disturbed(scored_model, folder / "value", "scalar", 3),
        "reward": disturbed(scored_model, folder / "reward", "scalar", 4),
    }


def ours(
    folder: Path, models: dict[str, Path], policy: str, tokens: int, max_norm: float | None = None, **algo: Any
) -> Seen:
    recipe = {
        "model": str(models[policy]),
        "roles": {name: {"model": str(models[name])} for name in ("reference", "value", "reward")},
        "reward": "model",
        "batch_size": BATCH,
        "algo": {
            "name": "ppo", "epochs": EPOCHS, "minibatches": 1, "gamma": GAMMA, "lam": LAMBDA, "kl_coef": KL_COEF,
            "clip_range": CLIP, "value_clip_range": VALUE_CLIP, "value_coef": VALUE_COEF,
            "missing_eos": "subtract", "missing_eos_value": PENALTY, **algo,
        },
        "engine": {"name": "hf", "temperature": TEMPERATURE, "max_new_tokens": tokens},
        "optim": {"name": "adamw", "learning_rate": RATE, "max_norm": max_norm},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        return carry_out(folder, recipe, monkeypatch)


def theirs(folder: Path, models: dict[str, Path], policy: str, tokens: int, seen: Seen, biased: bool = False) -> Theirs:
    """TRL's step on the responses of ours. biased: its whitening divides by n, as ours, and not by n - 1."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    def load(auto: Any, name: str) -> Any:
        return auto.from_pretrained(models[name], dtype=torch.float32)

    sequences = seen.rollouts.sequences
    prompts = [sequences.prompt(i).tolist() for i in range(BATCH)]
    responses = [response.tolist() for response in sequences.responses()]
    assert len({tuple(prompt) for prompt in prompts}) == BATCH  # each response is found by its prompt
    places: list[int] = []
    kept: dict[str, Any] = {}

    def sampled(model: Any, queries: Tensor, size: int, pad: int, config: Any) -> tuple[Tensor, Tensor]:
        """Stands for its generation: ours at each prompt, and the log-probs' logits of one forward."""
        places.extend(prompts.index([token for token in query.tolist() if token != pad]) for query in queries)
        padded = [responses[i] + [pad] * (tokens - len(responses[i])) for i in places]
        whole = torch.cat([queries, torch.tensor(padded)], dim=1)
        logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    whiten = ppo_trainer.masked_whiten

    def watched(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        found = whiten(values, mask, shift_mean)
        if biased:
            mean = ppo_trainer.masked_mean(values, mask)
            found = (values - mean) * torch.rsqrt(ppo_trainer.masked_var(values, mask, unbiased=False) + 1e-8)
        back = torch.tensor(places).argsort()  # its data loader shuffles
        local = {**sys._getframe(1).f_locals, "whitened": found}
        names = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns", "whitened")
        kept["local"] = {name: local[name][back].clone() for name in names}
        return found

    def logged(metrics: dict[str, float]) -> None:
        local = sys._getframe(1).f_locals
        names = ("pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac", "ratio")
        kept["epochs"] = {name: local[f"{name}_stats"].flatten().tolist() for name in names}

    tokenizer = AutoTokenizer.from_pretrained(models[policy])
    data = Dataset.from_dict({"input_ids": prompts})
    arguments = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, total_episodes=BATCH,
        local_rollout_forward_batch_size=BATCH, num_ppo_epochs=EPOCHS, num_mini_batches=1, num_sample_generations=0,
        response_length=tokens, stop_token="eos", missing_eos_penalty=PENALTY, temperature=TEMPERATURE,
        gamma=GAMMA, lam=LAMBDA, kl_coef=KL_COEF, cliprange=CLIP, cliprange_value=VALUE_CLIP, vf_coef=VALUE_COEF,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=MAX_NORM,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, policy),
        ref_model=load(AutoModelForCausalLM, "reference"),
        reward_model=load(AutoModelForSequenceClassification, "reward"),
        value_model=load(AutoModelForSequenceClassification, "value"),
        train_dataset=data,
        eval_dataset=data,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo_trainer, "batch_generation", sampled)
        monkeypatch.setattr(ppo_trainer, "masked_whiten", watched)
        monkeypatch.setattr(trainer, "log", logged)
        trainer.train()
    assert sorted(places) == list(range(BATCH))
    return Theirs(**kept)


def flat(rows: Rows) -> list[float]:
    return [x for row in rows for x in row]


@pytest.fixture(scope="module")
def full(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A batch whose every response fills the limit, where the definitions are the same."""
    seen = ours(tmp_path_factory.mktemp("full"), models, "steady", 3)
    assert seen.rollouts.lengths.tolist() == [3] * BATCH and set(seen.rollouts.finish) == {"length"}
    return seen


def test_a_full_batch(tmp_path: Path, models: dict[str, Path], full: Seen, close: Close) -> None:
    them = theirs(tmp_path, models, "steady", 3, full)
    lengths = full.rollouts.lengths.tolist()
    for name, (what, mine) in {
        "logprobs": ("log-probs", full.experience["logp_old"]),
        "ref_logprobs": ("reference log-probs", full.logp_ref),
        "values": ("values", full.experience["values_old"]),
        "rewards": ("rewards with KL", full.rewards),
        "advantages": ("advantages", full.advantages),
        "returns": ("returns", full.experience["returns"]),
    }.items():
        close(f"ppo, {what}", mine.tolist(), flat(them.rows(name, lengths)))
    scores = [score - PENALTY for score in full.rollouts.rewards.tolist()]
    close("ppo, penalised scores", scores, them.local["scores"].tolist())

    # It whitens by the variance of n - 1 tokens, we by that of n.
    n = sum(lengths)
    whitened = flat(them.rows("whitened", lengths))
    assert full.experience["advantages"].tolist() != pytest.approx(whitened, **CLOSE)
    scaled = full.experience["advantages"] * math.sqrt((n - 1) / n)
    close("ppo, whitened advantages, rescaled", scaled.tolist(), whitened)


def test_every_epoch_of_a_full_batch(tmp_path: Path, models: dict[str, Path], full: Seen, close: Close) -> None:
    """With that difference taken away."""
    them = theirs(tmp_path, models, "steady", 3, full, biased=True).epochs
    assert len(full.updates) == EPOCHS
    assert max(them["pg_clipfrac"]) > 0.1 and max(them["vf_clipfrac"]) > 0.1  # both clips act
    for name, mine in {
        "pg_loss": "policy/loss",
        "vf_loss": "value/loss",
        "pg_clipfrac": "policy/clip_fraction",
        "vf_clipfrac": "value/clip_fraction",
        "ratio": "policy/ratio",
    }.items():
        close(f"ppo, {mine}, {EPOCHS} epochs", [update[mine] for update in full.updates], them[name])


def test_a_batch_of_many_lengths(tmp_path: Path, models: dict[str, Path], close: Close) -> None:
    """Where a response ends before the limit, TRL's episode goes on for a position that holds no token: the score
    stands there, behind the end token, and the value read there is in the returns and in the value loss. With that
    position added to our numbers they are TRL's."""
    tokens = 5
    seen = ours(tmp_path, models, "unsure", tokens)
    them = theirs(tmp_path, models, "unsure", tokens, seen)
    lengths = seen.rollouts.lengths.tolist()
    assert len(set(lengths)) >= 3 and set(seen.rollouts.finish) == {"stop", "length"}
    for name, (what, mine) in {
        "logprobs": ("log-probs", seen.experience["logp_old"]),
        "ref_logprobs": ("reference log-probs", seen.logp_ref),
        "values": ("values", seen.experience["values_old"]),
    }.items():
        close(f"ppo, cut and ended, {what}", mine.tolist(), flat(them.rows(name, lengths)))
    scores = [
        score if finish == "stop" else score - PENALTY
        for score, finish in zip(seen.rollouts.rewards.tolist(), seen.rollouts.finish, strict=True)
    ]
    close("ppo, cut and ended, penalised scores", scores, them.local["scores"].tolist())

    longer = [min(n + 1, tokens) for n in lengths]
    rewards, advantages, returns = [], [], []
    value_rows = them.rows("values", longer)
    for mine, score, n, values in zip(seen.responses(seen.rewards), scores, lengths, value_rows, strict=True):
        r = [*mine[:-1], mine[-1] - score] + [0.0] * (len(values) - n)
        r[-1] += score
        a = [0.0] * len(r)
        after, value_after = 0.0, 0.0
        for t in reversed(range(len(r))):
            after = a[t] = r[t] + GAMMA * value_after - values[t] + GAMMA * LAMBDA * after
            value_after = values[t]
        rewards.append(r)
        advantages.append(a)
        returns.append([x + v for x, v in zip(a, values, strict=True)])
    close("ppo, cut and ended, rewards, extended", flat(rewards), flat(them.rows("rewards", longer)))
    close("ppo, cut and ended, advantages, extended", flat(advantages), flat(them.rows("advantages", longer)))
    close("ppo, cut and ended, returns, extended", flat(returns), flat(them.rows("returns", longer)))
    assert seen.advantages.tolist() != pytest.approx(flat(them.rows("advantages", lengths)), **CLOSE)

    squares = [(v - x) ** 2 for v, x in zip(flat(value_rows), flat(returns), strict=True)]
    close("ppo, cut and ended, value loss, extended", [0.5 * sum(squares) / sum(longer)], them.epochs["vf_loss"][:1])
    assert seen.updates[0]["value/loss"] != pytest.approx(them.epochs["vf_loss"][0], **CLOSE)


def test_its_gradients_are_not_clipped(tmp_path: Path, models: dict[str, Path], full: Seen) -> None:
    """It was given a `max_grad_norm`, and computes what we do without."""
    assert max(update["optim/grad_norm"] for update in full.updates) > 2 * MAX_NORM
    clipped = ours(tmp_path, models, "steady", 3, max_norm=MAX_NORM)
    them = theirs(tmp_path, models, "steady", 3, full, biased=True).epochs
    assert [update["value/loss"] for update in clipped.updates] != pytest.approx(them["vf_loss"], **CLOSE)


@pytest.mark.parametrize(
    "other", [{"lam": 0.95}, {"kl_coef": 0.12}, {"kl_estimator": "k3"}, {"missing_eos_value": 0.6}]
)
def test_the_comparison_sees_another_option(
    tmp_path: Path, models: dict[str, Path], full: Seen, other: dict[str, Any]
) -> None:
    changed = ours(tmp_path, models, "steady", 3, **other)
    them = theirs(tmp_path, models, "steady", 3, full)
    assert changed.rollouts.sequences.tokens.equal(full.rollouts.sequences.tokens)
    assert changed.advantages.tolist() != pytest.approx(flat(them.rows("advantages", [3] * BATCH)), **CLOSE)
