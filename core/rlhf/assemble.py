"""From an accepted plan to the parts of a run: data is read and checked first, weights are loaded after, and nothing
is written before both are there."""

from __future__ import annotations

import os
from typing import Any

import attrs
import torch

from rlhf import data, offline
from rlhf.data import Feed
from rlhf.entries import RewardEntry
from rlhf.errors import RequestError, RowError
from rlhf.floor import Ledger
from rlhf.interfaces import Algorithm, Backend, Codec, Context, Engine, OptimizerStrategy, Policy
from rlhf.models import Scorer, build
from rlhf.parts import Parts, Say
from rlhf.plan import Component, Plan
from rlhf.registry import resolve
from rlhf.rollouts import Sampler, Source
from rlhf.rows import PromptRow


def assemble(plan: Plan, say: Say) -> Parts:
    """Make every component of the plan.

    Raises:
        RequestError: the data or a model can't serve; nothing was written.
    """
    _threads(plan)
    context = Context(plan=plan, seed=plan.run.seed)
    backend: Backend = make(plan.backend, context)
    context.world, context.device = backend.world, backend.device
    policy: Policy = make(plan.policy, context)
    context.policy = policy
    algorithm: Algorithm = make(plan.algo, context)
    codec = policy.codec(_primary(plan))
    if plan.online:
        training, held_out = _prompts(plan, context, codec, say)
        engine: Engine | None = make(plan.engine, context) if plan.engine else None
        sources = [Source(c.key, getattr(c.config, "weight", 1.0), make(c, context)) for c in plan.rewards]
        count = len(training)
    else:
        rows, rows_out = _rows(plan, context, algorithm, codec, say)
        engine, sources = None, []
        count = len(rows)
    optimizer: OptimizerStrategy = make(plan.optim, context)
    models = build(plan, policy, backend, optimizer, context)
    ledger = Ledger(models.shape)
    score = Scorer(models, plan.run.micro_batch_tokens, engine, ledger=ledger)
    run = plan.run
    feed = Feed.of(count, run.batch_size, run.seed, run.epochs, run.max_steps)
    parts = Parts(
        plan=plan,
        context=context,
        models=models,
        backend=backend,
        algorithm=algorithm,
        optimizer=optimizer,
        score=score,
        ledger=ledger,
        feed=feed,
        trackers=[make(tracker, context) for tracker in plan.trackers],
        last=None if run.max_steps else data.end_of(count, run.epochs),
    )
    if plan.online:
        if engine is None:
            raise RequestError(f"{plan.algo.name} needs an engine")
        engine.attach(models.body(plan.role("policy").module), policy, models.specs["policy"])
        temperature = float(getattr(engine.config, "temperature", 1.0))
        parts.sampler = Sampler(engine, sources, codec, score, run.seed, temperature)
        parts.prompts, parts.heldout_prompts = training, held_out
    else:
        parts.data, parts.heldout_data = rows, rows_out
    return parts


def make(component: Component, context: Context) -> Any:
    """A component of the plan, alive."""
    return resolve(component)(component.config, attrs.evolve(context, label=component.key))


def _primary(plan: Plan) -> str:
    """The model whose tokenizer the run speaks: the policy's, else the first trained role's."""
    names = [role.name for role in plan.roles]
    role = plan.role("policy") if "policy" in names else next(r for r in plan.roles if r.role.trainable)
    return role.model.path


def _threads(plan: Plan) -> None:
    """One thread a core, split among the ranks of this machine; the user's OMP_NUM_THREADS goes before."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, plan.machine.cpus // plan.run.nproc))


def _tell_refused(rows: data.Rows[Any], what: str, say: Say) -> None:
    if rows.refused.total:
        say(f"{what}: {len(rows)} rows taken, {rows.refused.total} refused:")
        for line in rows.refused.lines():
            say(f"  {line}")


def _read(plan: Plan, context: Context, convert: Any, say: Say) -> tuple[data.Rows[Any], data.Rows[Any]]:
    """(rows to learn from, rows held out), typed and converted; refusals are told."""
    row_type = plan.algorithm_entry.data or PromptRow
    run = plan.run
    rows = data.read(plan.data, row_type, context).convert(_with_columns(plan)).convert(convert)
    rows.require(plan.algo.name, row_type)
    _tell_refused(rows, "data", say)
    if plan.eval_data:
        held_out = data.read(plan.eval_data, row_type, context).convert(_with_columns(plan)).convert(convert)
        held_out.require(plan.algo.name, row_type)
        _tell_refused(held_out, "eval data", say)
    else:
        rows, held_out = rows.held_out(run.eval_fraction if run.eval_rows else 0.0, run.eval_rows, run.seed)
        if not len(held_out) and run.eval_rows:
            say("nothing is held out: too few rows to spare any; give --eval-data to see before and after")
    held_out.items = held_out.items[: run.eval_rows]
    return rows, held_out


def _with_columns(plan: Plan) -> Any:
    """Rows must have the columns that rewards cannot do without."""
    needed: dict[str, str] = {}
    for component in plan.rewards:
        assert isinstance(component.entry, RewardEntry)
        columns = component.entry.columns
        for column in columns(component.config) if callable(columns) else columns:
            needed[column] = component.key

    def check(row: Any) -> Any:
        for column, user in needed.items():
            if column not in getattr(row, "extra", {}):
                has = ", ".join(sorted(getattr(row, "extra", {}))) or "none"
                raise RowError(f"no column {column!r}, which reward {user!r} needs; its other columns: {has}")
        return row

    return check


def _prompts(plan: Plan, context: Context, codec: Codec, say: Say) -> tuple[list[Any], list[Any]]:
    rows, held_out = _read(plan, context, lambda row: (row, codec.prompt(row.prompt)), say)
    return [item for _, item in rows.items], [item for _, item in held_out.items]


def _rows(
    plan: Plan, context: Context, algorithm: Algorithm, codec: Codec, say: Say
) -> tuple[offline.OfflineData, offline.OfflineData]:
    def convert(row: Any) -> Any:
        return list(algorithm.examples(row, codec))

    rows, held_out = _read(plan, context, convert, say)
    return offline.OfflineData(rows, algorithm), offline.OfflineData(held_out, algorithm)
