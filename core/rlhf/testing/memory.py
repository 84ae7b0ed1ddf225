"""The contract of memory strategies: `MemoryContract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.entries import MemoryEntry
from rlhf.testing import parts
from rlhf.testing.contract import Contract, require

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.testing.kit import Done, Kit, Work


class MemoryContract(Contract):
    """What a memory strategy must keep: the forward is the model's, what is trained is what should be, and a saved
    model is the trained one. It is tested on a policy that learns beside a frozen reference.

    class TestFourBit(MemoryContract):
        name = "4bit"
        beside = ("lora",)
        tolerance = 0.5
    """

    kind = "mem"
    beside: ClassVar[Sequence[str]] = ()
    """Other strategies that it needs, for all roles that they are for."""
    tolerance: ClassVar[float] = 1e-5
    """Nats by which a token's log-prob may differ from the plain model's: rounding, of a strategy of fp32; one that
    stores less says how much less is meant."""
    saved_tolerance: ClassVar[float] = 1e-4
    """Nats by which it may differ from the trained model's, when what was saved is loaded as a plain model."""
    changes_training: ClassVar[bool | None] = None
    """Whether training takes another way than without it; left out, not so of the phases "wrap" and "shard"."""

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.ANCHORED, "data": str(kit.once("data", kit.data))}

    def asked(self) -> dict[str, Any]:
        return {"mem": [*self.beside, {"name": self.name, **self.options}]}

    def run(self, kit: Kit) -> tuple[Work, Done]:
        """Four steps with it, made once."""

        def make() -> tuple[Work, Done]:
            work = kit.work(self.plan(kit, max_steps=4))
            return work, work.go()

        found: tuple[Work, Done] = kit.once(("memory at work", *self._key()), make)
        return found

    def plain(self, kit: Kit) -> tuple[Work, Done]:
        """Four steps without."""

        def make() -> tuple[Work, Done]:
            work = kit.work(kit.plan({**self.base(kit), **self.recipe, "max_steps": 4}))
            return work, work.go()

        found: tuple[Work, Done] = kit.once(("plain", repr(self.recipe)), make)
        return found

    def _key(self) -> tuple[Any, ...]:
        return self.name, repr(self.options), repr(self.beside), repr(self.recipe)

    # The terms

    def test_the_forward_is_the_models(self, rlhf_kit: Kit) -> None:
        """Before the first step, under every role."""
        plain = rlhf_kit.work(rlhf_kit.plan({**self.base(rlhf_kit), **self.recipe}))
        with_it = rlhf_kit.work(self.plan(rlhf_kit))
        for role in ("policy", "reference"):
            off = float((_logp(plain, role) - _logp(with_it, role)).abs().max())
            told = f"with it, log-probs of role {role!r} are off by {off:.3g} nats, more than {self.tolerance:g}"
            require(off <= self.tolerance, f"{told}; where less precision is meant, the contract says `tolerance`")

    def test_only_what_is_trained_changes(self, rlhf_kit: Kit) -> None:
        """Of a trained role, what `adapt` leaves to be trained; of a frozen one nothing, to the bit."""
        import torch

        work = rlhf_kit.work(self.plan(rlhf_kit, max_steps=3))
        models = work.parts.models
        reference = _logp(work, "reference")
        trained = {id(p) for p in models.trained.parameters() if p.requires_grad}
        require(trained, "nothing of the policy is left to be trained")
        everything = [*models.trained.named_parameters(), *models.frozen.named_parameters()]
        before = {name: parameter.detach().clone() for name, parameter in everything}
        work.go()
        changed = [name for name, p in everything if not torch.equal(p.detach().to(before[name].device), before[name])]
        wrong = [name for name, parameter in everything if name in changed and id(parameter) not in trained]
        require(not wrong, f"{', '.join(wrong[:3])} changed, and isn't trained")
        require(changed, "after three steps nothing has changed")
        off = float((_logp(work, "reference") - reference).abs().max())
        require(off == 0.0, f"after three steps of the policy, the frozen reference's log-probs moved by {off:.3g}")

    def test_it_learns(self, rlhf_kit: Kit) -> None:
        plan = self.plan(rlhf_kit, max_steps=10, batch_size=16)
        losses = [line["loss"] for line in rlhf_kit.work(plan).go().metrics]
        require(losses[-1] < losses[0], f"in ten steps the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")

    def test_training_is_the_plain_one(self, rlhf_kit: Kit) -> None:
        """What wraps or spreads a module changes how it runs, not what it computes."""
        entry = self.entry(rlhf_kit)
        assert isinstance(entry, MemoryEntry)
        changes = entry.phase in ("load", "adapt") if self.changes_training is None else self.changes_training
        if changes:
            return
        (_, plain), (_, done) = self.plain(rlhf_kit), self.run(rlhf_kit)
        for step, (a, b) in enumerate(zip(plain.metrics, done.metrics, strict=True), 1):
            near = abs(a["loss"] - b["loss"]) <= 1e-4 * max(abs(a["loss"]), 1.0)
            require(near, f"the loss of step {step} is {b['loss']:.6g}, and {a['loss']:.6g} without it")

    def test_what_is_saved_is_the_trained_model(self, rlhf_kit: Kit) -> None:
        """A run's model folder is one that anybody can load: a plain one, or adapters on one."""
        work, _ = self.run(rlhf_kit)
        with work.parts.models.standing_in("save"):
            trained = _logp(work, "policy")
        plan = rlhf_kit.plan({**self.base(rlhf_kit), "model": str(work.folder / "model")})
        off = float((_logp(rlhf_kit.work(plan), "policy") - trained).abs().max())
        told = f"loaded again, the saved model's log-probs are off by {off:.3g} nats"
        require(off <= self.saved_tolerance, f"{told}, more than {self.saved_tolerance:g}")

    def test_a_run_that_is_stopped_and_resumed_is_the_same(self, rlhf_kit: Kit) -> None:
        """To the bit, what it keeps itself among it."""
        from rlhf.testing.kit import same

        work, whole = self.run(rlhf_kit)
        folder = rlhf_kit.fresh("resumed")
        plan = self.plan(rlhf_kit, max_steps=4)
        rlhf_kit.work(plan, folder).go(stop_after=2)
        again = rlhf_kit.work(plan, folder)
        resumed = again.go(resume=True)
        require(resumed.metrics == whole.metrics, "stopped after two steps of four and resumed, its numbers are others")
        for name, weights in whole.weights.items():
            require(same(weights, resumed.weights[name]), f"stopped and resumed, {name} ends otherwise")
        for purpose in ("save", "evaluate"):
            found = []
            for one in (work, again):
                with one.parts.models.standing_in(purpose):
                    found.append(_logp(one, "policy"))
            fix = "what it keeps beside the weights goes into its state()"
            require(same(*found), f"stopped and resumed, the model to {purpose} is another: {fix}")


def _logp(work: Work, role: str) -> Tensor:
    """Of the kit's completions."""
    from rlhf.sequences import Sequences
    from rlhf.testing.kit import default_records

    records = default_records(6)
    codec = work.parts.models.policy.codec(work.plan.role("policy").model.path)
    prompts = [codec.prompt(record["prompt"]) for record in records]
    responses = [codec.response(record["chosen"], record["prompt"]) for record in records]
    return work.parts.score(Sequences.of(prompts, responses), role).logp
