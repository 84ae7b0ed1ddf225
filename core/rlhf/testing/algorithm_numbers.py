"""The numbers of an algorithm, on made-up rollouts or rows and a table of scores: no model, no engine, no run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from rlhf.entries import AlgorithmEntry, Role
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from rlhf.experience import Experience
    from rlhf.interfaces import Algorithm
    from rlhf.offline import OfflineData
    from rlhf.testing.kit import Kit
    from rlhf.testing.table import Table
    from rlhf.testing.trial import Learnt
    from rlhf.world import World


class AlgorithmNumbers(Contract):
    """What the loss and the experience of any algorithm must keep."""

    kind = "algo"
    data: ClassVar[Sequence[Mapping[str, Any]] | None] = None
    """Records for an offline algorithm, or columns for an online one; left out, the kit's: prompts with a completion,
    a pair, a label and an answer."""

    def base(self, kit: Kit) -> dict[str, Any]:
        from rlhf.testing import parts

        recipe: dict[str, Any] = {"data": str(kit.once(("data", repr(self.data)), lambda: kit.data(self.data)))}
        entry = self.entry(kit)
        assert isinstance(entry, AlgorithmEntry)
        if "rollouts" in entry.requires:
            recipe["engine"] = {"max_new_tokens": 6}
            if entry.rewards:
                recipe["reward"] = parts.REWARD
        return recipe

    def online(self, kit: Kit) -> bool:
        return "rollouts" in self.entry(kit).requires

    def roles(self, kit: Kit) -> tuple[Role, ...]:
        return tuple(role.role for role in kit.once(("plan", *self._key()), lambda: self.plan(kit)).roles)

    def algorithm(self, kit: Kit, world: World | None = None) -> Algorithm:
        """A new one, without a run around it."""
        from rlhf.component import Context
        from rlhf.world import ALONE

        plan = kit.once(("plan", *self._key()), lambda: self.plan(kit))
        made: Algorithm = self.implementation(kit)(plan.algo.config, Context(plan=plan, world=world or ALONE))
        return made

    def experience(
        self, kit: Kit, algorithm: Algorithm, table: Table, groups: Iterable[int] | None = None, world: Any = None
    ) -> Experience:
        """Of the kit's rollouts or rows.

        Args:
            groups: of these prompts alone, or these rows, in this order.
            world: of ranks: each has every other group.
        """
        import torch

        from rlhf.parts import reseed
        from rlhf.testing import trial
        from rlhf.world import ALONE

        reseed(0)
        if not self.online(kit):
            data = self.rows(kit, algorithm)
            with torch.no_grad():
                return data.experience(list(range(len(data)) if groups is None else groups), table, world or ALONE)
        rollouts = trial.online(algorithm, table)
        wanted = list(range(trial.PROMPTS) if groups is None else groups)
        if world is not None:
            wanted = [group for group in wanted if group % world.size == world.rank]
        of = rollouts.sequences.group.tolist()
        rows = [row for group in wanted for row, own in enumerate(of) if own == group]
        if rows != list(range(len(of))):
            rollouts = rollouts.select(torch.tensor(rows, dtype=torch.long))
        with torch.no_grad():
            return algorithm.experience(rollouts, table)

    def rows(self, kit: Kit, algorithm: Algorithm) -> OfflineData:
        """Of an offline algorithm, the kit's rows or its own, as it encodes and joins them."""
        from rlhf.testing import trial
        from rlhf.testing.kit import default_records

        entry = self.entry(kit)
        assert isinstance(entry, AlgorithmEntry)
        try:
            return trial.offline(algorithm, entry.data, self.data or default_records(8))
        except ValueError as error:
            broken(f"no row of the kit's fits it ({error}): give the contract `data`, a list of records")

    def pieces(self, algorithm: Algorithm, experience: Experience, whole: bool = False) -> list[list[int]]:
        """Rows of micro-batches: all in one, or as small as they may be, the last first."""
        rows = list(range(len(experience)))
        if whole:
            return [rows]
        if algorithm.unit == "sequence":
            return [[row] for row in reversed(rows)]
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(experience.sequences.group.tolist()):
            groups.setdefault(group, []).append(row)
        return list(reversed(groups.values()))

    def learnt(self, kit: Kit, noise: float = 0.0, whole: bool = True) -> tuple[Experience, Learnt, Table]:
        """Experience and gradients of a new algorithm."""
        from rlhf.testing.table import Table
        from rlhf.testing.trial import learn

        algorithm, table = self.algorithm(kit), Table(self.roles(kit), noise=noise)
        experience = self.experience(kit, algorithm, table)
        try:
            return experience, learn(algorithm, table, experience, self.pieces(algorithm, experience, whole)), table
        except TypeError as error:
            broken(str(error))

    def _key(self) -> tuple[Any, ...]:
        return self.kind, self.name, repr(self.options), repr(self.recipe), repr(self.data)

    # The terms

    def test_the_loss_has_a_gradient(self, rlhf_kit: Kit) -> None:
        """A finite scalar that every trained role learns from, one at least."""
        _, learnt, _ = self.learnt(rlhf_kit)
        require(learnt.loss == learnt.loss and abs(learnt.loss) != float("inf"), f"the loss is {learnt.loss}")
        require(any(bool(g.any()) for g in learnt.of_roles.values()), "the loss has no gradient in any trained role")
        for name, gradient in learnt.of_roles.items():
            require(bool(gradient.isfinite().all()), f"the gradient of role {name!r} isn't finite")

    def test_masked_tokens_have_no_gradient(self, rlhf_kit: Kit) -> None:
        """What isn't the policy's own (tool output, a user's turn) teaches nothing: exactly."""
        experience, learnt, _ = self.learnt(rlhf_kit)
        masked = ~experience.sequences.mask
        for name, gradient in learnt.of_scores.items():
            if not name.endswith(".score"):
                count = int((gradient[masked] != 0).sum())
                fix = "use token_mean, sequence_sum and the like, which leave them out"
                require(not count, f"{count} of {int(masked.sum())} masked tokens have a gradient in {name}: {fix}")

    def test_what_is_said_of_masked_tokens_changes_nothing(self, rlhf_kit: Kit) -> None:
        """Nor do their log-probs, values and entropies reach other tokens by the way."""
        from rlhf.testing.trial import close

        experience, plain, _ = self.learnt(rlhf_kit)
        _, noisy, _ = self.learnt(rlhf_kit, noise=0.5)
        own = experience.sequences.mask
        for name, gradient in plain.of_scores.items():
            rows = slice(None) if name.endswith(".score") else own
            same = close(gradient[rows], noisy.of_scores[name][rows])
            require(same, f"what is said of masked tokens changes the gradient of others in {name}")

    def test_the_order_of_groups_changes_nothing(self, rlhf_kit: Kit) -> None:
        """A response's numbers don't depend on where in the batch its group stands."""
        from rlhf.testing.table import Table, rows_of
        from rlhf.testing.trial import close, learn

        found = []
        for backwards in (False, True):
            algorithm, table = self.algorithm(rlhf_kit), Table(self.roles(rlhf_kit))
            count = self._groups(rlhf_kit, algorithm)
            order = reversed(range(count)) if backwards else range(count)
            experience = self.experience(rlhf_kit, algorithm, table, list(order))
            learnt = learn(algorithm, table, experience, self.pieces(algorithm, experience, whole=True))
            rows = rows_of(experience)
            if backwards and not self.online(rlhf_kit):  # rows of data are numbered as they come
                rows = {(count - 1 - group, place): fields for (group, place), fields in rows.items()}
            found.append((rows, learnt))
        (rows, plain), (rows_turned, turned) = found
        _same_rows(rows, rows_turned, "the order of groups in the batch changes")
        for name, gradient in plain.of_roles.items():
            require(close(gradient, turned.of_roles[name]), f"the order of groups changes the gradient of {name!r}")

    def test_micro_batches_add_up(self, rlhf_kit: Kit) -> None:
        """However an optimiser step is cut, the loss, its gradients and what is logged are the same."""
        from rlhf.testing.trial import TOLERANCE, close

        _, whole, _ = self.learnt(rlhf_kit)
        _, cut, _ = self.learnt(rlhf_kit, whole=False)
        unit = self.algorithm(rlhf_kit).unit
        fix = "means must divide by the whole step (token_mean, sequence_mean, group_mean; batch.totals)"
        if unit == "sequence":
            fix += "; a loss that compares the members of a group says unit = 'group'"
        off = abs(whole.loss - cut.loss)
        near = off <= TOLERANCE * max(abs(whole.loss), abs(cut.loss)) + 1e-6
        cuts = f"cut into micro-batches of one {unit} each"
        require(near, f"{cuts}, the loss is {cut.loss:.6g}, not {whole.loss:.6g}: {fix}")
        for name, gradient in whole.of_roles.items():
            require(close(gradient, cut.of_roles[name]), f"{cuts}, the gradient of role {name!r} is another: {fix}")
        for name, value in whole.logged.items():
            near = abs(value - cut.logged[name]) <= 1e-3 * max(abs(value), 1e-3)
            require(near, f"{cuts}, the metric {name!r} is {cut.logged[name]:.6g}, not {value:.6g}: {fix}")

    def test_ranks_agree(self, rlhf_kit: Kit) -> None:
        """Over two ranks, each with a part of the batch, experience and gradients are those of one process."""
        from rlhf.testing.ranks import on_ranks
        from rlhf.testing.table import Table, rows_of
        from rlhf.testing.trial import close, rank_learns

        def of_rank(world: World) -> tuple[dict[tuple[int, int], Any], Learnt]:
            algorithm, table = self.algorithm(rlhf_kit, world), Table(self.roles(rlhf_kit))
            experience = self.experience(rlhf_kit, algorithm, table, world=world)
            return rows_of(experience), rank_learns(algorithm, table, experience, world)

        experience, alone, _ = self.learnt(rlhf_kit)
        parts = on_ranks([of_rank, of_rank])
        fix = "what is of the whole batch comes from context.world"
        rows = {key: fields for part, _ in parts for key, fields in part.items()}
        _same_rows(rows_of(experience), rows, "two ranks make another experience than one; " + fix + ":")
        for name, gradient in alone.of_roles.items():
            together = sum(learnt.of_roles[name] for _, learnt in parts)
            require(close(gradient, together), f"over two ranks the gradient of role {name!r} is another: {fix}")

    def test_a_rank_may_have_no_rows(self, rlhf_kit: Kit) -> None:
        """A small batch over many ranks leaves some without; they take part in every meeting all the same."""
        from rlhf.testing.ranks import on_ranks
        from rlhf.testing.table import Table, rows_of
        from rlhf.testing.trial import rank_learns

        def of_rank(world: World) -> dict[tuple[int, int], Any]:
            algorithm, table = self.algorithm(rlhf_kit, world), Table(self.roles(rlhf_kit))
            experience = self.experience(rlhf_kit, algorithm, table, [0], world=world)
            rank_learns(algorithm, table, experience, world)
            return rows_of(experience)

        try:
            parts = on_ranks([of_rank, of_rank])
        except Exception as error:
            broken(f"of two ranks, one without any rows, one fails: {type(error).__name__}: {error}")
        require(not (parts[0] and parts[1]), "a rank without rollouts has made experience of something else")

    def test_groups_may_be_left_out(self, rlhf_kit: Kit) -> None:
        """Groups with a reward that could not be had are left out before the algorithm sees them."""
        from rlhf.testing.table import Table
        from rlhf.testing.trial import learn

        algorithm, table = self.algorithm(rlhf_kit), Table(self.roles(rlhf_kit))
        try:
            experience = self.experience(rlhf_kit, algorithm, table, [2, 0])
            learn(algorithm, table, experience, self.pieces(algorithm, experience))
        except Exception as error:
            broken(f"with groups of the batch left out it fails: {type(error).__name__}: {error}")

    def test_it_requires_what_it_asks_for(self, rlhf_kit: Kit) -> None:
        """Beside an engine that can't say how likely its samples were, a plan is refused, and no run fails."""
        from rlhf.testing.table import Table

        table = Table(self.roles(rlhf_kit))
        self.experience(rlhf_kit, self.algorithm(rlhf_kit), table)
        named = "logprobs" in self.entry(rlhf_kit).requires
        fix = "its entry's `requires` must name 'logprobs', so that engines without are refused"
        require(named or not table.logp_old_asked, f"it asks score.logp_old how likely its samples were: {fix}")

    def test_samples_of_another_distribution_are_corrected_for(self, rlhf_kit: Kit) -> None:
        """A loss that asks how likely the samples were takes account of `batch.importance`."""
        import torch

        from rlhf.experience import Experience
        from rlhf.testing.table import Table
        from rlhf.testing.trial import learn

        algorithm, table = self.algorithm(rlhf_kit), Table(self.roles(rlhf_kit))
        experience = self.experience(rlhf_kit, algorithm, table)
        if not table.logp_old_asked:
            pytest.skip("it doesn't ask how likely its samples were")
        if algorithm.off_policy:
            pytest.skip("it says that its loss holds for samples of any distribution: off_policy")
        weights = 1.0 + 0.5 * torch.sin(torch.arange(len(experience.sequences.tokens), dtype=torch.float32))
        weighted = Experience(experience, {"importance": weights})
        learnt = learn(algorithm, table, weighted, self.pieces(algorithm, experience, whole=True))
        fix = "say policy_mean in place of token_mean, or multiply by batch.importance"
        fix += "; of a loss that holds for any samples, off_policy = True"
        require(learnt.corrected, f"it learns from what another distribution sampled as from its own: {fix}")

    def test_state_is_plain_and_complete(self, rlhf_kit: Kit) -> None:
        """What `state` gives goes into a checkpoint; another process that is given it goes on just so."""
        from rlhf.testing.kit import same, written_and_read
        from rlhf.testing.table import Table, rows_of

        first, table = self.algorithm(rlhf_kit), Table(self.roles(rlhf_kit))
        self._one_step(rlhf_kit, first, table)
        try:
            state = written_and_read(first.state())
        except TypeError as error:
            broken(f"its state can't be put into a checkpoint: {error}")
        second = self.algorithm(rlhf_kit)
        second.load_state(state)
        again = written_and_read(second.state())
        require(same(again, state), f"given its state, it says another: {again}, not {state}")
        found = []
        for algorithm in (first, second):
            algorithm.step = 1
            self._one_step(rlhf_kit, algorithm, table)
            found.append(rows_of(self.experience(rlhf_kit, algorithm, table)))
        fix = "what it keeps between steps goes into `state` and comes back in `load_state`"
        _same_rows(found[0], found[1], f"after its state is restored it goes on otherwise ({fix}):")

    def _one_step(self, kit: Kit, algorithm: Algorithm, table: Table) -> None:
        """As the loop would make it, of the algorithm's part."""
        from rlhf.testing.trial import learn
        from rlhf.world import ALONE

        experience = self.experience(kit, algorithm, table)
        learnt = learn(algorithm, table, experience, self.pieces(algorithm, experience, whole=True))
        of_step = {"loss": learnt.loss, **learnt.logged, "optim/grad_norm": 1.0, "optim/learning_rate": 1e-3}
        algorithm.minibatch_done(of_step)
        algorithm.step_done({**algorithm.context.metrics.drain(ALONE), **of_step, "reward/mean": 0.5})

    def _groups(self, kit: Kit, algorithm: Algorithm) -> int:
        """How many groups the kit's batch has."""
        from rlhf.testing.trial import PROMPTS

        return PROMPTS if self.online(kit) else len(self.rows(kit, algorithm))


def _same_rows(a: Mapping[Any, Mapping[str, Any]], b: Mapping[Any, Mapping[str, Any]], what: str) -> None:
    from rlhf.testing.trial import close

    require(a.keys() == b.keys(), f"{what} which responses are learnt from")
    for (group, place), fields in a.items():
        for name, value in fields.items():
            same = name in b[group, place] and close(value, b[group, place][name])
            where = f"of response {place} of group {group}"
            require(same, f"{what} {name!r} {where}")
