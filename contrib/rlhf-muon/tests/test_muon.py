"""Muon: steps by hand, which weights it steps, what it keeps, and that a state comes back to the bit."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rlhf.api import Context, Plan, RequestError, TrainedParameter, Weight, schedule
from rlhf_muon import MuonConfig, at_work, kept, rlhf_optimizers, torch_has_it
from rlhf_muon.optimizer import Muon

LAYER = "bodies.policy.model.layers.0.mlp.up_proj.weight"
A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's coefficients
BF16 = 2**-8
"""Half a unit in the last place of bfloat16, in which the iterations run."""


def muon(**options: Any) -> Muon:
    return Muon(MuonConfig(**options), Context(plan=cast(Plan, None)))


def trained(name: str, value: Any, role: str = "policy", rate: float | None = None) -> TrainedParameter:
    return TrainedParameter(name, nn.Parameter(torch.as_tensor(value, dtype=torch.float32)), role, rate)


def step(optimizer: torch.optim.Optimizer, of: TrainedParameter, gradient: Any) -> Tensor:
    of.parameter.grad = torch.as_tensor(gradient, dtype=torch.float32)
    optimizer.step()
    return of.parameter.detach()


def iterated(values: list[float], iterations: int) -> list[float]:
    """Singular values after so many iterations, in Python's floats: by their norm, then s -> A s + B s^3 + C s^5."""
    norm = math.sqrt(sum(value * value for value in values))
    found = [value / norm for value in values]
    for _ in range(iterations):
        found = [A * s + B * s**3 + C * s**5 for s in found]
    return found


def test_one_iteration_by_hand() -> None:
    """diag(3, -4): singular values .6 and .8 of the norm; .6 -> 2.0667 - 1.0314 + .157969 = 1.193269 and
    .8 -> 2.7556 - 2.4448 + .665682 = .976482. Times .2 sqrt 2 = .282843 and the rate of .1: .033751 and -.027619."""
    assert iterated([3.0, 4.0], 1) == pytest.approx([1.193269, 0.976482], abs=1e-6)
    w = trained(LAYER, torch.zeros(2, 2))
    found = step(muon(learning_rate=0.1, iterations=1).build([w]), w, [[3.0, 0.0], [0.0, -4.0]])
    expected = torch.tensor([[-0.033751, 0.0], [0.0, 0.027619]])
    torch.testing.assert_close(found, expected, rtol=3 * BF16, atol=0)  # three products, each rounded


@pytest.mark.parametrize(
    ("scale", "shape", "factor"),
    [
        ("match-rms", (4, 1), 0.2 * 2), ("match-rms", (1, 4), 0.2 * 2), ("match-rms", (2, 2), 0.2 * math.sqrt(2)),
        ("original", (4, 1), 2.0), ("original", (1, 4), 1.0), ("original", (2, 2), 1.0),
    ],
)  # fmt: skip
def test_the_scale_goes_by_the_shape(scale: str, shape: tuple[int, int], factor: float) -> None:
    """One singular value, 1 of the norm: .701 after one iteration."""
    w = trained(LAYER, torch.zeros(shape))
    gradient = torch.zeros(shape)
    gradient[0, 0] = 7.0
    found = step(muon(learning_rate=0.5, scale=scale, iterations=1).build([w]), w, gradient)
    assert float(found[0, 0]) == pytest.approx(-0.5 * factor * (A + B + C), rel=3 * BF16)
    assert found.count_nonzero() == 1


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_and_decay_over_three_steps(nesterov: bool) -> None:
    """Diagonal gradients stay diagonal, so each step is numbers: M <- .9 M + .1 G, W <- W (1 - rate decay) - rate O."""
    gradients = [(3.0, 4.0), (1.0, -2.0), (-4.0, 0.5)]
    w = trained(LAYER, [[2.0, 0.0], [0.0, -1.0]])
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "scale": "original", "iterations": 2}
    optimizer = muon(learning_rate=0.1, weight_decay=0.5, **options).build([w])
    m, expected = [0.0, 0.0], [2.0, -1.0]
    for gradient in gradients:
        m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
        update = [0.1 * g + 0.9 * a for a, g in zip(m, gradient, strict=True)] if nesterov else m
        expected = [e * (1 - 0.1 * 0.5) - 0.1 * o for e, o in zip(expected, iterated(update, 2), strict=True)]
        found = step(optimizer, w, torch.diag(torch.tensor(gradient)))
        # a step is .1 of at most 1.2, off by at most a unit of bfloat16 for each of its six products
        assert found.diagonal().tolist() == pytest.approx(expected, abs=0.1 * 1.2 * 6 * BF16)
    assert optimizer.state[w.parameter]["momentum_buffer"].diagonal().tolist() == pytest.approx(m, rel=1e-6)  # float32


