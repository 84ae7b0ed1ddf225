"""Roles and modules: who shares what, who has gradients, and metrics that ranks reduce exactly."""

from __future__ import annotations

from typing import Any, cast

import attrs
import pytest
import torch
from torch import Tensor

from built import parts_of, some
from fake_ranks import in_two_ranks
from rlhf.experience import Batch, Experience, token_mean
from rlhf.interfaces import Algorithm, StepResult
from rlhf.loop import Loop, Parts
from rlhf.metrics import MetricSink
from rlhf.scores import ScoreRequest
from rlhf.scoring import Scorer
from rlhf.sequences import Sequences
from rlhf.world import World
from rlhf_plugins.policies.hf import HFPolicy


@pytest.fixture(scope="module")
def dpo_lora() -> Parts:
    return parts_of(algo="dpo", mem="fp32,lora")


@pytest.fixture(scope="module")
def shared() -> Parts:
    return parts_of(algo={"name": "ppo", "value_model": "shared"})


@pytest.fixture(scope="module")
def separate() -> Parts:
    return parts_of(algo="ppo")


def test_a_reference_behind_adapters_is_the_policys_base(dpo_lora: Parts) -> None:
    models, sequences = dpo_lora.models, some()
    assert list(models.trained.bodies) == ["policy"] and not models.frozen.bodies  # one module, two roles
    policy, reference = Scorer(models, 10_000).together(sequences, "policy", "reference")
    assert torch.equal(policy.logp, reference.logp)  # an adapter starts at zero
    try:
        for name, parameter in models.trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        moved = Scorer(models, 10_000)(sequences, "policy").logp
        assert not torch.allclose(moved, policy.logp, atol=1e-3)
        assert torch.equal(Scorer(models, 10_000)(sequences, "reference").logp, reference.logp)
        assert torch.equal(Scorer(models, 10_000)(sequences, "policy").logp, moved)  # its adapters are back on
    finally:
        for name, parameter in models.trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)


def test_only_trained_roles_have_gradients(dpo_lora: Parts, separate: Parts) -> None:
    for parts in (dpo_lora, separate):
        gradient = Scorer(parts.models, 10_000, gradient=True)
        assert gradient(some(), "policy").logp.requires_grad
        assert not gradient(some(), "reference").logp.requires_grad
        assert not Scorer(parts.models, 10_000)(some(), "policy").logp.requires_grad
    trained = {name for name, p in dpo_lora.models.trained.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any(p.requires_grad for p in separate.models.frozen.parameters())


def test_what_is_frozen_has_no_gradient_even_where_a_policy_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    load = HFPolicy.load
    monkeypatch.setattr(HFPolicy, "load", lambda self, spec: load(self, spec).requires_grad_(True))
    models = parts_of(algo="ppo").models
    assert list(models.frozen.bodies) == ["reference"]
    assert not any(p.requires_grad for p in models.frozen.parameters())


def test_each_role_starts_from_a_seed_of_its_own(separate: Parts) -> None:
    seeds = {name: spec.seed for name, spec in separate.models.specs.items()}
    assert list(seeds) == ["policy", "reference", "value"] and len(set(seeds.values())) == 3


def test_scores_come_in_the_order_asked_for(separate: Parts) -> None:
    sequences = some()
    asked = ["value", "reference", "policy", "value"]
    scores = separate.models.forward([ScoreRequest(role, sequences) for role in asked])
    assert [score.role for score in scores] == asked
    assert all((score.values_ is None) == (score.role != "value") for score in scores)


def test_a_value_head_on_the_trunk_shares_its_forward_and_its_gradient(shared: Parts, separate: Parts) -> None:
    models = shared.models
    assert list(models.trained.bodies) == ["policy"] and list(models.trained.heads) == ["value"]
    forwards = []
    base: Any = models.body("policy")
    hook = base.base_model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        head = cast(Any, models.trained.heads["value"])
        torch.nn.init.constant_(head.weight, 0.01)
        policy, value = Scorer(models, 10_000, gradient=True).together(some(), "policy", "value")
        together = len(forwards)
        Scorer(models, 10_000, gradient=True)(some(), "policy")
        assert together == len(forwards) - together  # both roles cost what one does
        value.values.sum().backward()
        assert all(p.grad is not None for p in models.trained.heads.parameters())
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in base.base_model.parameters())
        assert policy.logp.requires_grad
    finally:
        hook.remove()
        models.trained.zero_grad(set_to_none=True)
    assert "value" in separate.models.trained.bodies  # while a separate one is a module of its own


