"""The contract of optimiser strategies: `OptimizerContract`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.interfaces import Backend, OptimizerStrategy
    from rlhf.testing.kit import Kit


class OptimizerContract(Contract):
    """What an optimiser must keep: groups with their rates, a state that a checkpoint can hold, steps downhill.

    class TestMuon(OptimizerContract):
        name = "muon"
    """

    kind = "optim"
    learning_rate: ClassVar[float] = 0.05
    """Given as its option `learning_rate`, which every optimiser has: algorithms set it."""
    steps: ClassVar[int] = 60
    """In which a quadratic must fall to a half: weights of size 1, at that rate."""

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.IMITATE, "data": str(kit.once("data", kit.data))}

    def asked(self) -> dict[str, Any]:
        return {"optim": {"name": self.name, "learning_rate": self.learning_rate, **self.options}}

    def made(self, kit: Kit) -> _Bench:
        """A strategy at work on a few weights, behind the backend that a plan of it has."""
        return _Bench(self, kit)

    # The terms

    def test_groups_have_their_rates(self, rlhf_kit: Kit) -> None:
        """Each parameter is in one group, whose `lr` and `base_lr` are its role's rate, or else the option's."""
        bench = self.made(rlhf_kit)
        optimizer = bench.strategy.build(bench.trained)
        rates: dict[int, float] = {}
        for group in optimizer.param_groups:
            fix = "give each group 'lr' and 'base_lr': a backend sets lr = base_lr x factor(step, steps)"
            require("lr" in group and "base_lr" in group, f"a group of its optimiser has no base_lr: {fix}")
            for parameter in group["params"]:
                require(id(parameter) not in rates, "a parameter is in two groups")
                rates[id(parameter)] = group["base_lr"]
        for trained in bench.trained:
            require(id(trained.parameter) in rates, f"{trained.name} is in no group, so it is never trained")
            wanted = self.learning_rate if trained.learning_rate is None else trained.learning_rate
            found = rates[id(trained.parameter)]
            what = f"the base_lr of {trained.name} (role {trained.role!r}) is {found:g}, not {wanted:g}"
            require(
                math.isclose(found, wanted), f"{what}: a role's own rate (TrainedParameter.learning_rate) goes first"
            )

    def test_a_quadratic_falls(self, rlhf_kit: Kit) -> None:
        bench = self.made(rlhf_kit)
        start = bench.loss()
        for _ in range(self.steps):
            bench.step()
        told = f"half the sum of squares went from {start:.4g} to {bench.loss():.4g} in {self.steps} steps"
        require(bench.loss() <= 0.5 * start, f"{told} at learning_rate {self.learning_rate:g}, and must fall to a half")

    def test_at_rate_0_nothing_moves(self, rlhf_kit: Kit) -> None:
        """All that it adds to weights, decay too, is a multiple of the group's `lr`, which a schedule may set to 0."""
        bench = self.made(rlhf_kit)
        before = bench.weights()
        bench.step(factor=0.0)
        moved = [name for name, weights in bench.weights().items() if not bool((weights == before[name]).all())]
        require(not moved, f"at factor 0 of the schedule {', '.join(moved)} moved: steps go by the group's 'lr'")

    def test_a_role_of_a_higher_rate_moves_further(self, rlhf_kit: Kit) -> None:
        bench = self.made(rlhf_kit)
        before = bench.weights()
        bench.step()
        after = bench.weights()
        moved = {name: float((after[name] - before[name]).norm()) for name in before}
        fast, slow = moved["bodies.value.layers.0.matrix"], moved["bodies.policy.layers.0.matrix"]
        told = f"a role of ten times the rate moved {fast:.3g} in the first step, another one {slow:.3g}"
        require(fast > 3 * slow, f"{told}, and the gradients were the same: steps go by the group's 'lr'")

    def test_what_has_no_gradient_stays(self, rlhf_kit: Kit) -> None:
        """A role that a loss leaves out, such as a policy while its critic warms up, isn't decayed either."""
        bench = self.made(rlhf_kit)
        bench.step()  # so that there is momentum to go on from
        before = bench.weights()
        bench.step(only="value")
        after = bench.weights()
        moved = [n for n in before if ".policy." in n and not bool((after[n] == before[n]).all())]
        require(not moved, f"{', '.join(moved)} had no gradient, and moved: leave out parameters whose grad is None")

    def test_state_comes_back_to_the_bit(self, rlhf_kit: Kit) -> None:
        """What it keeps of a parameter is in `optimizer.state[parameter]`, as numbers and tensors."""
        from rlhf.testing.kit import written_and_read

        first = self.made(rlhf_kit)
        for _ in range(3):
            first.step()
        try:
            state = written_and_read([first.backend.state(), first.strategy.state()])
        except TypeError as error:
            broken(f"its state can't be put into a checkpoint: {error}")
        second = self.made(rlhf_kit)
        second.backend.load_state(state[0])
        second.strategy.load_state(state[1])
        for step in range(3):
            first.step()
            second.step()
            for name, weights in first.weights().items():
                same = bool((weights == second.weights()[name]).all())
                fix = "what it keeps goes into optimizer.state[parameter], or the strategy's state()"
                require(same, f"restored, {name} goes another way in step {step + 1}: {fix}")

    def test_the_schedule_is_a_number(self, rlhf_kit: Kit) -> None:
        strategy = self.made(rlhf_kit).strategy
        for steps in (1, 2, 7, 100):
            factors = [strategy.factor(step, steps) for step in range(steps)]
            for step, factor in enumerate(factors):
                fine = math.isfinite(factor) and factor >= 0
                require(fine, f"factor({step}, {steps}) is {factor}: it multiplies the rate, so it is finite and >= 0")
            require(any(factors), f"over {steps} steps its schedule is 0 throughout: nothing would be learnt")

    def test_the_largest_norm_is_a_number(self, rlhf_kit: Kit) -> None:
        norm = self.made(rlhf_kit).strategy.max_norm
        require(norm is None or norm > 0, f"max_norm is {norm}: a number above 0, or None where nothing is clipped")


