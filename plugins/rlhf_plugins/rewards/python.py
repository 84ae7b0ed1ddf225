"""A reward that is the user's own Python function.

    def score(prompt, completion, answer): ...                  # a number
    def score(prompts, completions, answer, **columns): ...     # once a batch: lists in, a list of numbers out

Everything is passed by name, and only what the function has a parameter for: the prompt as the data has it (text, or
a list of chat messages), the completion's text, and columns of the row; `**columns` takes all the others. A function
may return `rlhf.api.Failed("why")` in a number's place: that rollout is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.api import Context, Interrupted, Problem, RequestError, Reward, Rollouts, RunError, Score, State
from rlhf_plugins.rewards import samples
from rlhf_plugins.rewards.function import load_function, parameters, source_digest


class PythonFunction(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where the function can't be had or called.
        RunError: in `judge`, where it raises, or where a row lacks a column that it needs; names the sample.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._who = f"reward {context.label or 'python'!r} ({config.path})"
        self._flag = f"--reward.{context.label or 'python'}.path {config.path}"
        self._written = source_digest(config.path)  # before it runs: it may leave the folder that it is named from
        self._function = load_function(config.path, self._flag)
        self._takes = parameters(self._function, self._flag)
        self._batched = "completions" in self._takes.names if config.batched is None else config.batched
        self._own = ("prompts", "completions") if self._batched else ("prompt", "completion")
        if not (self._own[1] in self._takes.names or self._takes.all_columns):
            what = f"{self._flag}: it takes ({', '.join(self._takes.names)}), and no {self._own[1]!r} to judge"
            raise RequestError(Problem(what, f"name its parameters {', '.join(self._own)}, and columns of the data"))
        self.columns = tuple(name for name in self._takes.required if name not in self._own)

    def state(self) -> State:
        return {"written": self._written}

    def load_state(self, state: State) -> None:
        """Says so where the file was another: rewards of before and after may differ."""
        if state.get("written", self._written) != self._written:
            self.context.say(f"note: {self._flag}: the file has changed since this run was last saved")

    def judge(self, rollouts: Rollouts, score: Score) -> Sequence[Any]:
        """What the function returns: B numbers."""
        if not self._batched:
            return [self._call(rollouts, [i], self._arguments(rollouts, i)) for i in range(len(rollouts))]
        given = [self._arguments(rollouts, i) for i in range(len(rollouts))]
        names = dict.fromkeys(name for one in given for name in one)
        # A column that only some rows have, and that the function can do without, is None in the others.
        everyone = list(range(len(rollouts)))
        result = self._call(rollouts, everyone, {name: [one.get(name) for one in given] for name in names})
        if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
            raise RunError(f"{self._who} returned {result!r} for a batch, not a list of {len(rollouts)} numbers")
        if len(result) != len(rollouts):
            raise RunError(f"{self._who} returned {len(result)} numbers for a batch of {len(rollouts)}")
        return list(result)

    def _arguments(self, rollouts: Rollouts, i: int) -> dict[str, Any]:
        """What the i-th sample gives for the function's parameters."""
        prompt, columns = samples.prompt(rollouts, i), samples.columns(rollouts, i)
        own = (list(prompt) if isinstance(prompt, tuple) else prompt, rollouts.texts[i])
        found = {**columns, **dict(zip(self._own, own, strict=True))}
        missing = [name for name in self._takes.required if name not in found]
        if missing:
            raise RunError(
                f"{self._who} needs {', '.join(map(repr, missing))}, which {samples.name(rollouts, i)} has not; "
                f"its columns: {', '.join(columns) or 'none'}"
            )
        return found if self._takes.all_columns else {name: found[name] for name in self._takes.names if name in found}

    def _call(self, rollouts: Rollouts, of: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        try:
            return self._function(**arguments)
        except (Interrupted, RunError):
            raise
        except (Exception, SystemExit) as error:
            where = ("" if len(of) == 1 else "a batch that begins with ") + samples.name(rollouts, of[0])
            raise RunError(f"{self._who} raised {type(error).__name__}: {error}, on {where}") from error