def test_a_role_is_trained_at_its_own_rate() -> None:
    parts = parts_of(algo={"name": "ppo", "value_learning_rate": 0.125}, optim={"name": "adamw", "learning_rate": 0.5})
    optimizer = cast(Any, parts.backend)._steps.optimizer
    owner = {id(p): name.split(".")[1] for name, p in parts.models.trained.named_parameters()}
    rates = {owner[id(p)]: group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {"policy": 0.5, "value": 0.125}


def test_a_mean_over_fake_ranks_is_the_mean_of_all_values_not_of_means() -> None:
    def work(rank: int, world: World) -> dict[str, float]:
        sink = MetricSink()
        sink.mean("a", torch.tensor([1.0, 2.0, 6.0]) if rank == 0 else torch.tensor([11.0]))
        if rank == 1:
            sink.mean("only there", 4.0)
            sink.mean("masked", torch.tensor([1.0, 100.0]), torch.tensor([True, False]))
            sink.mean("nothing", torch.zeros(0))
        first = sink.drain(world)
        assert sink.drain(world) == {}
        return first

    first, second = in_two_ranks(work)
    assert first == second == {"a": 5.0, "only there": 4.0, "masked": 1.0}


def test_means_add_up_over_calls_and_graphs_are_left_behind() -> None:
    sink = MetricSink()
    sink.mean("x", torch.tensor([[1.0, 2.0]], requires_grad=True))
    sink.mean("x", 6)
    assert sink.drain(World()) == {"x": 3.0}


def test_fake_ranks_divide_by_the_counts_of_the_whole_step(separate: Parts) -> None:
    """Two ranks with 3 and 1 responses: the gradient that they sum is that of one rank with all 4."""
    torch.manual_seed(0)
    lengths = [4, 2, 5, 3]
    values = [torch.randn(n, dtype=torch.float64) for n in lengths]

    class Mean:
        unit, mixes = "sequence", True
        prepare = Algorithm.prepare

        def loss(self, batch: Batch, score: Any) -> Tensor:
            x = batch["x"].clone().requires_grad_()
            loss = token_mean(x, batch)
            batch.log("mean", loss)
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            assert gradient.unique().tolist() == [1 / 14]
            return loss

    def metrics(rows: list[int], world: World) -> dict[str, float]:
        class Fake:
            """A backend that has nothing to step."""

            device, sharded = "cpu", False

            def __init__(self) -> None:
                self.world = world

            def backward(self, loss: Tensor, last: bool) -> None: ...

            def update(self, factor: float) -> Any:
                return StepResult(0.0, 0.0)

        sequences = Sequences.of([torch.tensor([1])] * len(rows), [torch.zeros(lengths[i]).long() for i in rows])
        experience = Experience(sequences, {"x": torch.cat([values[i] for i in rows])})
        parts = attrs.evolve(separate, backend=cast(Any, Fake()), algorithm=cast(Any, Mean()))
        loop = Loop(parts, cast(Any, None), lambda text: None)
        return loop._update(experience, 1.0)

    alone = metrics([0, 1, 2, 3], World())
    first, second = in_two_ranks(lambda rank, world: metrics([0, 1, 2] if rank == 0 else [3], world))
    assert first == second
    mean = float(torch.cat(values).mean())
    assert alone["loss"] == pytest.approx(mean, rel=1e-12) and first["loss"] == pytest.approx(mean, rel=1e-12)
    assert first["mean"] == pytest.approx(mean, rel=1e-6)  # logged parts are float32
