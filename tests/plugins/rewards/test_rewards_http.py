"""The reward that a server gives: what is sent, what is made of answers, and what happens where there are none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from reference_endpoint import ReferenceEndpoint, endpoints
from rlhf.compose import compose
from rlhf.errors import RequestError, RunError
from rlhf.facts import Machine
from rlhf.interfaces import Context, Failed
from rlhf.plan import Plan
from rlhf.registry import Registry
from rlhf.sequences import Rollouts
from rlhf_plugins.engines import asking
from rlhf_plugins.rewards.http import protocol
from rlhf_plugins.rewards.http.entry import HTTPConfig
from rlhf_plugins.rewards.http.protocol import Scored, Unscored
from rlhf_plugins.rewards.http.reward import HTTPReward

TOKEN = "hush-hush-hush-1234"
Serve = Callable[..., ReferenceEndpoint]
Rolled = Callable[..., Rollouts]


def lengths(body: dict[str, Any]) -> tuple[int, Any]:
    """A server that scores by length."""
    return 200, {"scores": [len(item["completion"]) for item in body["items"]]}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Endpoints that answer with lengths, where no script says otherwise."""
    with endpoints() as make:
        yield lambda *script, **options: make(*(script or [lengths] * 99), **options)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, context: Context) -> Callable[..., HTTPReward]:
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.01)

    def make(url: str, **options: Any) -> HTTPReward:
        return HTTPReward(HTTPConfig(url=url, **{"check": False, "retries": 2, **options}), context)

    return make


def judge(reward: HTTPReward, rollouts: Rollouts) -> list[Any]:
    return reward.judge(rollouts, None)  # type: ignore[arg-type]


# What is sent


