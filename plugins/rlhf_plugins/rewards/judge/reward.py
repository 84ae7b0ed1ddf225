"""A language model as a judge, `POST URL/chat/completions`: a score for each response, or its share of won comparisons.

    mode score     the number that the judge's answer ends with, from `low` to `high`
    mode compare   mean over opponents of the share won; each two are shown in both orders, and the two verdicts
                   averaged, so that a judge who likes what stands first decides nothing

An answer without a verdict is no zero: a response whose score is missing, or all of whose comparisons are, has failed.
At temperature 0 and with one seed the same question has one answer, so it is asked once in a process. That pairwise
verdicts hang on order: Wang et al. 2023, arXiv:2305.17926; Zheng et al. 2023, arXiv:2306.05685.

Left out: several judges, and answers drawn several times; label several `--reward judge:NAME` for the former.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from rlhf.api import Context, Failed, Problem, RequestError, Reward, Rollouts, RowError, RunError, Score
from rlhf_plugins.engines.asking import Asker, Refused, Unusable
from rlhf_plugins.engines.exchange import address_of
from rlhf_plugins.formats.template import fill
from rlhf_plugins.rewards import samples
from rlhf_plugins.rewards.judge import questions
from rlhf_plugins.rewards.remote import address_problems, token_for

_CHECK_SECONDS = 10.0
_DOWN = frozenset({502, 503, 504})
_TAIL = 120
"""Characters of an answer without a verdict that are told."""

Verdict = float | Failed
"""A score, or what the first of two is given; or why there is none."""


@attrs.frozen
class Pair:
    """Two texts that answer one prompt, by the place of a rollout each; -1: the reference of the other one."""

    one: int
    two: int


class Judge(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where the endpoint isn't there or its token would travel unencrypted.
        RunError: in `judge`, where it refuses what every request says: the token, the model, an option.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._label = context.label or "judge"
        flag = f"--reward.{self._label}"
        token = token_for(config, flag, needed=False)
        problems = list(address_problems(config, flag, bool(token)))
        if problems:
            raise RequestError(problems)
        self._to = address_of(config.url, f"{flag}.url")
        self._who = f"reward {self._label!r} ({config.model} at {self._to})"
        try:
            self._template, self._rubric = questions.template_of(config), questions.rubric_of(config)
            self._columns = questions.columns(config)
        except ValueError as error:  # it has changed since the plan
            raise RequestError(Problem(f"--reward {self._label}: {error}")) from error
        self._asker = Asker(
            self._to, token, seconds=config.timeout, retries=config.retries, concurrency=config.concurrency
        )
        self._known: dict[bytes, float | None] = {}
        """Digest of a request -> the verdict in its answer."""
        if config.check:
            self._see(flag)

    def check(self, row: Any) -> None:
        """
        Raises:
            RowError: a column that the judge is to see is neither text nor a number.
        """
        for name in self._columns:
            value = row.extra.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise RowError(f"column {name!r} must hold text or a number, not a {type(value).__name__}")

    def judge(self, rollouts: Rollouts, score: Score) -> list[Verdict]:
        """B numbers; Failed where there is none."""
        if self.config.mode == "compare":
            return self._compared(rollouts)
        return self._ask([self._body(rollouts, i, completion=text) for i, text in enumerate(rollouts.texts)])

    # Comparing

    def _compared(self, rollouts: Rollouts) -> list[Verdict]:
        pairs = self._pairs(rollouts)
        bodies = []
        for pair in pairs:
            one, two = self._texts(rollouts, pair)
            if one != two:
                bodies += [
                    self._body(rollouts, pair.one, first=one, second=two),
                    self._body(rollouts, pair.one, first=two, second=one),
                ]
        came = iter(self._ask(bodies))
        won: list[list[float]] = [[] for _ in range(len(rollouts))]
        failed: list[list[Failed]] = [[] for _ in range(len(rollouts))]
        for pair in pairs:
            one, two = self._texts(rollouts, pair)
            ahead, behind = (0.5, 0.5) if one == two else (next(came), next(came))
            if isinstance(ahead, float) and isinstance(behind, float):
                if one != two:
                    self._count("swayed", ahead == behind != 0.5)  # the same place won both times
                share = (ahead + 1.0 - behind) / 2.0
                self._give(won, pair, share)
            else:
                why = ahead if isinstance(ahead, Failed) else behind
                assert isinstance(why, Failed)
                failed[pair.one].append(why)
                if pair.two >= 0:
                    failed[pair.two].append(why)
        return [sum(shares) / len(shares) if shares else whys[0] for shares, whys in zip(won, failed, strict=True)]

    @staticmethod
    def _give(won: list[list[float]], pair: Pair, share: float) -> None:
        won[pair.one].append(share)
        if pair.two >= 0:
            won[pair.two].append(1.0 - share)

    def _pairs(self, rollouts: Rollouts) -> list[Pair]:
        if self.config.reference_column:
            return [Pair(i, -1) for i in range(len(rollouts))]
        groups: dict[int, list[int]] = {}
        for i, group in enumerate(rollouts.sequences.group.tolist()):
            groups.setdefault(group, []).append(i)
        for members in groups.values():
            if len(members) < 2:
                what = f"{self._who}: {samples.name(rollouts, members[0])} has one response: nothing to compare it with"
                fix = f"--reward.{self._label}.reference-column COLUMN, or an algorithm that samples several a prompt"
                raise RunError(f"{what}; {fix}")
        return [Pair(*two) for members in groups.values() for two in itertools.combinations(members, 2)]

    def _texts(self, rollouts: Rollouts, pair: Pair) -> tuple[str, str]:
        if pair.two >= 0:
            return rollouts.texts[pair.one], rollouts.texts[pair.two]
        return rollouts.texts[pair.one], str(samples.columns(rollouts, pair.one)[self.config.reference_column])

    # Asking

    def _body(self, rollouts: Rollouts, i: int, **texts: str) -> bytes:
        config = self.config
        own = {
            "prompt": questions.prompt_text(samples.prompt(rollouts, i)),
            "rubric": self._rubric,
            "low": f"{config.low:g}",
            "high": f"{config.high:g}",
            **texts,
        }
        try:
            question = fill(self._template, {**samples.columns(rollouts, i), **own})
        except RowError as error:
            raise RunError(f"{self._who}, {samples.name(rollouts, i)}: {error}") from error
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "seed": config.seed,
            "max_tokens": config.max_tokens,
            "n": 1,
            "stream": False,
        }
        return json.dumps(body).encode()

    def _ask(self, bodies: Sequence[bytes]) -> list[Verdict]:
        """A verdict for each request, in order; equal ones are made once."""
        keys = [hashlib.sha256(body).digest() for body in bodies]
        new = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._known}
        came = dict(zip(new, self._asker.every([partial(self._one, body) for body in new.values()]), strict=True))
        failed: dict[bytes, Failed] = {}
        for key, answer in came.items():
            if isinstance(answer, Failed):
                failed[key] = answer
                continue
            self._known[key] = self._read(answer)
            if self._known[key] is None:
                tail = self._asker.clean(answer)[-_TAIL:]
                failed[key] = Failed(f"the judge's answer ends with no verdict: {tail!r}")
        for key in keys:
            self._count("unparsed", self._known.get(key, 0.0) is None)
        again = Failed("the judge's answer ends with no verdict")
        found = [self._known.get(key) for key in keys]
        return [failed.get(key, again) if one is None else one for key, one in zip(keys, found, strict=True)]

    def _read(self, answer: str) -> float | None:
        if self.config.mode == "compare":
            return questions.share_in(answer)
        return questions.score_in(answer, self.config.low, self.config.high)

    def _one(self, body: bytes) -> str | Failed:
        def read(content: bytes) -> str:
            try:
                (choice,) = json.loads(content)["choices"]
                text = choice["message"]["content"]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                said = self._asker.clean(content.decode(errors="replace"), 200)
                raise Unusable(f"{self._to} gives no answer: {said}") from error
            return text if isinstance(text, str) else ""

        try:
            return self._asker.ask("/chat/completions", body, read, f"{self.context.seed} {len(body)}")
        except Unusable as last:
            return Failed(f"the judge, asked {self.config.retries + 1} times: {last}")
        except Refused as error:
            token = f"; the token is of {self.config.token_file or self.config.token_env}"
            served = f"; is {self.config.model} served there?"
            fix: Mapping[int, str] = {401: token, 403: token, 404: served}
            raise RunError(f"{self._who}: {error}{fix.get(error.status, '')}") from error

    def _count(self, what: str, value: bool) -> None:
        """A share of the requests, or of the comparisons."""
        self.context.metrics.mean(f"reward/{self._label}/{what}", float(value))

    def _see(self, flag: str) -> None:
        """
        Raises:
            RequestError: nobody is there, or the token is refused.
        """
        url, fix = f"{flag}.url {self.config.url}", f"start it; not to be asked: {flag}.check false"
        try:
            status = self._asker.look("/models", min(self.config.timeout, _CHECK_SECONDS)).status
        except Unusable as error:
            raise RequestError(Problem(f"{url}: {error}", fix)) from error
        if status in _DOWN:
            raise RequestError(Problem(f"{url}: answers {status}", fix))
        if status in (401, 403):
            token = f"the token is of {self.config.token_file or self.config.token_env}"
            raise RequestError(Problem(f"{url}: answers {status}", token))