class _Bench:
    """Two roles with a layer of a matrix and a vector each, alike to the bit, and a frozen one. They are named as
    those of a model are: some optimisers step a layer's matrices otherwise than the rest."""

    def __init__(self, contract: OptimizerContract, kit: Kit) -> None:
        import torch
        from torch import nn

        from rlhf.assemble import make
        from rlhf.component import Context
        from rlhf.interfaces import TrainedParameter

        plan = contract.plan(kit)
        context = Context(plan=plan)
        contract.implementation(kit)
        self.strategy: OptimizerStrategy = make(plan.optim, context)
        self.backend: Backend = make(plan.backend, context)
        self.container = nn.Module()
        bodies: dict[str, nn.Module] = {}
        for role in ("policy", "value"):
            generator = torch.Generator().manual_seed(0)
            layer, bodies[role] = nn.Module(), nn.Module()
            bodies[role].layers = nn.ModuleList([layer])
            for name, shape in (("matrix", (8, 6)), ("vector", (6,))):
                drawn = torch.randn(shape, generator=generator).clamp(-2, 2)
                layer.register_parameter(name, nn.Parameter(drawn))
        self.container.bodies = nn.ModuleDict(bodies)
        self.trained = [
            TrainedParameter(name, parameter, role, 10 * contract.learning_rate if role == "value" else None)
            for name, parameter in self.container.named_parameters()
            for role in [name.split(".")[1]]
        ]
        self.backend.prepare(self.container, self.trained, self.strategy)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.container.named_parameters()}

    def loss(self) -> float:
        """Of the policy."""
        return float(self._loss("policy").detach())

    def step(self, factor: float = 1.0, only: str = "") -> None:
        """One step downhill, of all roles or one."""
        roles = (only,) if only else ("policy", "value")
        self.backend.backward(sum((self._loss(role) for role in roles), self._zero()), last=True)
        self.backend.update(factor)

    def _loss(self, role: str) -> Tensor:
        parameters = [one.parameter for one in self.trained if one.role == role]
        return sum((0.5 * parameter.square().sum() for parameter in parameters), self._zero())

    def _zero(self) -> Any:
        import torch

        return torch.zeros(())
