"""A container of two small roles behind a backend, with plain gradient descent, of which every step is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.component import Context
from rlhf.interfaces import Backend, OptimizerStrategy, TrainedParameter
from rlhf.scores import ScoreRequest, Scores
from rlhf.sequences import Sequences
from rlhf.testing.table import VOCABULARY

_WIDTH = 5


class _Body(nn.Module):
    """A role: a matrix, a bias, and a buffer that is no parameter."""

    def __init__(self, out: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(_WIDTH, out, generator=generator))
        self.bias = nn.Parameter(torch.randn(out, generator=generator))
        self.register_buffer("embedding", torch.randn(VOCABULARY, _WIDTH, generator=generator))

    embedding: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens] @ self.matrix + self.bias


class _Container(nn.Module):
    """As a run's: modules by role, behind one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict({"policy": _Body(VOCABULARY, 1), "value": _Body(1, 2)})

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        found = []
        for request in requests:
            tokens = request.sequences.tokens
            said = self.bodies[request.role](tokens)
            if request.role == "value":
                found.append(Scores("value", values_=said[:, 0]))
            else:
                logp = torch.log_softmax(said, dim=-1).gather(1, tokens[:, None])[:, 0]
                found.append(Scores("policy", logp_=logp))
        return found


class _Descent(OptimizerStrategy):
    """w - rate x gradient, with momentum where there are steps to come back to."""

    def __init__(self, max_norm: float | None, rates: dict[str, float], momentum: float) -> None:
        super().__init__(None, Context(plan=None))  # type: ignore[arg-type]
        self.max_norm, self._rates, self._momentum = max_norm, rates, momentum

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        groups = []
        for role, rate in self._rates.items():
            own = [one.parameter for one in parameters if one.role == role]
            groups.append({"params": own, "lr": rate, "base_lr": rate})
        return torch.optim.SGD(groups, lr=0.1, momentum=self._momentum)


class Bench:
    """See the module."""

    rates = {"policy": 0.1, "value": 0.02}  # noqa: RUF012 - never written to

    def __init__(self, backend: Backend, max_norm: float | None, momentum: float = 0.0) -> None:
        self.backend = backend
        self.container = _Container().to(backend.device)
        trained = [
            TrainedParameter(name, parameter, role, None)
            for name, parameter in self.container.named_parameters()
            for role in [name.split(".")[1]]
        ]
        self._sequences = Sequences.of([torch.tensor([1])] * 2, [torch.tensor([3, 4, 5]), torch.tensor([6, 7])])
        backend.prepare(self.container, trained, _Descent(max_norm, self.rates, momentum))

    def requests(self, *roles: str) -> list[ScoreRequest]:
        return [ScoreRequest(role, self._sequences) for role in roles]

    def loss(self) -> Tensor:
        """Of both roles, by the backend's forward."""
        return self._loss(self.backend.forward(self.requests("policy", "value")))

    def _loss(self, scores: Sequence[Scores]) -> Tensor:
        policy, value = scores
        return -policy.logp.sum() + (value.values - 1.0).square().sum()

    def gradients(self, scales: Sequence[float]) -> dict[str, Tensor]:
        """What they are for losses times these, added up, worked out beside the backend."""
        names, parameters = zip(*self.container.named_parameters(), strict=True)
        loss = self._loss(self.container(self.requests("policy", "value"))) * sum(scales)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.container.named_parameters()}

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.backend.backward(self.loss(), last=True)
            self.backend.update(0.5)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding of float32."""
    return a.shape == b.shape and bool(torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-6))