def test_batches_with_the_columns_asked_for_in_order(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve()
    chat = ({"role": "user", "content": "hi"},)
    given = rollouts(["a", "bb", "ccc"], [{"answer": n, "other": "no"} for n in (1, 2, 3)], ["p", chat, "q"])
    assert judge(connect(server.url, batch_size=2, concurrency=1, columns=("answer",)), given) == [1, 2, 3]
    first, second = server.asked
    assert first == {
        "path": "/v1",
        "version": 1,
        "items": [
            {"prompt": "p", "completion": "a", "columns": {"answer": 1}},
            {"prompt": [*chat], "completion": "bb", "columns": {"answer": 2}},
        ],
    }
    assert [item["completion"] for item in second["items"]] == ["ccc"]
    assert server.authorised == [None, None]


def test_scores_stay_in_order_however_batches_come_back(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    def slow_first(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2 if body["items"][0]["completion"] == "x" else 0.0)
        return lengths(body)

    server = serve(*[slow_first] * 8)
    texts = ["x" * n for n in range(1, 9)]
    assert judge(connect(server.url, batch_size=1, concurrency=3), rollouts(texts)) == [*range(1, 9)]
    assert 1 < server.most <= 3


def test_a_column_that_json_has_not_is_told_with_its_sample(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve()
    for value in (object(), float("nan")):
        with pytest.raises(RunError, match=r"can't be written as JSON.*sample 0 \(prompt '<s>question 0'\)"):
            judge(connect(server.url, columns=("x",)), rollouts(["a"], [{"x": value}]))
    assert server.asked == []


# What is made of answers


def test_parts_are_reported_and_errors_are_failures(
    serve: Serve, connect: Any, rollouts: Rolled, context: Context
) -> None:
    scores = [
        {"score": 0.5, "parts": {"style": 1, "fact": 0}},
        {"error": "too long"},
        {"score": 1, "parts": {"fact": 2}},
    ]
    server = serve((200, {"scores": scores}))
    assert judge(connect(server.url), rollouts(["a", "b", "c"])) == [0.5, Failed("too long"), 1.0]
    assert context.metrics.drain(context.world) == {"reward/mine/style": 1.0, "reward/mine/fact": 1.0}


NOT_THE_PROTOCOL = [
    (b"<html>", "no JSON; it says: <html>"),
    ([1.0, 2.0], 'no {"scores": [...]}; it says: [1.0, 2.0]'),
    ({"rewards": [1, 2]}, 'no {"scores": [...]}; it says: {"rewards": [1, 2]}'),
    ({"scores": [1.0]}, '1 scores for 2 items; it says: {"scores": [1.0]}'),
    ({"scores": [1, 2, 3]}, "3 scores for 2 items"),
    ({"scores": [1, "0.5"]}, "score 1 is '0.5', not a number"),
    ({"scores": [1, None]}, "score 1 is 'None', not a number"),
    ({"scores": [True, 1]}, "score 0 is 'True', not a number"),
    (b'{"scores": [1, NaN]}', "score 1 is nan, not a finite number"),
    (b'{"scores": [1e999, 1]}', "score 0 is inf, not a finite number"),
    (b'{"scores": [' + b"9" * 400 + b", 1]}", "score 0 is inf, not a finite number"),
    ({"scores": [{"error": 3}, 1]}, "score 0 is 'None', not a number"),
    ({"scores": [{"error": "why", "score": "x"}, 1]}, "score 0 is 'x', not a number"),
    ({"scores": [{"score": 1, "parts": {"a b": 1}}, 1]}, "score 0: a part is called 'a b'"),
    ({"scores": [{"score": 1, "parts": {"a": "b"}}, 1]}, "score 0, part a is 'b', not a number"),
    ({"scores": [{"score": 1, "parts": [1]}, 1]}, "score 0: its parts are no object"),
    (b"[" * 100_000, "no JSON"),
]


@pytest.mark.parametrize(("said", "why"), NOT_THE_PROTOCOL)
def test_an_answer_that_is_not_the_protocols_ends_the_run_at_once(
    serve: Serve, connect: Any, rollouts: Rolled, said: Any, why: str
) -> None:
    server = serve((200, said))
    with pytest.raises(RunError) as caught:
        judge(connect(server.url), rollouts(["a", "b"]))
    assert str(caught.value).startswith(f"reward 'mine' ({server.url}) answers with {why}")
    assert len(server.asked) == 1  # no other try would mend it


def test_the_protocol_by_hand() -> None:
    assert protocol.answer(b'{"scores": [1, -2.5, {"error": "no"}, {"score": 0}], "more": 1}', 4) == [
        Scored(1.0), Scored(-2.5), Unscored("no"), Scored(0.0),
    ]  # fmt: skip
    assert json.loads(protocol.question([])) == {"version": 1, "items": []}


# Where there are none


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(serve: Serve, connect: Any, rollouts: Rolled, status: int) -> None:
    server = serve((status, {}), (status, {}), lengths)
    assert judge(connect(server.url), rollouts(["abc"])) == [3.0]
    assert server.asked[0] == server.asked[1] == server.asked[2]


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_is_not_asked_again_and_ends_the_run(
    serve: Serve, connect: Any, rollouts: Rolled, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUSH", TOKEN)
    elsewhere = serve()
    server = serve((status, {"error": f"bad {TOKEN}"}), Location=elsewhere.url)
    with pytest.raises(RunError, match=f"refuses the request: .* answers {status}: .*bad ") as caught:
        judge(connect(server.url, token_env="HUSH"), rollouts(["a"]))
    assert TOKEN not in str(caught.value)
    assert len(server.asked) == 1 and elsewhere.asked == []


def test_a_batch_that_is_never_answered_has_failed_and_the_others_stand(
    serve: Serve, connect: Any, rollouts: Rolled
) -> None:
    server = serve(*[(500, {"error": "down"})] * 3, lengths)
    first, second, third = judge(connect(server.url, batch_size=2, concurrency=1), rollouts(["a", "b", "ccc"]))
    assert isinstance(first, Failed) and first == second and third == 3.0
    assert first.why.startswith(f"asked 3 times: {server.url} answers 500: ")


def test_a_late_server_is_left_at_the_deadline(serve: Serve, connect: Any, rollouts: Rolled) -> None:
    server = serve(delay=5.0)
    begun = time.monotonic()
    (found,) = judge(connect(server.url, timeout=0.2, retries=1), rollouts(["a"]))
    assert time.monotonic() - begun < 3.0
    assert "asked 2 times: no answer of" in found.why and "no answer within 0.2 s" in found.why


def test_one_that_is_not_there_fails_every_completion(connect: Any, rollouts: Rolled) -> None:
    for found in judge(connect("http://127.0.0.1:1"), rollouts(["a", "b"])):
        assert "Connection refused" in found.why


# Tokens


def test_a_token_is_sent_and_never_told(
    serve: Serve, connect: Any, rollouts: Rolled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HUSH", TOKEN)
    server = serve(lengths, lengths, (200, {"scores": [{"error": f"your {TOKEN} is odd"}]}), (200, TOKEN))
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert judge(connect(server.url, token_env="HUSH"), rollouts(["a"])) == [1.0]
    assert judge(connect(server.url, token_file=str(file)), rollouts(["a"])) == [1.0]
    assert judge(connect(server.url, token_env="HUSH"), rollouts(["a"])) == [Failed("your *** is odd")]
    with pytest.raises(RunError) as caught:
        judge(connect(server.url, token_env="HUSH"), rollouts(["a"]))
    assert TOKEN not in str(caught.value)
    assert server.authorised == [f"Bearer {TOKEN}"] * 4


@pytest.mark.parametrize("before", [60, 190, 290, 490])
def test_of_a_token_that_a_message_is_cut_in_nothing_is_left(
    serve: Serve, connect: Any, rollouts: Rolled, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """A cut at so many characters, made before the token is taken out, would leave its first letters."""
    monkeypatch.setenv("HUSH", TOKEN)
    text = "x" * before + TOKEN
    said = [(200, {"scores": [{"error": text}]}), (200, {"scores": [text]}), (200, {"scores": [{"score": 1, "parts":
            {text: 1}}]}), (200, text), (400, text), (503, text)]  # fmt: skip
    messages = []
    for one in said:
        reward = connect(serve(one).url, token_env="HUSH", retries=0)
        try:
            messages.append(str(judge(reward, rollouts(["a"]))))
        except RunError as error:
            messages.append(str(error))
    assert len(messages) == len(said)
    for message in messages:
        assert "xxx" in message and TOKEN[:4] not in message, message


def test_a_token_that_is_not_there_or_not_safe_is_refused(
    connect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HUSH", raising=False)
    with pytest.raises(RequestError, match=r"--reward.mine.token-env HUSH: the variable isn't set"):
        connect("http://127.0.0.1:1", token_env="HUSH")
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    with pytest.raises(RequestError, match="can be read by others"):
        connect("http://127.0.0.1:1", token_file=str(file))


# Before a run


def test_the_server_is_asked_before_anything_is_loaded(serve: Serve, connect: Any) -> None:
    server = serve((200, {"scores": []}), (503, {"error": "warming up"}), (200, {"ok": True}))
    connect(server.url, check=True)
    assert server.asked == [{"path": "/v1", "version": 1, "items": []}]
    with pytest.raises(RequestError, match=r"answers 503: .*warming up.*\n    start it; .*--reward.mine.check false"):
        connect(server.url, check=True)
    with pytest.raises(RequestError, match=r'answers with no \{"scores"'):
        connect(server.url, check=True)
    with pytest.raises(RequestError, match="Connection refused"):
        connect("http://127.0.0.1:1", check=True)
    assert len(server.asked) == 3  # once each


def refusals(recipe: Any, registry: Registry, machine: Machine) -> list[str]:
    with pytest.raises(RequestError) as caught:
        compose(recipe, registry, machine)
    return [problem.what for problem in caught.value.problems]


def test_a_plan_says_what_it_would_contact(
    typed: Any, installed: Registry, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And contacts nobody: the host doesn't exist."""
    monkeypatch.setenv("HUSH", TOKEN)
    at = ("--algo", "grpo", "--reward", "http:theirs", "--reward.theirs.url", "https://nosuch.invalid/score")
    plan = compose(
        typed(*at, "--reward.theirs.columns", "answer", "--reward.theirs.token-env", "HUSH"), installed, machine
    )
    (note,) = [note for note in plan.notes if note.startswith("--reward theirs")]
    assert "sends prompt, completion, answer to https://nosuch.invalid/score, 32 completions a request" in note
    assert TOKEN not in json.dumps(plan.to_json())


@pytest.mark.parametrize(
    ("url", "more", "why"),
    [
        ("ftp://host/x", (), "not the address of a server"),
        ("http://host/x", ("--reward.http.token-env", "HUSH"), "its token would travel unencrypted"),
        ("http://10.0.0.1/x", ("--reward.http.token-file", "t"), "its token would travel unencrypted"),
        ("http://localhost.evil.com/x", ("--reward.http.token-env", "HUSH"), "its token would travel unencrypted"),
        ("http://host/x", (), ""),
        ("https://host/x", ("--reward.http.token-env", "HUSH"), ""),
        ("http://localhost:8200", ("--reward.http.token-env", "HUSH"), ""),
        ("http://[::1]:8200", ("--reward.http.token-env", "HUSH"), ""),
        ("http://host/x", ("--reward.http.token-env", "HUSH", "--reward.http.allow-plain-http", "true"), ""),
    ],
)
def test_what_a_plan_refuses(
    typed: Any, installed: Registry, machine: Machine, url: str, more: tuple[str, ...], why: str
) -> None:
    recipe = typed("--algo", "grpo", "--reward", "http", "--reward.http.url", url, *more)
    if why:
        (what,) = refusals(recipe, installed, machine)
        assert what.startswith(f"--reward.http.url {url}") and why in what
    else:
        assert compose(recipe, installed, machine).rewards[0].config.url == url


def test_its_address_is_needed(typed: Any, installed: Registry, machine: Machine) -> None:
    assert refusals(typed("--algo", "grpo", "--reward", "http"), installed, machine) == [
        "--reward.http.url is required"
    ]


def test_jitter_is_drawn_from_the_runs_seed(serve: Serve, rollouts: Rolled, monkeypatch: pytest.MonkeyPatch) -> None:
    def pauses(seed: int) -> list[float]:
        server = serve(*[(500, {})] * 2, lengths)
        reward = HTTPReward(HTTPConfig(url=server.url, check=False), Context(cast(Plan, None), seed=seed, label="mine"))
        found = list[float]()
        monkeypatch.setattr(reward._asker.over, "wait", lambda seconds: found.append(seconds))
        assert judge(reward, rollouts(["a"])) == [1.0]
        return found

    first, again, other = pauses(1), pauses(1), pauses(2)
    assert first == again != other
    assert 0.5 <= first[0] <= 1.0 <= first[1] <= 2.0
