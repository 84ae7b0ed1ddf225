"""The contract of parallel backends: `BackendContract`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.interfaces import Backend
    from rlhf.testing.backend_bench import Bench
    from rlhf.testing.kit import Kit


class BackendContract(Contract):
    """What a backend must keep, tested where it is one process: gradients that add up, a global norm, whole weights, a
    state that comes back. What is true of several ranks is yours to test: `rlhf run --nproc 2` must give the numbers
    of one process.

    class TestMine(BackendContract):
        name = "mine"
    """

    kind = "backend"

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.IMITATE, "data": str(kit.once("data", kit.data))}

    def backend(self, kit: Kit) -> Backend:
        """A new one."""
        from rlhf.assemble import make
        from rlhf.component import Context

        self.implementation(kit)
        plan = self.plan(kit)
        made: Backend = make(plan.backend, Context(plan=plan))
        return made

    def bench(self, kit: Kit, max_norm: float | None = None, momentum: float = 0.0) -> Bench:
        """A backend at work on a small container, with plain gradient descent."""
        from rlhf.testing.backend_bench import Bench

        return Bench(self.backend(kit), max_norm, momentum)

    # The terms

    def test_forward_answers_each_request_in_order(self, rlhf_kit: Kit) -> None:
        from rlhf.testing.backend_bench import close

        bench = self.bench(rlhf_kit)
        found = bench.backend.forward(bench.requests("value", "policy"))
        require([scores.role for scores in found] == ["value", "policy"], "its scores aren't in the order asked for")
        wanted = bench.container(bench.requests("value", "policy"))
        same = close(found[0].values, wanted[0].values) and close(found[1].logp, wanted[1].logp)
        require(same, "what its forward says isn't what the container says")

    def test_gradients_are_the_sum_over_micro_batches(self, rlhf_kit: Kit) -> None:
        """Not the mean: losses are parts of a mean already. The step is at `factor` times each group's base rate."""
        bench = self.bench(rlhf_kit)
        before = bench.weights()
        gradients = bench.gradients((1.0, 0.25, 3.0))
        for i, scale in enumerate((1.0, 0.25, 3.0)):
            bench.backend.backward(bench.loss() * scale, last=i == 2)
        result = bench.backend.update(0.5)
        self._moved(bench, before, gradients, 0.5, "three micro-batches and a factor of .5")
        rate = bench.rates["policy"] * 0.5
        require(abs(result.learning_rate - rate) < 1e-9, f"it reports a rate of {result.learning_rate}, not {rate}")

    def test_the_norm_is_that_of_all_gradients(self, rlhf_kit: Kit) -> None:
        """Reported before clipping; and clipped, they are scaled down together."""
        bench = self.bench(rlhf_kit, max_norm=0.1)
        before = bench.weights()
        gradients = bench.gradients((1.0,))
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        bench.backend.backward(bench.loss(), last=True)
        result = bench.backend.update(1.0)
        near = abs(result.grad_norm - norm) <= 1e-4 * norm
        require(near, f"it reports a norm of {result.grad_norm:.6g}; that of all gradients together is {norm:.6g}")
        clipped = {name: gradient * (0.1 / norm) for name, gradient in gradients.items()}
        self._moved(bench, before, clipped, 1.0, "gradients clipped to a norm of .1")

    def test_gradients_are_cleared(self, rlhf_kit: Kit) -> None:
        """A step's gradients are gone with it."""
        bench = self.bench(rlhf_kit)
        bench.backend.backward(bench.loss(), last=True)
        bench.backend.update(1.0)
        before = bench.weights()
        gradients = bench.gradients((1.0,))
        bench.backend.backward(bench.loss(), last=True)
        bench.backend.update(1.0)
        self._moved(bench, before, gradients, 1.0, "a second step")

    def test_what_is_not_finite_is_not_applied(self, rlhf_kit: Kit) -> None:
        bench = self.bench(rlhf_kit)
        before = bench.weights()
        bench.backend.backward(bench.loss() * float("inf"), last=True)
        result = bench.backend.update(1.0)
        require(result.skipped, "gradients that aren't finite were applied: say StepResult(skipped=True)")
        same = all(bool((weights == before[name]).all()) for name, weights in bench.weights().items())
        require(same, "a step that was skipped has changed weights")
        gradients = bench.gradients((1.0,))
        bench.backend.backward(bench.loss(), last=True)
        bench.backend.update(1.0)
        self._moved(bench, before, gradients, 1.0, "the step after one that was skipped")

    def test_a_loss_may_be_constant(self, rlhf_kit: Kit) -> None:
        """Such as that of a micro-batch without any gradient."""
        import torch

        bench = self.bench(rlhf_kit)
        try:
            bench.backend.backward(torch.ones(()))
            bench.backend.backward(bench.loss(), last=True)
        except Exception as error:
            broken(f"a loss without a gradient raises {type(error).__name__}: {error}")

    def test_weights_are_all_of_a_module(self, rlhf_kit: Kit) -> None:
        """By its own names, whole, buffers among them; or those that are asked for."""
        bench = self.bench(rlhf_kit)
        wanted = bench.container.bodies["policy"].state_dict()
        found = dict(bench.backend.weights("policy"))
        lacking, other = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        require(not lacking, f"weights() leaves out {', '.join(lacking)}")
        require(not other, f"weights() gives {', '.join(other)}, which the module hasn't")
        for name, tensor in wanted.items():
            same = found[name].shape == tensor.shape and bool((found[name].cpu() == tensor.cpu()).all())
            require(same, f"weights() gives another {name} than the module has")
        some = dict(bench.backend.weights("policy", lambda name: name.endswith("matrix")))
        require(list(some) == ["matrix"], f"asked for the matrix alone, weights() gives {', '.join(some)}")

    def test_state_comes_back_to_the_bit(self, rlhf_kit: Kit) -> None:
        """Weights, what the optimiser keeps, and whatever else a step goes by."""
        from rlhf.testing.kit import written_and_read

        first = self.bench(rlhf_kit, momentum=0.9)
        first.steps(3)
        try:
            state = written_and_read(first.backend.state())
        except TypeError as error:
            broken(f"its state can't be put into a checkpoint: {error}")
        second = self.bench(rlhf_kit, momentum=0.9)
        second.steps(1)
        second.backend.load_state(state)
        for step in range(2):
            where = "restored" if step == 0 else "restored, and a step later"
            for name, weights in first.weights().items():
                same = bool((weights == second.weights()[name]).all())
                fix = "weights, and what the optimiser keeps of each, are in `state`"
                require(same, f"{where}, {name} is another: {fix}")
            first.steps(1)
            second.steps(1)

    def test_a_run_is_the_plain_one(self, rlhf_kit: Kit) -> None:
        """Through assembly and the loop: losses of four steps beside those of the backend that a plan takes unasked."""
        plain = rlhf_kit.once(
            "plain backend", lambda: rlhf_kit.work(rlhf_kit.plan({**self.base(rlhf_kit), "max_steps": 4})).go()
        )
        done = rlhf_kit.work(self.plan(rlhf_kit, max_steps=4)).go()
        for step, (a, b) in enumerate(zip(plain.metrics, done.metrics, strict=True), 1):
            near = abs(a["loss"] - b["loss"]) <= 1e-4 * max(abs(a["loss"]), 1.0)
            require(near, f"the loss of step {step} is {b['loss']:.6g}, and {a['loss']:.6g} of one process")

    def _moved(
        self, bench: Bench, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], factor: float, what: str
    ) -> None:
        """Each weight by its gradient times its role's rate."""
        from rlhf.testing.backend_bench import close

        for name, weights in bench.weights().items():
            wanted = before[name] - factor * bench.rates[name.split(".")[1]] * gradients[name]
            ratio = float((before[name] - weights).norm() / (before[name] - wanted).norm())
            require(close(weights, wanted), f"of {what}, {name} moved {ratio:.4g} times as far as it must")
