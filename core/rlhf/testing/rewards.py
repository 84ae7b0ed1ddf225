"""The contract of rewards: `RewardContract`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from rlhf.entries import RewardEntry
from rlhf.errors import RequestError, RunError
from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from rlhf.interfaces import Failed, Reward
    from rlhf.sequences import Rollouts
    from rlhf.testing.kit import Kit, Work


class RewardContract(Contract):
    """What a reward must keep: a finite number for each rollout, or `Failed`; of the rollout, not of its place.

    class TestKeyword(RewardContract):
        name = "keyword"
        examples = [({"prompt": "Say please.", "word": "please"}, "Please!", 1.0)]
    """

    kind = "reward"
    records: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Rows with the columns that it needs; left out, those of `examples`, or rows with a prompt and an `answer`."""
    responses: ClassVar[Sequence[str]] = ("a", "ab abc", "42", "The answer is 42.", "c " * 20)
    """What is said to the rows, in turn."""
    examples: ClassVar[Sequence[tuple[Mapping[str, Any], str, float]]] = ()
    """(row, response, what it is worth): numbers that you have worked out."""
    compares: ClassVar[bool] = False
    """It compares the responses of a group: what one is worth depends on the others of its prompt."""
    tolerance: ClassVar[float] = 1e-5
    """By which numbers may differ where the batch is another, as those of a model do."""

    def base(self, kit: Kit) -> dict[str, Any]:
        records = kit.once(("records", repr(self._records())), lambda: kit.data(self._records()))
        return {"algo": parts.REINFORCE, "data": str(records), "engine": {"max_new_tokens": 6}}

    def _records(self) -> list[Mapping[str, Any]]:
        plain: list[Mapping[str, Any]] = [{"prompt": f"prompt {letter} ", "answer": "42"} for letter in "abcd"]
        return list(self.records) or [record for record, _, _ in self.examples] or plain

    def work(self, kit: Kit) -> Work:
        """A run that is ready to judge, made once."""
        key = ("reward at work", self.name, repr(self.options), repr(self.recipe), repr(self._records()))
        found: Work = kit.once(key, lambda: kit.work(self.plan(kit)))
        return found

    def reward(self, kit: Kit) -> Reward:
        sampler = self.work(kit).parts.sampler
        assert sampler is not None
        return sampler.sources[0].reward

    def rollouts(
        self, kit: Kit, said: Sequence[tuple[Mapping[str, Any], str]] | None = None, ended: bool = True
    ) -> Rollouts:
        """Responses to rows; left out, each of `responses` to each row."""
        import torch

        from rlhf.rows import PromptRow
        from rlhf.sequences import Rollouts, Sequences

        if said is None:
            said = [(record, response) for record in self._records() for response in self.responses]
        policy = self.work(kit).parts.models.policy
        codec = policy.codec(self.work(kit).plan.role("policy").model.path)
        rows = [PromptRow.from_record(record) for record, _ in said]
        groups = {row: i for i, row in enumerate(dict.fromkeys(map(repr, rows)))}
        sequences = Sequences.of(
            [codec.prompt(row.prompt) for row in rows],
            [codec.response(text, row.prompt) for row, (_, text) in zip(rows, said, strict=True)],
            group=[groups[repr(row)] for row in rows],
        )
        return Rollouts(
            sequences=sequences,
            logp=None,
            finish=tuple("stop" if ended else "length" for _ in rows),
            rows=tuple(rows),
            prompts=tuple(codec.prompt_text(codec.prompt(row.prompt)) for row in rows),
            texts=tuple(text for _, text in said),
            tags=("",) * len(rows),
            rewards=torch.zeros(len(rows)),
        )

    def judged(self, kit: Kit, rollouts: Rollouts) -> list[float | Failed]:
        """What it says of rollouts, checked as a run checks it."""
        from rlhf.interfaces import Failed
        from rlhf.rollouts import Source, judge

        verdicts: Any = []

        class Heard:
            """Keeps what the reward said."""

            def judge(heard, rollouts: Rollouts, score: Any) -> Any:  # noqa: N805 - `self` is the contract
                verdicts.append(self.reward(kit).judge(rollouts, score))
                return verdicts[-1]

        try:
            judge(rollouts, [Source(self.name, 1.0, Heard())], self.work(kit).parts.score)  # type: ignore[arg-type]
        except RunError as error:
            broken(str(error))
        return [item if isinstance(item, Failed) else float(item) for item in verdicts[0]]

    def same(self, a: float | Failed, b: float | Failed) -> bool:
        """Whether two verdicts are the same, but for the tolerance."""
        if isinstance(a, float) and isinstance(b, float):
            return abs(a - b) <= self.tolerance * max(1.0, abs(a))
        return type(a) is type(b)

    # The terms

    def test_a_number_for_each_rollout(self, rlhf_kit: Kit) -> None:
        """As many as rollouts, each finite or `Failed` with a reason."""
        from rlhf.interfaces import Failed

        for verdict in self.judged(rlhf_kit, self.rollouts(rlhf_kit)):
            if isinstance(verdict, Failed):
                require(verdict.why.strip(), "Failed must say why: a run tells its user")

    def test_what_the_examples_are_worth(self, rlhf_kit: Kit) -> None:
        if not self.examples:
            pytest.skip("the contract has no `examples`")
        said = [(record, response) for record, response, _ in self.examples]
        found = self.judged(rlhf_kit, self.rollouts(rlhf_kit, said))
        for (record, response, worth), verdict in zip(self.examples, found, strict=True):
            require(self.same(float(worth), verdict), f"{response!r} to {record} is worth {verdict}, not {worth}")

    def test_the_order_changes_nothing(self, rlhf_kit: Kit) -> None:
        import torch

        rollouts = self.rollouts(rlhf_kit)
        forth = self.judged(rlhf_kit, rollouts)
        back = self.judged(rlhf_kit, rollouts.select(torch.arange(len(rollouts)).flip(0)))
        for i, (a, b) in enumerate(zip(forth, reversed(back), strict=True)):
            require(self.same(a, b), f"in another order, {rollouts.texts[i]!r} is worth {b}, not {a}")

    def test_a_rollout_is_worth_the_same_alone(self, rlhf_kit: Kit) -> None:
        """Ranks have parts of the batch, so a number may depend on nothing beyond its group."""
        import torch

        rollouts = self.rollouts(rlhf_kit)
        whole = self.judged(rlhf_kit, rollouts)
        groups = rollouts.sequences.group.tolist() if self.compares else list(range(len(rollouts)))
        what = "with its group alone" if self.compares else "alone"
        fix = (
            "" if self.compares else " (where it compares the responses to a prompt, the contract says compares = True)"
        )
        for group in dict.fromkeys(groups):
            rows = [i for i, own in enumerate(groups) if own == group]
            for i, verdict in zip(rows, self.judged(rlhf_kit, rollouts.select(torch.tensor(rows))), strict=True):
                same = self.same(whole[i], verdict)
                require(same, f"{what}, {rollouts.texts[i]!r} is worth {verdict}, not {whole[i]}{fix}")

    def test_nothing_to_judge(self, rlhf_kit: Kit) -> None:
        """A rank may have no rollouts."""
        import torch

        rollouts = self.rollouts(rlhf_kit).select(torch.zeros(0, dtype=torch.long))
        try:
            found = list(self.reward(rlhf_kit).judge(rollouts, self.work(rlhf_kit).parts.score))
        except Exception as error:
            broken(f"given no rollouts, as a rank may be, it raises {type(error).__name__}: {error}")
        require(not found, f"given no rollouts it returns {len(found)} numbers")

    def test_odd_responses(self, rlhf_kit: Kit) -> None:
        """A young policy says anything: nothing at all, signs, no end."""
        said = [(self._records()[0], text) for text in ("", " ", "\n\n", "\x00\u202e", "é" * 50, "{[(\\", "1e999")]
        for ended in (True, False):
            self.judged(rlhf_kit, self.rollouts(rlhf_kit, said, ended))

    def test_the_rollouts_stay_as_they_are(self, rlhf_kit: Kit) -> None:
        """Other rewards and the algorithm see them after it."""
        import copy

        from rlhf.testing.kit import same

        rollouts = self.rollouts(rlhf_kit)
        rows, tokens = copy.deepcopy(rollouts.rows), rollouts.sequences.tokens.clone()
        self.judged(rlhf_kit, rollouts)
        require(rollouts.rows == rows, "it changes the rows of data that it is shown")
        require(same(rollouts.sequences.tokens, tokens), "it changes the tokens that it is shown")
        require(not bool(rollouts.rewards.any()), "it writes into the rollouts' rewards; it returns its own numbers")

    def test_it_says_which_columns_it_needs(self, rlhf_kit: Kit) -> None:
        """So that rows without are refused before a model is loaded, and not in the middle of a run."""
        needed = self._needed(rlhf_kit)
        kept = {"prompt", "messages", *needed}
        bare = [{key: value for key, value in record.items() if key in kept} for record in self._records()]
        try:
            self.judged(rlhf_kit, self.rollouts(rlhf_kit, [(record, self.responses[0]) for record in bare]))
        except pytest.fail.Exception as error:
            fix = "name what it can't do without in the entry: columns=(...), or a function of the options"
            told = ", ".join(map(repr, needed)) or "none"
            broken(f"on rows with the columns that it says it needs ({told}) it fails: {error}. {fix}")
        for column in needed:
            poor = [{k: v for k, v in record.items() if k != column} for record in self._records()]
            try:
                rlhf_kit.work(self.plan(rlhf_kit, data=str(rlhf_kit.data(poor))))
            except RequestError as error:
                require(column in str(error), f"rows without {column!r} are refused, but not for that: {error}")
            else:
                broken(f"rows without the column {column!r} are taken")

    def test_state_is_plain(self, rlhf_kit: Kit) -> None:
        from rlhf.testing.kit import same, written_and_read

        reward = self.reward(rlhf_kit)
        try:
            state = written_and_read(reward.state())
        except TypeError as error:
            broken(f"its state can't be put into a checkpoint: {error}")
        reward.load_state(state)
        require(same(written_and_read(reward.state()), state), "given its state, it says another")

    def _needed(self, kit: Kit) -> list[str]:
        entry = self.entry(kit)
        assert isinstance(entry, RewardEntry)
        columns = entry.columns(self.config(kit)) if callable(entry.columns) else entry.columns
        return list(dict.fromkeys([*columns, *self.reward(kit).columns]))
