"""What is looked at inside a rank: functions from its parts to what JSON holds."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf.parts import Parts
from rlhf.scores import ScoreRequest
from rlhf.sequences import Sequences


def _some(count: int = 4) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(5, 300, (n,), generator=generator) for n in range(3, 3 + 2 * count)]
    return Sequences.of(draw[:count], draw[count:])


def _backward(parts: Parts, scale: float = 1.0, roles: tuple[str, ...] = ()) -> None:
    """A micro-batch of this rank's own."""
    rank, size = parts.backend.world.rank, parts.backend.world.size
    sequences = _some().select(torch.arange(4)[rank::size])
    trained = roles or tuple(role.name for role in parts.plan.roles if role.role.trainable)
    scores = parts.models.forward([ScoreRequest(role, sequences) for role in trained])
    losses = [s.logp.sum() if s.logp_ is not None else s.values.sum() for s in scores]
    parts.backend.backward(scale * torch.stack(losses).sum() / 10, last=True)


def held(parts: Parts) -> dict[str, Any]:
    """Elements in this rank's memory, at rest and after a backward, of the parameters that are trained."""
    backend: Any = parts.backend
    whole = sum(math.prod(shape) for shape in _shapes(parts))
    found: dict[str, Any] = {"whole": whole}
    _backward(parts)
    if hasattr(backend, "_engine"):
        found.update(_of_deepspeed(backend))
        backend.update(1.0)
        states = [
            value
            for kept in backend._base.state.values()
            for value in kept.values()
            if isinstance(value, torch.Tensor) and value.ndim
        ]
    else:
        parameters = list(backend._parameters.values())
        found["parameters"] = sum(p.to_local().numel() for p in parameters)
        found["gradients"] = sum(p.grad.to_local().numel() for p in parameters)
        backend.update(1.0)
        states = [v.to_local() for p in parameters for v in backend._optimizer.state[p].values() if v.ndim]
        found["after"] = sum(p.to_local().numel() for p in backend._parameters.values())
    found["optimizer"] = sum(value.numel() for value in states)
    return found


def _shapes(parts: Parts) -> list[tuple[int, ...]]:
    state = parts.backend.state()["parameters"]
    return [tuple(piece.shape) for piece in state.values()]


def _of_deepspeed(backend: Any) -> dict[str, Any]:
    zero = backend._engine.optimizer
    trained = [t.parameter for t in backend._trained]
    if backend._zero.stage == 3:
        return {
            "parameters": sum(p.ds_tensor.numel() for p in trained) + sum(p.data.numel() for p in trained),
            "masters": sum(flat.numel() for flat in zero.fp32_partitioned_groups_flat),
            "gradients": sum(g.numel() for group in zero.averaged_gradients.values() for g in group)
            + sum(p.grad.numel() for p in trained if p.grad is not None),
        }
    if backend._zero.stage == 2:  # what it holds between a backward and the step
        gradients = sum(g.numel() for group in zero.all_grad_tensors.values() for g in group or ())
    else:
        gradients = sum(p.grad.numel() for p in trained if p.grad is not None)
    return {
        "parameters": sum(p.data.numel() for p in trained),
        "masters": sum(flat.numel() for flat in zero.single_partition_of_fp32_groups),
        "gradients": gradients,
    }


def skipped(parts: Parts) -> dict[str, Any]:
    """A step whose gradients aren't finite on one rank alone, then one whose are."""
    before = _sums(parts)
    bad = math.inf if parts.backend.world.rank == parts.backend.world.size - 1 else 1.0
    sequences = _some(2)
    score = parts.models.forward([ScoreRequest("policy", sequences)])[0]
    score.logp.register_hook(lambda gradient: gradient * bad)
    parts.backend.backward(score.logp.sum(), last=True)
    first = parts.backend.update(1.0)
    between = _sums(parts)
    _backward(parts, roles=("policy",))
    second = parts.backend.update(1.0)
    return {
        "skipped": [first.skipped, second.skipped],
        "norms": [str(first.grad_norm), second.grad_norm],
        "unchanged": before == between,
        "changed": _sums(parts) != between,
    }


def _sums(parts: Parts) -> list[float]:
    return [float(tensor.double().sum()) for _, tensor in parts.backend.weights("policy")]


def idle(parts: Parts) -> dict[str, Any]:
    """Steps of the value alone, of both roles, of the policy alone: weights after each."""
    found = []
    for roles in (("policy", "value"), ("value",), ("value",), ("policy", "value"), ("policy",)):
        _backward(parts, roles=roles)
        result = parts.backend.update(1.0)
        sums = {
            name: [float(t.double().abs().sum()) for _, t in parts.backend.weights(name)]
            for name in ("policy", "value")
        }
        found.append({"norm": result.grad_norm, **sums})
    return {"steps": found}


def alone(parts: Parts) -> dict[str, Any]:
    """How often ranks meet while the policy is sampled from, of which each has as much as it likes."""
    backend: Any = parts.backend
    assert parts.sampler is not None
    calls = {"gather": 0}
    names = ("all_gather_into_tensor", "_all_gather_base", "all_gather", "all_reduce", "broadcast")
    originals = {name: getattr(torch.distributed, name) for name in names if hasattr(torch.distributed, name)}

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            calls["gather"] += 1
            return original(*arguments, **more)

        return call

    expected = parts.score(_some(), "policy").logp
    with backend.gathered("policy"):
        for name, original in originals.items():
            setattr(torch.distributed, name, counted(original))
        for _ in range(1 + 3 * backend.world.rank):  # a rank may call it more often than another
            own = parts.models.policy.score(parts.models.body("policy"), _some(), [_head()])[0].logp
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    after = parts.score(_some(), "policy").logp
    return {
        "meetings": calls["gather"],
        "equal": torch.allclose(own, expected, atol=1e-5),
        "again": torch.equal(expected, after),
    }


def _head() -> Any:
    from rlhf.interfaces import HeadRequest

    return HeadRequest("policy", "lm")
