"""A plan and what it takes, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rlhf.plan import Plan
from rlhf.planning.devices import GIB
from rlhf.planning.memory import PROCESS_BYTES, SLACK, Memory, RoleBytes
from rlhf.planning.prediction import Prediction

PARTS = ("weights", "optimiser", "gradients", "activations", "logits", "KV cache")
"""Columns of the table of phases; the rest is under "other"."""


def describe(plan: Plan) -> str:
    """What was composed."""
    lines = [f"algorithm  {plan.algo.name}: {plan.algo.entry.summary}"]
    lines.append(f"policy     {plan.policy.name}")
    if plan.engine:
        lines.append(f"engine     {plan.engine.name}: {plan.engine.entry.summary}")
    lines += [
        f"reward     {c.key}, weight {getattr(c.config, 'weight', 1.0):g}: {c.entry.summary}" for c in plan.rewards
    ]
    lines.append(f"optimiser  {plan.optim.name}")
    lines.append(f"backend    {plan.backend.name}: {plan.backend.entry.summary}")
    if plan.world_size > 1:
        lines.append(f"processes  {plan.world_size}, each with a part of every batch")
    lines += [f"data       {source.path} ({source.format.name})" for source in plan.data]
    lines += [f"held out   {source.path} ({source.format.name})" for source in plan.eval_data]
    run = plan.run
    mixed = f"weight {run.ptx_coef:g}, {run.ptx_batch_size} rows an optimiser step"
    lines += [f"ptx data   {source.path} ({source.format.name}): {mixed}" for source in plan.ptx_data]
    lines.append("roles")
    for role in plan.roles:
        kind = "trained" if role.role.trainable else "frozen"
        where = {
            "own": f"{role.model.path}  [{', '.join(c.name for c in role.mem)}]",
            "adapters-off": f"{role.module} with its adapters off",
            "trunk": f"a head on {role.module}'s trunk",
            "adapter": f"adapters{' and a head' if role.role.head == 'scalar' else ''} on {role.module}'s base"
            f"  [{', '.join(c.name for c in role.mem)}]",
        }[role.view]
        lines.append(f"  {role.name:<10} {kind:<8} {role.role.head:<7} {where}")
    steps = f"{run.max_steps} steps" if run.max_steps else f"{run.epochs:g} passes over the data"
    lines.append(f"length     {steps}, {run.batch_size} {'prompts' if plan.online else 'rows'} a step, seed {run.seed}")
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)


def resources(plan: Plan, found: Prediction) -> str:
    """What it takes."""
    return "\n".join((*_memory(plan, found), *_time(found), *(f"note       {note}" for note in found.memory.notes)))


def size(value: float) -> str:
    """Bytes in the unit that keeps the figure short; nothing at all is a dash."""
    if not value:
        return "-"
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.{1 if value >= 10 * scale else 2}f} {unit}"
    return f"{value:.0f} B"


def _on(role: RoleBytes) -> str:
    return f"on {role.module}'s base, " if role.module != role.role else ""


def _count(value: float) -> str:
    if not value:
        return "-"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def _memory(plan: Plan, found: Prediction) -> Iterator[str]:
    memory = found.memory
    lengths = memory.lengths
    devices = "" if memory.ranks == 1 else f", of each of {memory.ranks} devices"
    yield (
        f"memory     for sequences of {lengths.prompt} + {lengths.response} tokens, "
        f"micro-batches of {plan.run.micro_batch_tokens}{devices}"
    )
    head = ("role", "numbers", "trained", "weights", "gradients", "optimiser", "activations", "head", "other", "is")
    rows: list[tuple[str, ...]] = [
        (
            role.role, _count(role.parameters), _count(role.trained), size(role.weights), size(role.gradients),
            size(role.optimizer), size(role.activations), size(role.head), size(role.other),
            f"{_on(role)}{role.sharding}{'; on the host: ' + ', '.join(role.host) if role.host else ''}"
            if role.parameters else f"in {role.module}" if role.module != role.role else "not counted",
        )
        for role in memory.roles
    ]  # fmt: skip
    rows.append(
        (
            "total", _count(sum(r.parameters for r in memory.roles)), _count(sum(r.trained for r in memory.roles)),
            *(size(sum(getattr(r, part) for r in memory.roles)) for part in ("weights", "gradients", "optimizer")),
            "", "", size(sum(r.other for r in memory.roles)), "",
        )
    )  # fmt: skip
    yield from _table(head, rows)
    yield from _table(("phase", *PARTS, "other", "all"), list(_phase_rows(memory)))
    for phase in memory.phases:
        if phase.host:
            held = ", ".join(f"{part} {size(amount)}" for part, amount in phase.host.items())
            yield f"  on the host besides, in {phase.phase}: {held}"
    yield from _verdict(found)


def _phase_rows(memory: Memory) -> Iterator[tuple[str, ...]]:
    for phase in memory.phases:
        known = tuple(size(phase.device.get(part, 0.0)) for part in PARTS)
        rest = sum(amount for part, amount in phase.device.items() if part not in PARTS)
        yield (phase.phase, *known, size(rest), size(phase.total))


def _verdict(found: Prediction) -> Iterator[str]:
    memory = found.memory
    gaps = memory.peak.device.get("gaps", 0.0) / max(memory.peak.total, 1.0) if memory.cpu else SLACK
    yield (
        f"  peak       {size(memory.peak_bytes)} in {memory.peak.phase}, {gaps:.0%} lost between blocks among it; "
        f"{size(PROCESS_BYTES)} of the process besides"
    )
    yield f"  device     {verdict(found)}"


def verdict(found: Prediction) -> str:
    """Whether it fits."""
    there, needed = found.device_bytes, found.memory.needed
    what = f"{found.device}, {size(there)}"
    if found.memory.missing:
        return f"{what}: can't be said, not every role could be counted"
    if found.fits:
        return f"{what}: fits, {size(there - needed)} to spare"
    return f"{what}: does not fit, {size(needed - there)} too much"


def _time(found: Prediction) -> Iterator[str]:
    if found.duration is None:
        yield "time       can't be said, not every role could be counted"
        return
    phases = ", ".join(f"{name} {_seconds(value)}" for name, value in found.duration.phases.items() if value)
    floor = _seconds(found.duration.floor)
    yield f"time       about {_seconds(found.duration.total)} a step: {phases}; at the very least {floor}"
    yield f"           assumed: {found.duration.assumed}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned; a column without any entry is left out."""
    table = [tuple(head), *(tuple(row) for row in rows)]
    used = [i for i in range(len(head)) if any(row[i] not in ("", "-") for row in table[1:])]
    widths: Mapping[int, int] = {i: max(len(row[i]) for row in table) for i in used}
    for row in table:
        cells = [row[i].ljust(widths[i]) if i in (0, len(head) - 1) else row[i].rjust(widths[i]) for i in used]
        yield ("  " + "  ".join(cells)).rstrip()
