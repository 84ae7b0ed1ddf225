"""From an accepted plan to the parts of a run: data is read and checked first, weights are loaded after, and nothing
is written before both are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import attrs
import torch

from rlhf import data, offline
from rlhf.data import Feed
from rlhf.entries import RewardEntry
from rlhf.errors import Problem, RequestError, RowError
from rlhf.floor import Ledger
from rlhf.importance import OffPolicy
from rlhf.interfaces import Algorithm, Backend, Codec, Context, Engine, OptimizerStrategy, Policy
from rlhf.mixture import Mixture, completion_example
from rlhf.models import build
from rlhf.parts import Parts, Say
from rlhf.place import here
from rlhf.plan import Component, Plan
from rlhf.registry import resolve
from rlhf.rollouts import Sampler, Source
from rlhf.rows import CompletionRow, PromptRow
from rlhf.scoring import Scorer, trainer_logp


def assemble(plan: Plan, say: Say) -> Parts:
    """Make every component of the plan.

    Raises:
        RequestError: the data or a model can't serve; nothing was written.
    """
    _threads(plan)
    context = Context(plan=plan, seed=plan.run.seed, say=say)
    backend: Backend = make(plan.backend, context)
    context.world, context.device = backend.world, backend.device
    policy: Policy = make(plan.policy, context)
    context.policy = policy
    algorithm: Algorithm = make(plan.algo, context)
    codec = policy.codec(_primary(plan))
    if plan.online:
        # Rewards first: they say which columns the rows must have.
        sources = [Source(c.key, getattr(c.config, "weight", 1.0), make(c, context)) for c in plan.rewards]
        check = _check_of_rewards(sources, _needed_columns(plan, sources))
        training, held_out = _prompts(plan, context, codec, check, say)
        mixture = _mixture(plan, context, codec, say)
        engine: Engine | None = make(plan.engine, context) if plan.engine else None
        count = len(training)
    else:
        rows, rows_out = _rows(plan, context, algorithm, codec, say)
        engine, sources = None, []
        count = len(rows)
    optimizer: OptimizerStrategy = make(plan.optim, context)
    models = build(plan, policy, backend, optimizer, context)
    ledger = Ledger(models.shape)
    run = plan.run
    off_policy = OffPolicy(run.importance, run.importance_cap, run.importance_beyond)
    score = Scorer(models, run.micro_batch_tokens, engine, ledger=ledger, off_policy=off_policy)
    feed = Feed.of(count, run.batch_size, run.seed, run.epochs, run.max_steps)
    last = None if run.max_steps else data.end_of(count, run.epochs)
    _tell_repeated(count, len(feed.rows(0, last)), run.batch_size, say)
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
        trackers=[make(tracker, context) for tracker in plan.trackers] if backend.world.rank == 0 else [],
        last=last,
    )
    if plan.online:
        if engine is None:
            raise RequestError(f"{plan.algo.name} needs an engine")
        module = plan.role("policy").module
        engine.trainer_logp = trainer_logp(models, run.micro_batch_tokens)
        engine.attach(models.body(module), policy, models.specs["policy"])
        temperature = float(getattr(engine.config, "temperature", 1.0))
        _check_log_probs(plan, engine, temperature, say)
        whole = partial(backend.gathered, module) if engine.borrows else nullcontext
        parts.sampler = Sampler(engine, sources, codec, score, run.seed, temperature, backend.world, whole)
        parts.prompts, parts.heldout_prompts = training, held_out
        parts.mixture = mixture
    else:
        parts.data, parts.heldout_data = rows, rows_out
    return parts


def _check_log_probs(plan: Plan, engine: Engine, temperature: float, say: Say) -> None:
    """What the engine says of its log-probs, now that it has met its model.

    Raises:
        RequestError: the algorithm needs to know how likely samples were, and that can't be known.
    """
    said, name = engine.logprobs, plan.engine.name if plan.engine else ""
    if "logprobs" not in plan.algo.entry.requires:
        return
    if said.truncated:
        what = f"--engine {name} samples from a part of the policy's distribution, and {plan.algo.name} needs log-probs"
        raise RequestError(Problem(f"{what} of what was sampled", "let it sample from the whole of it"))
    if not said.usable(temperature):
        why = f"are of before temperature {temperature:g}" if said.available else "can't be had"
        say(f"note: the log-probs of --engine {name} {why}: they are computed, and what they were is not corrected for")


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
        torch.set_num_threads(max(1, plan.machine.cpus // here().local_size))


def _tell_refused(rows: data.Rows[Any], what: str, say: Say) -> None:
    if rows.split:
        say(f"{what}: {rows.split} of its records are several rows each, such as a pair: {len(rows)} rows in all")
    if rows.refused.total:
        say(f"{what}: {len(rows)} rows taken, {rows.refused.total} refused:")
        for line in rows.refused.lines():
            say(f"  {line}")


def _tell_repeated(count: int, taken: int, batch: int, say: Say) -> None:
    """A batch larger than the data is legal, and seldom meant.

    Args:
        count: rows, or packed items, that there are.
        taken: how many a step takes.
    """
    if count < batch:
        times = f"each is in every step {taken / count:.3g} times" if taken > count else "the first step takes them all"
        say(f"note: {count} rows are fewer than the batch of {batch}: {times}; to take each once: --batch-size {count}")


def _read(
    plan: Plan, context: Context, convert: Callable[[Any], Any], say: Say
) -> tuple[data.Rows[Any], data.Rows[Any]]:
    """(rows to learn from, rows held out), typed and converted; refusals are told."""
    row_type = plan.algorithm_entry.data or PromptRow
    run = plan.run
    rows = data.read(plan.data, row_type, context).convert(convert)
    rows.require(plan.algo.name, row_type)
    _tell_refused(rows, "data", say)
    if plan.eval_data:
        held_out = data.read(plan.eval_data, row_type, context).convert(convert)
        held_out.require(plan.algo.name, row_type)
        _tell_refused(held_out, "eval data", say)
    else:
        rows, held_out = rows.held_out(run.eval_fraction if run.eval_rows else 0.0, run.eval_rows, run.seed)
        if not len(held_out) and run.eval_rows:
            say("nothing is held out: too few rows to spare any; give --eval-data to see before and after")
    held_out.items = held_out.items[: run.eval_rows]
    return rows, held_out


def _needed_columns(plan: Plan, sources: Sequence[Source]) -> dict[str, str]:
    """The columns that rewards cannot do without -> the key of the reward.

    Raises:
        RequestError: a plugin's function for them fails.
    """
    needed: dict[str, str] = {}
    for component, source in zip(plan.rewards, sources, strict=True):
        assert isinstance(component.entry, RewardEntry)
        columns = component.entry.columns
        try:
            named = [*(columns(component.config) if callable(columns) else columns), *source.reward.columns]
        except Exception as error:  # a plugin's fault
            what = f"{component}: its columns can't be told: {type(error).__name__}: {error}"
            raise RequestError(Problem(what, "leave it out, and tell its author")) from error
        needed.update(dict.fromkeys(named, component.key))
    return needed


def _check_of_rewards(sources: Sequence[Source], needed: Mapping[str, str]) -> Callable[[Any], None]:
    """What refuses rows that rewards can't judge.

    Args:
        needed: column that rows must have -> the reward that needs it.
    """

    def check(row: Any) -> None:
        for column, user in needed.items():
            if column not in getattr(row, "extra", {}):
                has = ", ".join(sorted(getattr(row, "extra", {}))) or "none"
                raise RowError(f"no column {column!r}, which reward {user!r} needs; its other columns: {has}")
        for source in sources:
            try:
                source.reward.check(row)
            except RowError as error:
                raise RowError(f"reward {source.name!r}: {error}") from error

    return check


def _prompts(
    plan: Plan, context: Context, codec: Codec, check: Callable[[Any], None], say: Say
) -> tuple[list[Any], list[Any]]:
    def convert(row: Any) -> Any:
        check(row)
        return row, codec.prompt(row.prompt)

    rows, held_out = _read(plan, context, convert, say)
    return [item for _, item in rows.items], [item for _, item in held_out.items]


def _rows(
    plan: Plan, context: Context, algorithm: Algorithm, codec: Codec, say: Say
) -> tuple[offline.OfflineData, offline.OfflineData]:
    def convert(row: Any) -> Any:
        return list(algorithm.examples(row, codec))

    rows, held_out = _read(plan, context, convert, say)
    return offline.OfflineData(rows, algorithm), offline.OfflineData(held_out, algorithm)


def _mixture(plan: Plan, context: Context, codec: Codec, say: Say) -> Mixture | None:
    """Rows to be learnt beside what is sampled, where the plan has any."""
    if not plan.ptx_data:
        return None
    rows = data.read(plan.ptx_data, CompletionRow, context).convert(lambda row: [completion_example(row, codec)])
    rows.require("the ptx term", CompletionRow, "--ptx-data")
    _tell_refused(rows, "ptx data", say)
    return Mixture(rows, plan.run.ptx_coef, plan.run.ptx_batch_size, plan.run.seed)
