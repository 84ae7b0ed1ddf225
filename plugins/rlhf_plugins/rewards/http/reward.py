"""A reward that a server gives: completions go in batches to a URL, numbers come back (`protocol`).

A batch that gets no answer after all retries has failed, and so has a completion that the server has no score for:
they are left out and counted. An answer that isn't the protocol's ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlhf.api import Context, Failed, Problem, RequestError, Reward, Rollouts, RunError, Score
from rlhf_plugins.engines.asking import Asker, Refused, Unusable
from rlhf_plugins.engines.exchange import address_of
from rlhf_plugins.rewards import samples
from rlhf_plugins.rewards.http import protocol
from rlhf_plugins.rewards.http.protocol import Scored, Unscored
from rlhf_plugins.rewards.remote import token_for

_CHECK_SECONDS = 10.0


class HTTPReward(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where the server isn't there, or answers the question for no scores by
            something else.
        RunError: in `judge`, where it refuses the request, or answers by something else than the protocol's.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._label = context.label or "http"
        flag = f"--reward.{self._label}"
        self._to = address_of(config.url, f"{flag}.url")
        self._who = f"reward {self._label!r} ({self._to})"
        token = token_for(config, flag)
        self._asker = Asker(
            self._to, token, seconds=config.timeout, retries=config.retries, concurrency=config.concurrency
        )
        if config.check:
            self._see(Asker(self._to, token, seconds=min(config.timeout, _CHECK_SECONDS), retries=0), flag)

    def judge(self, rollouts: Rollouts, score: Score) -> list[float | Failed]:
        """B scores; Failed where the server has none, or couldn't be reached. Parts that it tells of are reported as
        `reward/NAME/PART`."""
        places = range(len(rollouts))
        size = self.config.batch_size
        batches = [places[start : start + size] for start in range(0, len(rollouts), size)]
        bodies = [self._body(rollouts, batch) for batch in batches]
        found = self._asker.every(
            [partial(self._batch, body, len(batch)) for body, batch in zip(bodies, batches, strict=True)]
        )
        scores = [one for batch in found for one in batch]
        for one in scores:
            for name, value in one.parts.items() if isinstance(one, Scored) else ():
                self.context.metrics.mean(f"reward/{self._label}/{name}", value)
        return [one.score if isinstance(one, Scored) else Failed(one.why) for one in scores]

    def _body(self, rollouts: Rollouts, batch: Sequence[int]) -> bytes:
        items = []
        for i in batch:
            columns = samples.columns(rollouts, i)
            prompt = samples.prompt(rollouts, i)
            items.append(
                {
                    "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
                    "completion": rollouts.texts[i],
                    "columns": {name: columns[name] for name in self.config.columns},
                }
            )
        try:
            return protocol.question(items)
        except (TypeError, ValueError) as error:
            where = f"a batch that begins with {samples.name(rollouts, batch[0])}"
            raise RunError(f"{self._who}: a column can't be written as JSON: {error}, in {where}") from error

    def _batch(self, body: bytes, count: int) -> list[Scored | Unscored]:
        try:
            return self._ask(self._asker, body, count)
        except Unusable as last:
            tries = self.config.retries + 1
            return [Unscored(f"asked {tries} times: {last}" if tries > 1 else str(last))] * count
        except Refused as error:
            raise RunError(f"{self._who} refuses the request: {error}") from error
        except ValueError as error:
            raise RunError(f"{self._who} {error}") from error

    def _see(self, asker: Asker, flag: str) -> None:
        """Ask for no scores.

        Raises:
            RequestError: no scores didn't come.
        """
        try:
            self._ask(asker, protocol.question([]), 0)
        except (Unusable, Refused, ValueError) as error:
            fix = f'start it; asked for no items it answers {{"scores": []}}; not to be asked: {flag}.check false'
            raise RequestError(Problem(f"{flag}.url {self.config.url}: {error}", fix)) from error

    def _ask(self, asker: Asker, body: bytes, count: int) -> list[Scored | Unscored]:
        def read(content: bytes) -> list[Scored | Unscored]:
            try:
                return protocol.answer(content, count)
            except ValueError as error:
                said = asker.clean(content.decode(errors="replace"), 200)
                raise ValueError(f"answers with {asker.clean(str(error), 300)}; it says: {said}") from None

        found = asker.ask("" if self._to.path else "/", body, read, f"{self.context.seed} {len(body)}")
        return [Unscored(asker.clean(one.why, 500)) if isinstance(one, Unscored) else one for one in found]