def test_a_step_is_orthogonal_whatever_the_gradients_size_is() -> None:
    """Five iterations bring every singular value to about 1: .68 to 1.13 by Jordan's account."""
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    for size in (1e-3, 1e3):
        w = trained(LAYER, torch.zeros(24, 16))
        found = step(muon(learning_rate=1.0, scale="original").build([w]), w, size * gradient)
        values = torch.linalg.svdvals(found) / math.sqrt(24 / 16)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.25
        assert float((found * gradient).sum()) < 0  # downhill


def test_what_is_in_no_layer_or_no_matrix_is_adamws_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(1)
    names = {
        "bodies.policy.model.embed_tokens.weight": (6, 4),
        "bodies.policy.lm_head.weight": (6, 4),
        "heads.value.weight": (1, 4),
        "bodies.policy.model.layers.0.input_layernorm.weight": (4,),
        "bodies.policy.model.layers.1.mlp.experts.down_proj": (2, 4, 4),
    }
    start = {name: torch.randn(shape, generator=draw) for name, shape in names.items()}
    ours = [trained(name, value.clone()) for name, value in start.items()]
    optimizer = muon(learning_rate=1e-2, adamw_ratio=0.5, weight_decay=0.1).build([*ours, trained(LAYER, [[1.0]])])
    theirs = [value.clone().requires_grad_() for value in start.values()]
    matrices, vectors = [t for t in theirs if t.ndim > 1], [t for t in theirs if t.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=5e-3, fused=True)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape, generator=draw)
            mine.parameter.grad = other.grad.clone()
        optimizer.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.parameter, other), mine.name


def test_groups_have_their_roles_rates() -> None:
    given = [
        trained(LAYER, [[1.0]]),
        trained("bodies.value.model.layers.3.mlp.up_proj.weight", [[1.0]], "value", 1e-3),
        trained("bodies.value.score.weight", [[1.0]], "value", 1e-3),
        trained("bodies.policy.model.norm.weight", [1.0]),
    ]
    groups = muon(learning_rate=1e-2, adamw_ratio=0.1, weight_decay=0.2).build(given).param_groups
    names = {id(one.parameter): one.name for one in given}
    found = [(g["lr"], g["base_lr"], g["weight_decay"], names[id(g["params"][0])]) for g in groups]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1]
    assert found == [
        (1e-2, 1e-2, 0.2, given[0].name),  # the policy's matrices come first: their rate is the one reported
        (1e-3, 1e-3, 0.2, given[1].name),
        (1e-4, 1e-4, 0.2, given[2].name),
        (1e-3, 1e-3, 0.0, given[3].name),
    ]


def test_adapters_alone_need_no_adamw() -> None:
    w = trained("bodies.policy.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", [[1.0]])
    optimizer = muon().build([w])
    assert len(optimizer.param_groups) == 1
    assert float(step(optimizer, w, [[1.0]])) < 1.0


def test_nothing_for_it_is_refused() -> None:
    given = [trained(f"heads.{name}.weight", [[1.0]]) for name in "abcd"]
    with pytest.raises(RequestError) as error:
        muon().build(given)
    assert "only heads.a.weight, heads.b.weight, heads.c.weight ..." in str(error.value)
    assert "--optim adamw" in str(error.value)


