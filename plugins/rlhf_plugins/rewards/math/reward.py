r"""Right or wrong by value: x+1 = 1+x, \frac{1}{2} = 0.5, \{1,2\} = \{2,1\}, [0,1) isn't (0,1].

    score = (correct if the response's answer equals the row's, else wrong) + format_weight if it is in \boxed{}

math-verify reads both and compares them by sympy, in processes beside this one, since a comparison may take for ever
and then can't be stopped from inside. What isn't decided within `seconds` of a processor is not shown to be equal, so
it is wrong, and counted in `reward/NAME/undecided`: a limit by the processor's time is the same however busy the
machine is. Where a process is lost for another reason the response has failed.
"""

from __future__ import annotations

from typing import Any

from rlhf.api import Context, Failed, Reward, Rollouts, RowError, Score
from rlhf_plugins.rewards import samples
from rlhf_plugins.rewards.answer import last_boxed, whole_number
from rlhf_plugins.rewards.math.pool import Lost, Pool, Undecided, Verdict


class Math(Reward):
    """See the module. Raises RunError where its processes can't be started."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._label = context.label or "math"
        self._pool = Pool(config.workers, config.seconds)
        self._readable: dict[str, str] = {}
        """Reference -> why it can't be used, or nothing."""

    def check(self, row: Any) -> None:
        """
        Raises:
            RowError: nothing can be compared with its reference.
        """
        gold = self._gold(row.extra)
        if gold not in self._readable:
            self._readable[gold] = self._look(gold)
        if self._readable[gold]:
            raise RowError(self._readable[gold])

    def judge(self, rollouts: Rollouts, score: Score) -> list[float | Failed]:
        """B scores; Failed where no verdict could be had."""
        config = self.config
        boxes = [last_boxed(text) for text in rollouts.texts]
        asked: list[tuple[str, str, str | None] | None] = []
        for i, (text, box) in enumerate(zip(rollouts.texts, boxes, strict=True)):
            # In \boxed{} alone, the rest of the response is of no matter; so equal boxes are judged once.
            gold = self._gold(samples.columns(rollouts, i))
            unboxed = box is None and config.extract == "boxed"
            asked.append(None if unboxed else (gold, text if box is None else "", box))
        different = list(dict.fromkeys(one for one in asked if one is not None))
        questions = [{"gold": gold, "text": text, "boxed": box} for gold, text, box in different]
        verdicts = dict(zip(different, self._pool.ask(questions), strict=True))
        given = [None if one is None else verdicts[one] for one in asked]
        for verdict in given:
            self.context.metrics.mean(f"reward/{self._label}/undecided", float(isinstance(verdict, Undecided)))
        bonus = [0.0 if box is None else config.format_weight for box in boxes]
        return [self._score(verdict, more) for verdict, more in zip(given, bonus, strict=True)]

    def close(self) -> None:
        self._pool.close()

    def _score(self, verdict: Verdict | None, bonus: float) -> float | Failed:
        if isinstance(verdict, Lost):
            return Failed(verdict.why)
        right = isinstance(verdict, dict) and verdict["equal"]
        return float(self.config.correct if right else self.config.wrong) + bonus

    def _gold(self, columns: Any) -> str:
        column = self.config.answer_column
        value = columns.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"column {column!r} must hold text or a number, not a {type(value).__name__}")
        return str(value).rpartition("####")[2].strip()

    def _look(self, gold: str) -> str:
        if whole_number(gold) is not None:
            return ""
        column = self.config.answer_column
        (verdict,) = self._pool.ask([{"gold": gold}])
        if isinstance(verdict, Lost):
            return f"column {column!r}: {verdict.why}"
        if isinstance(verdict, Undecided) or not verdict["readable"]:
            return f"column {column!r} holds no answer that math-verify can read"
        return ""
