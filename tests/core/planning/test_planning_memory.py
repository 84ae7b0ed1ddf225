"""Bytes by role and phase, by hand; sharding, offload and copies as entries declare them; micro-batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_plans import CONFIG, LAYER, LONG, N, entries, phase, strategy

from rlhf.api import (
    BackendEntry,
    EngineEntry,
    MemoryEntry,
    OptimizerEntry,
    Passes,
    Role,
    Weight,
    copied,
    divided,
    moments,
    on_disk,
    on_host,
    precision,
    recomputed,
    unchanged,
)
from rlhf.compose import compose
from rlhf.entries import POLICY
from rlhf.facts import Machine
from rlhf.plan import Plan
from rlhf.planning.devices import nominal_peaks
from rlhf.planning.duration import duration
from rlhf.planning.memory import Lengths, assumed_lengths, micro_batch
from rlhf.planning.phases import predict
from rlhf.planning.text import describe
from rlhf.recipe import Recipe
from rlhf.registry import Registry


def test_full_training_in_float32_is_16_bytes_a_weight(planned: Callable[..., Plan]) -> None:
    found = predict(planned())
    (role,) = found.roles
    assert (role.parameters, role.trained) == (N, N)
    assert (role.weights, role.gradients, role.optimizer) == (4 * N, 4 * N, 8 * N)
    assert found.notes == ()
    held = phase(found, "save").device
    # on a CPU, in float32, libraries take their part: what docs/planning.md says was seen
    assert held == {"weights": 4 * N, "optimiser": 8 * N, "libraries": 42e6 + 55e6}


def test_a_frozen_role_has_weights_alone_and_may_be_of_two_bytes(planned: Callable[..., Plan]) -> None:
    mixed = strategy("fake-bf16", precision(trained=4, frozen=2, compute=2), phase="load", slot="precision")
    roles = (POLICY, Role("reference", start="policy"))
    found = predict(planned("--mem", "fake-bf16", of=entries(mixed, roles=roles)))
    policy, reference = found.roles
    assert (reference.weights, reference.gradients, reference.optimizer, reference.trained) == (2 * N, 0, 0, 0)
    assert policy.weights == 4 * N
    assert phase(found, "experience").device["weights"] == 6 * N  # scored by the reference, held by both


def test_a_shared_trunk_costs_its_head_alone(planned: Callable[..., Plan]) -> None:
    value = Role("value", trainable=True, head="scalar", start="policy", shares="policy", head_init="zero")
    found = predict(planned(of=entries(roles=(POLICY, value))))
    assert sum(role.weights for role in found.roles) == 4 * (N + 64 + 1)
    assert found.roles[1].module == "policy"


def adapters(module: Any, *_: Any) -> Any:
    """All frozen but adapters of rank 2 on q_proj, and a scalar head; the original is kept beside its copy."""
    weights = []
    for weight in module.weights:
        weights.append(attrs.evolve(weight, trained=False))
        if weight.kind == "score":
            weights.append(attrs.evolve(weight, name="score.copy"))
        if weight.name == "q_proj":
            for part, shape in (("A", (2, 64)), ("B", (64, 2))):
                weights.append(
                    Weight(name=f"q_proj.{part}", shape=shape, kind="adapter", count=weight.count, trained=True)
                )
    return attrs.evolve(module, weights=tuple(weights))


def test_a_role_on_anothers_base_costs_its_adapters_and_head_alone(planned: Callable[..., Plan]) -> None:
    value = Role("value", trainable=True, head="scalar", start="policy", head_init="zero")
    of = entries(
        strategy("fake-lora", adapters, phase="adapt", applies="trainable", provides={"adapters"}),
        strategy("fake-one", unchanged, phase="adapt", provides={"one-base"}),
        strategy("fake-ema", copied("average", bytes_each=4, of="trained"), phase="wrap"),
        roles=(POLICY, value),
    )
    plan = planned("--mem", "fake-lora,fake-one,fake-ema", of=of)
    lengths = Lengths(prompt=64, response=64)
    found = predict(plan, lengths)
    policy, joined = found.roles
    own = 2 * (2 * 64 + 64 * 2)  # two layers
    assert (policy.parameters, policy.trained) == (N + own, own)
    assert (joined.parameters, joined.trained, joined.module) == (own + 64, own + 64, "policy")
    assert (joined.weights, joined.gradients, joined.optimizer) == (4 * (own + 64), 4 * (own + 64), 8 * (own + 64))
    assert joined.other == 4 * (own + 64)
    assert phase(found, "load").device["weights"] == 4 * (N + own + own + 64)
    assert joined.activations == policy.activations > 0  # its forward is of the whole base
    assert phase(found, "update").device["activations"] == policy.activations + joined.activations  # both are kept
    assert "adapters and a head on policy's base" in describe(plan)
    took = duration(plan, lengths, nominal_peaks(plan.machine)[0], "")
    assert took is not None and took.floor > 0


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        (("optimizer",), (4 * N, 4 * N, 8 * N / 4)),
        (("gradients", "optimizer"), (4 * N, N, 2 * N)),
        (("weights", "gradients", "optimizer"), (N, N, 2 * N)),
    ],
)
def test_divided_parts_are_a_ranks_share(
    planned: Callable[..., Plan], parts: tuple[Any, ...], left: tuple[float, ...]
) -> None:
    of = entries(strategy("fake-zero", divided(*parts)))
    found = predict(planned("--mem", "fake-zero", "--nproc", "4", of=of))
    role = found.roles[0]
    assert (role.weights, role.gradients, role.optimizer) == left
    assert role.sharding == f"{', '.join(sorted(parts))} over 4"
    assert found.ranks == 4
    # where weights are divided, one layer and the next are whole while it computes, or the embedding
    whole = phase(found, "update").device.get("whole layers", 0)
    assert whole == (max(2 * 4 * LAYER, 4 * 1000 * 64) if "weights" in parts else 0)


def test_what_is_not_divided_says_so(planned: Callable[..., Plan]) -> None:
    assert predict(planned("--nproc", "2")).roles[0].sharding == "replicated"
    assert predict(planned()).roles[0].sharding == "whole"


def test_a_device_is_relieved_of_what_lives_on_the_host(planned: Callable[..., Plan]) -> None:
    roles = (POLICY, Role("reference", start="policy"))
    away = strategy("fake-away", on_host("weights", visits=True), applies="frozen")
    state = strategy("fake-state", on_host("optimizer"), applies="trainable")
    of = entries(away, state, roles=roles)
    found = predict(planned("--mem", "fake-away,fake-state", of=of, gpus=1))
    update, scored = phase(found, "update"), phase(found, "experience")
    assert update.device["weights"] == 4 * N
    assert "optimiser" not in update.device
    assert update.host == {"weights": 4 * N, "optimiser": 8 * N}
    assert scored.device["weights"] == 8 * N  # it visits
    on_cpu = predict(planned("--mem", "fake-away,fake-state", of=of))
    assert phase(on_cpu, "update").device["weights"] == 8 * N  # there is no other place
    assert phase(on_cpu, "update").host == {}


def test_a_file_between_visits_is_in_nobodys_memory(planned: Callable[..., Plan]) -> None:
    of = entries(strategy("fake-file", on_disk, applies="frozen"), roles=(POLICY, Role("reference", start="policy")))
    for gpus in (0, 1):
        found = predict(planned("--mem", "fake-file", of=of, gpus=gpus))
        assert phase(found, "update").device["weights"] == phase(found, "save").device["weights"] == 4 * N
        assert phase(found, "experience").device["weights"] == 8 * N
        assert phase(found, "load").device["weights"] == 4 * N
        assert all(not p.host for p in found.phases)


def test_an_optimiser_may_keep_its_state_on_the_host(planned: Callable[..., Plan]) -> None:
    adam = OptimizerEntry(name="fake-away", summary="", impl="m:C", footprint=moments(4, 4), state_on_host=True)
    found = predict(planned("--optim", "fake-away", of=entries(adam), gpus=1))
    assert phase(found, "update").host == {"optimiser": 8 * N}
    assert phase(found, "save").device == {"weights": 4 * N}
    assert found.roles[0].host == ("optimizer",)


def test_inputs_of_recomputed_layers_may_be_on_the_host(planned: Callable[..., Plan]) -> None:
    of = entries(strategy("fake-again", recomputed, phase="wrap"), strategy("fake-away", on_host("activations")))
    words, lengths = ("--batch-size", "3", "--mem"), Lengths(prompt=64, response=64)
    here = phase(predict(planned(*words, "fake-again", of=of, gpus=1), lengths), "update")
    away = phase(predict(planned(*words, "fake-again,fake-away", of=of, gpus=1), lengths), "update")
    inputs = 2 * 3 * 128 * 64 * 4  # layers, rows, tokens, width, bytes
    assert away.host == {"activations": inputs}
    assert here.device["activations"] - away.device["activations"] == inputs


def test_a_copy_is_held_for_the_whole_run(planned: Callable[..., Plan]) -> None:
    of = entries(strategy("fake-ema", copied("average", bytes_each=4, of="trained")))
    found = predict(planned("--mem", "fake-ema", of=of))
    assert found.roles[0].other == 4 * N
    assert phase(found, "save").device["other"] == 4 * N


def test_recomputing_keeps_less(planned: Callable[..., Plan]) -> None:
    of = entries(strategy("fake-again", recomputed, phase="wrap"))
    lengths = Lengths(prompt=64, response=64)
    kept = predict(planned(of=of), lengths).roles[0].activations
    assert predict(planned("--mem", "fake-again", of=of), lengths).roles[0].activations < 0.5 * kept


def test_copies_are_on_the_device_or_on_its_host(planned: Callable[..., Plan]) -> None:
    def both(module: Any, plan: Any, component: Any) -> Any:
        return attrs.evolve(module, copies={"average": 1000.0, "host masters": 500.0})

    of = entries(strategy("fake-both", both, phase="wrap"))
    on_gpu, on_cpu = (predict(planned("--mem", "fake-both", of=of, **gpus)) for gpus in ({"gpus": 1}, {}))
    assert phase(on_gpu, "update").device["other"] == on_gpu.roles[0].other == 1000
    assert phase(on_gpu, "update").host == {"other": 500.0}
    assert phase(on_cpu, "update").device["other"] == on_cpu.roles[0].other == 1500  # there is no other memory


def test_components_that_say_nothing_are_told(planned: Callable[..., Plan]) -> None:
    silent = MemoryEntry(name="fake-silent", summary="", impl="m:C", phase="wrap")
    found = predict(planned("--mem", "fake-silent", of=entries(silent)))
    assert any("fake-silent" in note and "tells no footprint" in note for note in found.notes)
    assert not found.missing  # what is known is still compared


def test_an_engines_memory_is_of_the_rollout_but_for_what_it_holds(planned: Callable[..., Plan]) -> None:
    engine = EngineEntry(name="fake-engine", summary="", impl="m:C", rank=1,
                         footprint=lambda *_: {"KV cache": 1000.0, "resident weights": 500.0})  # fmt: skip
    of = entries(engine, requires={"rollouts"}, rewards=False)
    found = predict(planned(of=of))
    assert phase(found, "rollout").device["KV cache"] == 1000
    assert phase(found, "update").device["weights"] == 4 * N + 500
    assert "KV cache" not in phase(found, "update").device


def test_what_comes_and_goes_leaves_gaps_in_a_cpus_heap(planned: Callable[..., Plan]) -> None:
    lengths = Lengths(prompt=500, response=500)
    of = entries(strategy("fake-lora", adapters, phase="adapt", applies="trainable", provides={"adapters"}))
    found = predict(planned("--mem", "fake-lora", of=of), lengths)
    update = phase(found, "update").device
    moving = update["activations"] + update.get("logits", 0.0)
    assert update["gaps"] == pytest.approx(moving / 6 - update["gradients"])
    assert "gaps" not in phase(found, "save").device  # weights and moments come once
    assert found.peak_bytes == found.peak.total
    # all gradients, which count beside activations for the same reason, are more than a sixth of a short forward
    short = phase(predict(planned("--batch-size", "1"), Lengths(prompt=8, response=8)), "update").device
    assert (short["activations"] + short.get("logits", 0.0)) / 6 < short["gradients"] and "gaps" not in short
    gpu = predict(planned(gpus=1), lengths)
    assert not {"gaps", "libraries"} & phase(gpu, "update").device.keys()
    assert gpu.peak_bytes == pytest.approx(1.05 * gpu.peak.total)


def test_an_optimisers_step_takes_the_place_of_the_heads_work(planned: Callable[..., Plan]) -> None:
    step = OptimizerEntry(name="fake-slow", summary="", impl="m:C", rank=2, footprint=moments(4, 4),
                          at_work=moments(1000))  # fmt: skip
    lengths = Lengths(prompt=8, response=8)
    slow = phase(predict(planned("--optim", "fake-slow", of=entries(step)), lengths), "update").device
    assert slow["step"] == 1000 * 64 * 1000  # of the embedding, the largest tensor
    assert "logits" not in slow
    usual = phase(predict(planned("--optim", "fake-adam", of=entries(step)), lengths), "update").device
    assert "step" not in usual
    on_gpu = predict(planned("--optim", "fake-slow", of=entries(step), gpus=1), lengths)
    assert "step" not in phase(on_gpu, "update").device


def test_where_a_step_is_one_micro_batch_what_is_scored_keeps_its_graph(planned: Callable[..., Plan]) -> None:
    engine = EngineEntry(name="fake-engine", summary="", impl="m:C", rank=1, footprint=lambda *_: {})
    whole = BackendEntry(name="fake-whole", summary="", impl="m:C", provides={"whole-gradients"}, footprint=unchanged)
    of = entries(engine, whole, requires={"rollouts"}, rewards=False)

    def scored(backend: str, tokens: int) -> float:
        words = ("--backend", backend, "--batch-size", "4", "--micro-batch-tokens", str(tokens))
        found = predict(planned(*words, of=of), Lengths(prompt=50, response=50))
        (role,) = found.roles
        return float(phase(found, "experience").device["activations"] / role.activations)

    assert scored("fake-whole", 400) > 1  # what the forward has at work, and all that its backward needs
    assert scored("fake-whole", 200) < 1
    assert scored("fake-backend", 400) < 1  # each forward is a meeting of ranks: none is kept


def test_rows_held_out_are_dealt_over_ranks(
    typed: Callable[..., Recipe], installed: Registry, machine: Machine
) -> None:
    def keys_and_values(rows: str, ranks: str) -> float:
        words = ("--algo", "ppo", "--backend", "ddp", "--nproc", ranks, "--batch-size", "4", "--eval-rows", rows)
        return phase(predict(compose(typed(*words), installed, machine), LONG), "rollout").device["KV cache"]

    assert keys_and_values("64", "4") == keys_and_values("16", "1") < keys_and_values("64", "1")


# Micro-batches


@pytest.mark.parametrize(
    ("words", "passes", "size", "count"),
    [
        (("--batch-size", "8", "--micro-batch-tokens", "1000"), Passes(), 8, 1),  # 8 x 100 tokens
        (("--batch-size", "8", "--micro-batch-tokens", "350"), Passes(), 3, 3),
        (("--batch-size", "8", "--micro-batch-tokens", "10"), Passes(), 1, 8),  # one at least
        (("--batch-size", "8", "--micro-batch-tokens", "500"), Passes(responses=2, grouped=True), 4, 4),
        (("--batch-size", "8", "--micro-batch-tokens", "1000", "--nproc", "2"), Passes(), 4, 1),  # dealt over ranks
    ],
)
def test_micro_batches_are_cut_as_in_a_run(
    planned: Callable[..., Plan], words: tuple[str, ...], passes: Passes, size: int, count: int
) -> None:
    plan = planned(*words, of=entries(footprint=lambda config: passes))
    assert micro_batch(plan, Lengths(prompt=60, response=40), gradient=True) == (size, count)


def test_gradients_stand_beside_activations_whatever_the_micro_batches(planned: Callable[..., Plan]) -> None:
    lengths = Lengths(prompt=500, response=500)
    one = phase(predict(planned("--batch-size", "2", "--micro-batch-tokens", "2000"), lengths), "update")
    two = phase(predict(planned("--batch-size", "4", "--micro-batch-tokens", "2000"), lengths), "update")
    assert one == two
    assert one.device["gradients"] == 4 * N


def test_lengths_are_assumed_within_the_context(planned: Callable[..., Plan], folder: Path) -> None:
    assert assumed_lengths(planned()) == Lengths(prompt=512, response=512)
    (folder / "model" / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 600}))
    assert assumed_lengths(planned()) == Lengths(prompt=88, response=512)