def stepped(optimizer: torch.optim.Optimizer, given: list[TrainedParameter], count: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for one in given:
            one.parameter.grad = torch.randn(one.parameter.shape, generator=draw)
        optimizer.step()
    return [one.parameter.detach().clone() for one in given]


@pytest.mark.parametrize("how", ["state_dict", "by parameter"])
def test_a_state_comes_back_to_the_bit(how: str) -> None:
    """`by parameter`: as backends restore it, into the mapping that the optimiser calls its state."""
    draw = torch.Generator().manual_seed(2)
    start = {name: torch.randn(4, 3, generator=draw) for name in (LAYER, "bodies.policy.embed_tokens.weight")}
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.1}

    def made(values: dict[str, Tensor]) -> tuple[list[TrainedParameter], torch.optim.Optimizer]:
        given = [trained(name, value.clone()) for name, value in values.items()]
        return given, muon(**options).build(given)

    given, optimizer = made(start)
    half = stepped(optimizer, given, 3, seed=3)
    again, restored = made(dict(zip(start, half, strict=True)))
    if how == "state_dict":
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares its tensors
    else:
        restored.state.clear()
        for old, new in zip(given, again, strict=True):
            restored.state[new.parameter] = {
                key: value.clone() for key, value in optimizer.state[old.parameter].items()
            }
    whole, resumed = stepped(optimizer, given, 3, seed=4), stepped(restored, again, 3, seed=4)
    fresh_given, fresh = made(dict(zip(start, half, strict=True)))
    anew = stepped(fresh, fresh_given, 3, seed=4)
    for one, other, third in zip(whole, resumed, anew, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, third)  # a state that came back empty would be seen


def test_the_rate_of_the_moment_is_used() -> None:
    """The backend sets each group's `lr` before a step."""
    w = trained(LAYER, [[0.0]])
    optimizer = muon(learning_rate=1.0, scale="original", iterations=1).build([w])
    optimizer.param_groups[0]["lr"] = 0.25
    assert float(step(optimizer, w, [[1.0]])) == pytest.approx(-0.25 * (A + B + C), rel=3 * BF16)


def test_schedule_and_norm_are_options() -> None:
    strategy = muon(schedule="cosine", warmup=0.2, min_ratio=0.1, max_norm=0.3)
    assert [strategy.factor(i, 10) for i in range(10)] == [schedule("cosine", i, 10, 0.2, 0.1) for i in range(10)]
    assert strategy.max_norm == 0.3


def test_the_bytes_that_a_plan_counts_are_those_that_are_kept() -> None:
    config = MuonConfig()
    shapes = {
        LAYER: Weight(name="up_proj", shape=(8, 3), kind="linear"),
        "bodies.policy.model.layers.0.mlp.up_proj.lora_A.default.weight": Weight(
            name="A", shape=(2, 3), kind="adapter"
        ),
        "bodies.policy.model.embed_tokens.weight": Weight(name="embed_tokens", shape=(7, 3), kind="embedding"),
        "bodies.policy.lm_head.weight": Weight(name="lm_head", shape=(7, 3), kind="head"),
        "bodies.value.score.weight": Weight(name="score", shape=(1, 3), kind="score"),
        "bodies.policy.model.norm.weight": Weight(name="norm", shape=(3,), kind="vector"),
        "bodies.policy.model.layers.0.mlp.experts.down_proj": Weight(name="down_proj", shape=(2, 3, 3), kind="vector"),
    }
    given = [trained(name, torch.ones(weight.shape)) for name, weight in shapes.items()]
    optimizer = muon().build(given)
    stepped(optimizer, given, 1, seed=5)
    for one in given:
        state = optimizer.state[one.parameter]
        assert kept(shapes[one.name], config) == sum(value.nbytes for value in state.values()), one.name
    assert kept(shapes[LAYER], config) == 4 * 24
    assert at_work(shapes[LAYER], config) == 8 * 24 + 4 * 9
    assert at_work(shapes["bodies.policy.lm_head.weight"], config) == 0


def test_an_older_torch_is_refused_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = rlhf_optimizers()
    assert entry.constraints == (torch_has_it,)
    component: Any = SimpleNamespace(name="muon")
    for version, refused in (("2.8.1", True), ("2.9.0", False), ("2.13.0+cpu", False), ("3.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        problems = list(torch_has_it(cast(Plan, None), component))
        assert bool(problems) == refused, version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.1")
    (problem,) = torch_has_it(cast(Plan, None), component)
    assert "torch 2.8.1 has no Muon" in str(problem)
