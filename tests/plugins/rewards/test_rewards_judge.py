"""A language model as a judge: what it is asked, how its answers are read, and what is made of comparisons. The
endpoint is a small reference server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from at_work import Run, plan_of
from reference_endpoint import ReferenceEndpoint, chatted, endpoints
from rlhf.compose import compose
from rlhf.errors import RequestError, RowError, RunError
from rlhf.facts import Machine
from rlhf.interfaces import Context, Failed
from rlhf.registry import Registry
from rlhf.rows import PromptRow
from rlhf.sequences import Rollouts
from rlhf_plugins.engines import asking
from rlhf_plugins.rewards.judge import questions
from rlhf_plugins.rewards.judge.entry import JudgeConfig
from rlhf_plugins.rewards.judge.reward import Judge

TOKEN = "sk-hush-hush-1234"
Serve = Callable[..., ReferenceEndpoint]
Rolled = Callable[..., Rollouts]


def question(body: dict[str, Any]) -> str:
    (message,) = body["messages"]
    assert message["role"] == "user"
    return str(message["content"])


def tag(text: str, name: str) -> str:
    """What stands between the tags of a question."""
    (found,) = re.findall(rf"<{name}>\n(.*?)\n</{name}>", text, re.DOTALL)
    return str(found)


def by_length(body: dict[str, Any]) -> tuple[int, Any]:
    """A judge who scores the number of letters."""
    return chatted(f'Well. {{"score": {len(tag(question(body), "response"))}}}')


def longer(body: dict[str, Any]) -> tuple[int, Any]:
    """A judge who likes the longer response, whatever the order."""
    first, second = (len(tag(question(body), name)) for name in ("first", "second"))
    better = "first" if first > second else "second" if second > first else "neither"
    return chatted(f'{{"better": "{better}"}}')


def always_first(body: dict[str, Any]) -> tuple[int, Any]:
    return chatted('{"better": "first"}')


@pytest.fixture
def serve() -> Iterator[Serve]:
    with endpoints() as make:
        yield make


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, context: Context) -> Callable[..., Judge]:
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)

    def make(url: str, **options: Any) -> Judge:
        return Judge(JudgeConfig(url=url, model="m", **{"retries": 2, "concurrency": 1, **options}), context)

    return make


def judge(reward: Judge, rollouts: Rollouts) -> list[Any]:
    return reward.judge(rollouts, None)  # type: ignore[arg-type]


def in_groups(rollouts: Rollouts, *groups: int) -> Rollouts:
    return attrs.evolve(rollouts, sequences=attrs.evolve(rollouts.sequences, group=torch.tensor(groups)))


# Scores


def test_what_is_asked_and_the_score(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve(*[by_length] * 2)
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {you}"})
    reward = connect(server.url, rubric="Longer is better.", low=0, high=20, seed=5, max_tokens=99)
    assert judge(reward, rollouts(["abc", "{x}"], prompts=["What?", chat])) == [3.0, 3.0]
    first, second = server.asked
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "path": "/v1/chat/completions", "model": "m", "temperature": 0, "seed": 5, "max_tokens": 99, "n": 1,
        "stream": False,
    }  # fmt: skip
    assert server.authorised == [f"Bearer {TOKEN}"] * 2
    text = question(first)
    assert tag(text, "prompt") == "What?" and "Longer is better." in text and "from 0, the worst, to 20" in text
    assert text.endswith('{"score": N}\nwhere N is a number from 0, the worst, to 20, the best.')
    assert tag(question(second), "prompt") == "system: Be brief.\n\nuser: Hi {you}"
    assert tag(question(second), "response") == "{x}"


SCORES = [
    ('{"score": 7}', 7.0),
    ('first {"score": 2}, or rather\n```json\n{"score": 7.5}\n```', 7.5),
    ('{"score": 0}', 0.0),
    ('{"score": 10, "why": "good"}', 10.0),
    ('{"score": 10.5}', None),
    ('{"score": -1}', None),
    ('{"score": "7"}', None),
    ('{"score": true}', None),
    ('{"score": NaN}', None),
    ('{"score": null}', None),
    ('{"score": 7} and then {"better": "first"}', None),
    ('{"score": 7} but {no}', None),
    ("7/10", None),
    ("7", None),
    ("", None),
    ("{" * 5000, None),
]


@pytest.mark.parametrize(("answer", "score"), SCORES)
def test_scores_by_hand(answer: str, score: float | None) -> None:
    assert questions.score_in(answer, 0.0, 10.0) == score


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ('so {"better": "first"}', 1.0),
        ('{"better": "second"}', 0.0),
        ('{"better": "first"} no: {"better": "neither"}', 0.5),
        ('{"better": "both"}', None),
        ('{"better": 1}', None),
        ('{"better": ["first"]}', None),
        ("first", None),
    ],
)
def test_shares_by_hand(answer: str, share: float | None) -> None:
    assert questions.share_in(answer) == share


def test_an_answer_without_a_score_has_failed_and_is_counted(
    serve: Serve, connect: Any, rollouts: Rolled, context: Context
) -> None:
    server = serve(by_length, chatted("I refuse."), chatted(None), by_length)
    found = judge(connect(server.url), rollouts(["a", "bb", "ccc", "dddd"]))
    assert found[0] == 1.0 and found[3] == 4.0
    assert found[1] == Failed("the judge's answer ends with no verdict: 'I refuse.'")
    assert isinstance(found[2], Failed)
    assert context.metrics.drain(context.world) == {"reward/mine/unparsed": 0.5}


def test_the_same_question_is_asked_once_and_what_failed_is_asked_again(
    serve: Serve, connect: Any, rollouts: Rolled
) -> None:
    server = serve(by_length, chatted("none"), by_length, *[(500, {})] * 3, by_length)
    reward = connect(server.url)
    given = rollouts(["aa", "aa", "b"], prompts=["p"] * 3)
    first = judge(reward, given)
    assert first[:2] == [2.0, 2.0] and isinstance(first[2], Failed) and len(server.asked) == 2
    assert judge(reward, given)[:2] == [2.0, 2.0] and len(server.asked) == 2  # no answer would be another
    assert judge(reward, rollouts(["aa"], prompts=["q"])) == [2.0]
    (lost,) = judge(reward, rollouts(["ccc"], prompts=["q"]))
    assert "asked 3 times" in lost.why and "answers 500" in lost.why
    assert judge(reward, rollouts(["ccc"], prompts=["q"])) == [3.0]  # it wasn't the answer's fault


# Comparisons


def test_each_two_of_a_group_are_compared_in_both_orders(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    """Lengths 1, 2, 3 and, in a group of its own, 1, 1: shares of wins 0, 1/2, 1 and 1/2, 1/2."""
    server = serve(*[longer] * 20)
    given = in_groups(rollouts(["a", "bb", "ccc", "x", "y"], prompts=["p"] * 3 + ["q"] * 2), 0, 0, 0, 1, 1)
    assert judge(connect(server.url, mode="compare"), given) == [0.0, 0.5, 1.0, 0.5, 0.5]
    shown = [tuple(tag(question(body), name) for name in ("first", "second")) for body in server.asked]
    assert shown[:2] == [("a", "bb"), ("bb", "a")]
    assert len(shown) == 3 * 2 + 2


def test_a_judge_who_likes_what_stands_first_decides_nothing(
    serve: Serve, connect: Any, rollouts: Rolled, context: Context
) -> None:
    server = serve(*[always_first] * 6)
    assert judge(connect(server.url, mode="compare"), in_groups(rollouts(["a", "bb", "ccc"]), 0, 0, 0)) == [0.5] * 3
    assert context.metrics.drain(context.world) == {"reward/mine/swayed": 1.0, "reward/mine/unparsed": 0.0}


def test_equal_responses_are_a_draw_that_nobody_is_asked_about(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve(*[longer] * 9)
    given = in_groups(rollouts(["a", "a", "bb"], prompts=["p"] * 3), 0, 0, 0)
    assert judge(connect(server.url, mode="compare"), given) == [0.25, 0.25, 1.0]
    assert len(server.asked) == 2  # a with bb, both orders; the other a is the same question


def test_comparing_with_a_reference(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve(longer, longer, longer, longer, *[chatted('{"better": "neither"}'), chatted('{"better": "first"}')])
    given = rollouts(["a", "bbb", "cc"], [{"best": "xx"}, {"best": "xx"}, {"best": "yy"}])
    # the last: a draw, then the reference first and better: (0.5 + 0) / 2
    assert judge(connect(server.url, mode="compare", reference_column="best"), given) == [0.0, 1.0, 0.25]


def test_comparisons_without_a_verdict_are_left_out_and_with_none_a_response_has_failed(
    serve: Serve, connect: Any, rollouts: Rolled, context: Context
) -> None:
    def shy(body: dict[str, Any]) -> tuple[int, Any]:
        """Of the one in capitals nothing is said where it stands second."""
        return chatted("no") if tag(question(body), "second").isupper() else longer(body)

    server = serve(*[shy] * 8)
    given = in_groups(rollouts(["a", "BB", "ccc"], prompts=["p"] * 3), 0, 0, 0)
    found = judge(connect(server.url, mode="compare"), given)
    assert found[0] == 0.0 and found[2] == 1.0 and isinstance(found[1], Failed)
    assert context.metrics.drain(context.world)["reward/mine/unparsed"] == pytest.approx(1 / 3)


def test_a_response_alone_in_its_group_can_not_be_compared(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    with pytest.raises(RunError, match=r"sample 0 .* has one response.*--reward.mine.reference-column"):
        judge(connect(serve().url, mode="compare"), rollouts(["a", "b"]))


# Templates


def test_a_template_of_ones_own_names_columns(serve: Serve, connect: Any, rollouts: Rolled, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text('{{"q": 1}} {rubric}|{prompt}|{completion}|{answer}|{high}')
    (tmp_path / "r.txt").write_text("Be {strict}.\n")
    server = serve(chatted('{"score": 1}'))
    options = {"template": str(tmp_path / "t.txt"), "rubric_file": str(tmp_path / "r.txt"), "high": 1.0}
    reward = connect(server.url, **options)
    assert judge(reward, rollouts(["{r}"], [{"answer": 4}], ["p"])) == [1.0]
    assert question(server.asked[0]) == '{"q": 1} Be {strict}.|p|{r}|4|1'
    assert questions.columns(reward.config) == ("answer",)
    reward.check(PromptRow("p", {"answer": 4}))
    with pytest.raises(RowError, match="column 'answer' must hold text or a number, not a list"):
        reward.check(PromptRow("p", {"answer": [4]}))


# What doesn't answer


@pytest.mark.parametrize(
    "step", [(429, {}), (503, {}), (200, b"<html>"), (200, {"choices": []}), (200, {"choices": [{}]})]
)
def test_what_is_no_answer_is_asked_for_again(serve: Serve, connect: Any, rollouts: Rolled, step: Any) -> None:
    server = serve(step, step, by_length)
    assert judge(connect(server.url), rollouts(["abc"])) == [3.0]
    assert server.asked[0] == server.asked[1] == server.asked[2]


@pytest.mark.parametrize(
    ("status", "why"), [(400, "answers 400"), (401, "the token is of OPENAI_API_KEY"), (404, "is m served there")]
)
def test_what_every_request_would_meet_ends_the_run(
    serve: Serve, connect: Any, rollouts: Rolled, status: int, why: str
) -> None:
    server = serve((status, {"error": f"bad {TOKEN}"}))
    with pytest.raises(RunError, match=why) as caught:
        judge(connect(server.url), rollouts(["a"]))
    assert TOKEN not in str(caught.value) and "m at http://127.0.0.1" in str(caught.value)
    assert len(server.asked) == 1


def test_the_endpoint_is_looked_at_before_anything_is_loaded(
    serve: Serve, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(models=404)  # one that lists no models is there all the same
    connect(server.url)
    assert server.asked == []
    with pytest.raises(RequestError, match=r"Connection refused\n    start it; .*--reward.mine.check false"):
        connect("http://127.0.0.1:1/v1")
    connect("http://127.0.0.1:1/v1", check=False)
    with pytest.raises(RequestError, match="answers 503"):
        connect(serve(models=503).url)
    with pytest.raises(RequestError, match="answers 401\n    the token is of OPENAI_API_KEY"):
        connect(serve(models=401).url)
    with pytest.raises(RequestError, match="its token would travel unencrypted"):
        connect("http://192.0.2.1/v1", check=False)
    monkeypatch.delenv("OPENAI_API_KEY")
    connect("http://192.0.2.1/v1", check=False)


# In a plan and in a run

AT = ("--algo", "grpo", "--reward", "judge", "--reward.judge.url", "https://host/v1", "--reward.judge.model", "m")


def test_a_plan_says_what_it_would_contact(
    typed: Any, installed: Registry, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    plan = compose(typed(*AT), installed, machine)
    assert any("sends prompts and responses to m at https://host/v1; each response is scored" in n for n in plan.notes)
    assert TOKEN not in json.dumps(plan.to_json())
    plan = compose(typed(*AT, "--reward.judge.mode", "compare", "--eval-rows", "0"), installed, machine)
    assert any("each two of a group are compared, in both orders" in note for note in plan.notes)


REFUSED = [
    (("--reward.judge.template", "nosuch.txt"), "--reward.judge.template: nosuch.txt: No such file"),
    (("--reward.judge.rubric-file", "nosuch.txt"), "--reward.judge.rubric-file: nosuch.txt: No such file"),
    (("--reward.judge.template", "prompt.txt"), "prompt.txt has no {completion}, so there is nothing to judge"),
    (("--reward.judge.template", "broken.txt"), "broken.txt"),
    (("--reward.judge.low", "10"), "--reward.judge.low 10 is no less than --reward.judge.high 10"),
    (("--reward.judge.reference-column", "best"), "--reward.judge.reference-column is for comparing"),
    (("--reward.judge.mode", "compare"), "a held-out prompt gets one response"),
    (("--reward.judge.rubric", "a", "--reward.judge.rubric-file", "prompt.txt"), "give one of them"),
    (("--reward.judge.url", "http://192.0.2.1/v1", "--reward.judge.token-file", "t"), "travel unencrypted"),
]


@pytest.mark.parametrize(("words", "why"), REFUSED)
def test_what_a_plan_refuses(
    typed: Any, installed: Registry, machine: Machine, words: tuple[str, ...], why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("{prompt}")
    (tmp_path / "broken.txt").write_text("{prompt")
    with pytest.raises(RequestError) as caught:
        compose(typed(*AT, *words), installed, machine)
    assert why in str(caught.value)


@pytest.mark.matrix
def test_a_run_with_a_judge_and_another_reward(serve: Serve, tmp_path: Path) -> None:
    """Two prompts with two responses each, a step: some are the same question."""
    server = serve(*[longer] * 99)
    judge_ = {"name": "judge", "url": server.url, "model": "m", "mode": "compare", "weight": 2.0}
    recipe: dict[str, Any] = {"algo": {"name": "grpo", "group_size": 2}, "batch_size": 2, "max_steps": 1}
    run = Run(tmp_path, plan_of(**recipe, reward=[judge_, {"name": "length", "weight": 0.5}]))
    run.go()
    (line,) = run.metrics()
    assert line["reward/judge"] == 0.5  # shares of a pair add up to one
    assert line["reward/mean"] == pytest.approx(2.0 * 0.5 + 0.5 * line["reward/length"], abs=1e-6)  # float32
    assert line["reward/judge/unparsed"] == 0.0 if server.asked else "reward/judge/unparsed" not in line
