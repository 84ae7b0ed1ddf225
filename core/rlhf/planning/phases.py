"""The most that each phase of a step has alive at once, and what each role takes of it.

    held        weights + optimiser state + other buffers, all modules, the engine's own
    load        weights of the modules before, and one module's file on its way
    rollout     held + KV cache + prefill + logits of the newest tokens
    reward      held + the forward of the roles that rewards ask for
    experience  held + the forward without gradient of the roles that are scored
                and, where a step is one micro-batch, what its first loss will ask for: scored now, graph and all
    update      held + gradients + activations kept + the largest of: work in a layer, at the head, in the optimiser's
                step
    save        held
    gaps        in each phase on a CPU but the first: between blocks of what comes and goes, so far as gradients, which
                count beside activations for the same reason, are less
    libraries   in each phase on a CPU but the first: what they take when they are first used

In the first micro-batch gradients come, layer by layer, as activations go, so that they are never all there at once.
But what goes leaves gaps between what stays, which gradients fill only in part: of full training of a 135M model a
CPU's heap grew in the backward by .9 to 1.1 times the gradients, in four ways of training. So both count. What was the
head's place is one gap, large enough for what the optimiser's step takes of its largest tensor, often the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from rlhf.entries import EngineEntry, OptimizerEntry, PolicyEntry
from rlhf.plan import Plan, RolePlan
from rlhf.planning.activations import transformer
from rlhf.planning.footprint import Activations, ForwardBatch, ModuleMemory, Passes, asked, ranks_of
from rlhf.planning.memory import (
    GAPS,
    Lengths,
    Memory,
    Phase,
    PhaseBytes,
    RoleBytes,
    assumed_lengths,
    holder,
    judges_of,
    micro_batch,
    modules,
    optimizer_bytes,
    passes_of,
    scored_roles,
    step_bytes,
)

LIBRARIES = 42e6
"""Bytes. Between the first model and the end of the second step 25 to 33 MB of libraries' code were read into memory,
and 12 MB of objects made, in seven runs of a 135M model, whatever was trained."""
PACKED = 55e6
"""Bytes that float32 products keep to lay out their operands (MKL, two threads): seen as what the heap had in use
beyond all tensors, in runs of float32 alone."""


def predict(plan: Plan, lengths: Lengths | None = None) -> Memory:
    """What the plan takes.

    Args:
        lengths: of sequences; left out, `assumed_lengths`.

    Raises:
        Uncountable: a component's footprint failed. What a role lacks is told in the result.
    """
    planner = _Planner(plan, lengths or assumed_lengths(plan))
    return planner.memory()


@attrs.define
class _Planner:
    plan: Plan
    lengths: Lengths
    _modules: dict[str, ModuleMemory] = attrs.field(factory=dict, init=False)
    _passes: Passes = attrs.field(factory=Passes, init=False)
    _engine: Mapping[str, float] = attrs.field(factory=dict, init=False)
    _cpu: bool = attrs.field(default=True, init=False)

    def memory(self) -> Memory:
        plan = self.plan
        counted = modules(plan)
        self._modules, notes = counted.modules, counted.notes
        self._passes = passes_of(plan)
        if isinstance(plan.optim.entry, OptimizerEntry) and plan.optim.entry.footprint is None:
            notes.append(f"{plan.optim}: tells no footprint; counted as two moments of 4 bytes")
        self._cpu = "cuda" not in plan.machine.provides
        self._engine = self._of_engine(notes)
        return Memory(
            lengths=self.lengths,
            ranks=ranks_of(plan),
            cpu=self._cpu,
            roles=tuple(self._role(role) for role in plan.roles),
            phases=tuple(self._phases()),
            missing=counted.missing,
            notes=tuple(notes),
        )

    # Of a module

    def _weights(self, module: ModuleMemory) -> float:
        return sum(w.bytes for w in module.own) / module.over("weights")

    def _mapped(self, module: ModuleMemory) -> float:
        """On a CPU a file stays mapped while any weight is read from it as it is, such as the embedding beside weights
        that were packed: the pages of the others stay resident, until memory is short."""
        as_it_is = any(w.bytes_each == 2.0 for w in module.own if w.kind == "embedding")
        if not (self._cpu and module.unpacks and as_it_is):
            return 0.0
        plain = {weight.name: weight for weight in module.architecture.weights}
        return sum(2.0 * plain[w.name].numbers for w in module.own if w.kind == "linear" and w.name in plain)

    def _gradients(self, module: ModuleMemory) -> float:
        return sum(w.bytes for w in module.trained) / module.over("gradients")

    def _state(self, module: ModuleMemory) -> float:
        return sum(optimizer_bytes(self.plan, w) for w in module.trained) / module.over("optimizer")

    def _whole_layer(self, module: ModuleMemory) -> float:
        """Of weights that are divided: one layer's and the next one's, whole, or the embedding."""
        if module.over("weights") == 1:
            return 0.0
        layers = module.architecture.layers
        layer = sum(w.bytes / w.count * (w.count // layers) for w in module.own if w.count > 1)
        ends = max((w.bytes for w in module.own if w.count == 1), default=0.0)
        return max(2 * layer, ends)

    def _whole_gradients(self, module: ModuleMemory) -> float:
        """Of gradients that are divided: one layer's, or the embedding's, while it is whole, and in the buffer in which
        it is added up over ranks."""
        if module.over("gradients") == 1:
            return 0.0
        layer = sum(w.bytes / w.count * (w.count // module.architecture.layers) for w in module.trained if w.count > 1)
        return 2 * max(layer, max((w.bytes for w in module.trained if w.count == 1), default=0.0))

    def _batch(self, gradient: bool) -> ForwardBatch:
        rows, _ = micro_batch(self.plan, self.lengths, gradient=gradient)
        group = self._passes.responses
        return ForwardBatch(
            rows=rows,
            prompt=self.lengths.prompt,
            response=self.lengths.response,
            group=group if rows % group == 0 else 1,
            gradient=gradient,
            entropy=self._passes.entropy and gradient,
            compared=self._passes.compared and gradient,
        )

    def _activations(self, module: ModuleMemory, batch: ForwardBatch) -> Activations:
        entry = self.plan.policy.entry
        assert isinstance(entry, PolicyEntry)
        if entry.footprint is None:
            return transformer(module, batch)
        return asked(self.plan.policy, entry.footprint, module, batch, self.plan, self.plan.policy)

    # Of roles

    def _role(self, role: RolePlan) -> RoleBytes:
        module = self._modules.get(role.name)
        if module is None:  # it has none of its own, or can't be counted
            return RoleBytes(role=role.name, module=role.module, parameters=0, trained=0, weights=0.0, gradients=0.0,
                             optimizer=0.0, activations=0.0, head=0.0, other=0.0)  # fmt: skip
        found = self._activations(module, self._batch(gradient=module.trainable))
        parts = sorted({*module.divided})
        ways = {module.over(part) for part in parts}
        over = f"{', '.join(parts)} over {max(ways)}" if ways - {1} else "replicated"
        return RoleBytes(
            role=role.name,
            module=role.module,
            parameters=sum(w.numbers for w in module.own),
            trained=sum(w.numbers for w in module.trained),
            weights=self._weights(module),
            gradients=self._gradients(module),
            optimizer=self._state(module),
            activations=found.kept + found.host or found.working,
            head=found.head,
            other=sum(size for what, size in module.copies.items() if self._cpu or not what.startswith("host ")),
            host=tuple(sorted(module.host)),
            sharding=over if ranks_of(self.plan) > 1 else "whole",
        )

    # Of phases

    def _of_engine(self, notes: list[str]) -> Mapping[str, float]:
        plan = self.plan
        owner = self._modules.get(plan.role("policy").module) if any(r.name == "policy" for r in plan.roles) else None
        if plan.engine is None or owner is None:
            return {}
        assert isinstance(plan.engine.entry, EngineEntry)
        if plan.engine.entry.footprint is None:
            notes.append(f"{plan.engine}: tells no footprint; its own memory is missing here")
            return {}
        share = -(-plan.run.batch_size // ranks_of(plan)) * self._passes.responses
        rows = max(share, -(-plan.run.eval_rows // ranks_of(plan)))
        batch = ForwardBatch(rows=rows, prompt=self.lengths.prompt, response=self.lengths.response,
                      group=self._passes.responses, gradient=False, scored=False)  # fmt: skip
        return asked(plan.engine, plan.engine.entry.footprint, owner, batch, plan, plan.engine)

    def _phases(self) -> Iterator[PhaseBytes]:
        yield self._phase("load", self._loading(), held=False)
        if self.plan.online:
            passing = {k: v for k, v in self._engine.items() if not k.startswith("resident ")}
            yield self._phase("rollout", passing, at_work=("policy",))
            judged = tuple(role.name for role in self.plan.roles if role.name in judges_of(self.plan))
            if judged:
                yield self._phase("reward", self._forward(judged), at_work=judged)
        scored = scored_roles(self.plan)
        if scored:
            ahead = sum(a.kept for a in self._trained_activations()) if self._scores_ahead() else 0.0
            parts = self._forward(scored)
            parts["activations"] += ahead
            yield self._phase("experience", parts, at_work=scored)
        yield from self._update()
        yield self._phase("save", {})

    def _phase(
        self,
        name: Phase,
        passing: Mapping[str, float],
        *,
        held: bool = True,
        at_work: tuple[str, ...] = (),
        beside: Mapping[str, float] | None = None,
    ) -> PhaseBytes:
        """`passing` comes and goes with it on the device, `beside` on the host."""
        device: dict[str, float] = {}
        host: dict[str, float] = {}

        def add(part: str, size: float, on_host: bool = False) -> None:
            place = host if on_host and not self._cpu else device
            if size:
                place[part] = place.get(part, 0.0) + size

        owners = {holder(role) for role in self.plan.roles if role.name in at_work}
        for module in self._modules.values() if held else ():
            away = "weights" in module.host
            if not module.filed:
                add("weights", self._weights(module), away)
            if module.role in owners and module.visits and (module.filed or (away and not self._cpu)):
                add("weights", self._weights(module))
            if module.role in owners:
                add("whole layers", self._whole_layer(module))
            add("optimiser", self._state(module), "optimizer" in module.host)
            for what, size in module.copies.items():
                add("other", size, what.startswith("host "))
            add("files", self._mapped(module))
        if held and self._cpu:
            add("libraries", LIBRARIES + (PACKED if any(m.compute == 4 for m in self._modules.values()) else 0.0))
        for part, size in self._engine.items() if held else ():
            if part.startswith("resident "):
                add(part.removeprefix("resident "), size)
        for part, size in passing.items():
            add(part, size)
        if held and self._cpu:
            gradients = passing.get("gradients", 0.0)  # count as what doesn't fit into gaps
            add("gaps", max(0.0, GAPS * (sum(passing.values()) - gradients) - gradients))
        for part, size in (beside or {}).items():
            add(part, size, True)
        return PhaseBytes(phase=name, device=device, host=host)

    def _loading(self) -> dict[str, float]:
        """Each module is read into a model of its own; the file's pages count while it is. What is to be spread over
        ranks is whole until all are there."""
        worst = done = 0.0
        for module in self._modules.values():
            size = self._weights(attrs.evolve(module, divided={}))
            borrows = len(module.own) < len(module.weights)  # then there is no file but of its adapters
            files = 2.0 * module.architecture.parameters if self._cpu and not borrows else 0.0
            worst = max(worst, done + size + files)
            done += 0.0 if module.filed or ("weights" in module.host and not self._cpu) else size
        return {"weights": done, "files": worst - done}

    def _forward(self, roles: tuple[str, ...]) -> dict[str, float]:
        """The largest forward without gradient of these roles, one after the other."""
        batch = self._batch(gradient=False)
        owners = dict.fromkeys(holder(self.plan.role(role)) for role in roles)
        found = [self._activations(self._modules[name], batch) for name in owners if name in self._modules]
        worst = max(found, key=lambda a: a.working + a.head, default=Activations(kept=0.0, working=0.0, head=0.0))
        # the head is read when the layers are done, whose states alone are left
        return {"activations": worst.working, "logits": max(0.0, worst.head - worst.working)}

    def _scores_ahead(self) -> bool:
        """A step is one micro-batch, so that what is scored before its first loss keeps its graph for it."""
        entry = self.plan.backend.entry
        minibatches = int(getattr(self.plan.algo.config, "minibatches", 1))
        _, forwards = micro_batch(self.plan, self.lengths, gradient=False)
        return self.plan.online and minibatches == 1 and forwards == 1 and "whole-gradients" in entry.provides

    def _trained_activations(self) -> list[Activations]:
        """Of the roles whose activations an update keeps at once."""
        together = self._passes.together
        owners = {holder(self.plan.role(name)) for name in together} if together is not None else None
        batch = self._batch(gradient=True)
        trained = (m for m in self._modules.values() if m.trainable)
        return [self._activations(m, batch) for m in trained if owners is None or m.role in owners]

    def _mixed_activations(self) -> list[Activations]:
        """Of the policy in a micro-batch of the rows that are learnt beside, taken to be as long as the rest."""
        run, lengths = self.plan.run, self.lengths
        if not self.plan.ptx_data:
            return []
        most = max(run.micro_batch_tokens // (lengths.prompt + lengths.response), 1)
        rows = min(-(-run.ptx_batch_size // ranks_of(self.plan)), most)
        batch = ForwardBatch(rows=rows, prompt=lengths.prompt, response=lengths.response, gradient=True)
        owner = self._modules.get(holder(self.plan.role("policy")))
        return [] if owner is None else [self._activations(owner, batch)]

    def _update(self) -> Iterator[PhaseBytes]:
        """Of all micro-batches."""
        trained = [m for m in self._modules.values() if m.trainable]
        found, mixed = self._trained_activations(), self._mixed_activations()
        working = max((a.working for a in (*found, *mixed)), default=0.0)
        head = max((a.head for a in (*found, *mixed)), default=0.0)
        step = max((step_bytes(self.plan, m.trained) / m.over("optimizer") for m in trained), default=0.0)
        most = max(working, head, step if self._cpu else 0.0)
        device = [m for m in trained if "gradients" not in m.host or self._cpu]
        parts = {
            "gradients": sum(self._gradients(m) + self._whole_gradients(m) for m in device),
            # what is learnt beside comes when the graph of the rest is gone
            "activations": max(sum(a.kept for a in found), sum(a.kept for a in mixed))
            + (most if most == working else 0.0),
            "logits": most if most == head != working else 0.0,
            "step": most if most not in (working, head) else 0.0,
        }
        beside = {
            "gradients": sum(self._gradients(m) for m in trained if m not in device),
            "activations": max(sum(a.host for a in found), sum(a.host for a in mixed)),
        }
        yield self._phase("update", parts, at_work=tuple(m.role for m in trained), beside=beside)
