"""The three ways a command ends badly. Each carries what was given, what was expected, and what to type instead."""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen
class Problem:
    """One thing that is wrong with a request."""

    what: str
    """What was given and why it can't work."""
    fix: str = ""
    """What to type instead; empty when `what` already says it."""

    def __str__(self) -> str:
        return f"{self.what}\n    {self.fix}" if self.fix else self.what


class RequestError(Exception):
    """The request was wrong: nothing was loaded or written. Exit code 2. Holds every problem found, not the first."""

    def __init__(self, problems: Iterable[Problem] | Problem | str, suggestion: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.suggestion = suggestion
        """The nearest legal combination, as a command line; empty when there is none or it isn't a matter of one."""
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunError(Exception):
    """Something broke while running (a reward that raises, a NaN). Exit code 1; what was checkpointed is resumable."""


class RankLost(RunError):  # noqa: N818 - the other rank may have had no error
    """Another rank of the run is late or gone: what broke, if anything, broke there."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The user or the system asked the run to stop; a checkpoint is saved. Exit code 130."""


class PluginError(Exception):
    """A plugin's own function failed while a plan was made."""


class RowError(ValueError):
    """A row of data doesn't fit. Raised by row types and codecs; the row is refused and counted under this reason."""
