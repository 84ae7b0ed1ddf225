"""The engine that asks an OpenAI-compatible endpoint: what it asks, what it makes of answers, and what it does where
there are none. The endpoint is a small reference server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from imitating import IMITATE

from reference_endpoint import ReferenceEndpoint, completed, endpoints
from rlhf import registry as registries
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.errors import RequestError, RunError
from rlhf.facts import Machine
from rlhf.interfaces import Context
from rlhf.loop import Loop
from rlhf.plan import Plan
from rlhf.registry import Registry
from rlhf.rundir import RunDirectory
from rlhf.sequences import Generation
from rlhf_plugins.engines import asking
from rlhf_plugins.engines.endpoint.engine import Endpoint
from rlhf_plugins.engines.endpoint.entry import EndpointConfig
from rlhf_plugins.policies.hf import HFPolicy

TOKEN = "sk-hush-hush-1234"


@pytest.fixture
def serve() -> Iterator[Callable[..., ReferenceEndpoint]]:
    with endpoints() as make:
        yield make


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, policy: HFPolicy, load: Callable[..., Any]) -> Callable[..., Endpoint]:
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    loaded = load()

    def make(url: str, **options: Any) -> Endpoint:
        engine = Endpoint(
            EndpointConfig(url=url, model="m", **{"retries": 2, **options}), Context(cast(Plan, None), seed=7)
        )
        engine.attach(loaded[0], policy, loaded[1])
        return engine

    return make


def responses(generation: Generation) -> list[list[int]]:
    return [response.tolist() for response in generation.sequences.responses()]


def test_texts_become_tokens_of_the_policys_own(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    """Of the vocabulary <eos> a b c ...: b is token 2."""

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        size = len(body["prompt"])
        return completed("b" * size, "stop" if size == 2 else "length")

    server = serve(*[answer] * 4)
    found = connect(server.url, max_new_tokens=9).generate(ask(2, 3, count=2))
    assert responses(found) == [[2, 2, 0], [2, 2, 0], [2, 2, 2], [2, 2, 2]]  # one that ended by itself has its end
    assert found.finish == ("stop", "stop", "length", "length")
    assert found.logp is None and found.failed == {}
    assert found.sequences.prompt_of.tolist() == [0, 0, 1, 1]


def test_what_is_asked(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    server = serve()
    requests = ask(4, count=2)
    engine = connect(server.url, max_new_tokens=9, temperature=0.7, top_p=0.9, stop=("q", "r"), concurrency=1)
    engine.generate(requests)
    first, second = server.asked
    prompt = "".join(chr(96 + token) for token in requests[0].prompt.tokens.tolist())
    assert first["path"] == "/v1/completions" and server.authorised == [f"Bearer {TOKEN}"] * 2
    fixed = {
        "model": "m", "prompt": prompt, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "n": 1, "stream": False,
        "stop": ["q", "r"],
    }  # fmt: skip
    assert fixed.items() <= first.items() and set(first) == {*fixed, "seed", "path"}
    assert first["seed"] != second["seed"]  # or both would be the same response
    again, other = serve(), serve()
    connect(again.url, concurrency=1).generate(requests, temperature=0.0)
    assert [one["seed"] for one in again.asked] == [first["seed"], second["seed"]]
    assert again.asked[0]["temperature"] == 0.0 and "stop" not in again.asked[0]
    connect(other.url).generate(ask(4, greedy=True))
    assert other.asked[0]["temperature"] == 0.0


def test_a_text_that_ended_a_response_is_no_end_token(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    found = connect(serve(completed("ab")).url, stop=("q",)).generate(ask(3))
    assert responses(found) == [[1, 2]] and found.finish == ("stop",)


def test_no_token_is_sent_where_there_is_none(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server = serve()
    connect(server.url, token_env="NOBODYS").generate(ask(2))
    assert server.authorised == [None]
    monkeypatch.setenv("NOBODYS", "two\nlines")
    with pytest.raises(RequestError, match="NOBODYS holds no token") as caught:
        connect(server.url, token_env="NOBODYS")
    assert "two" not in str(caught.value)


def test_so_many_at_once_and_no_more(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    server = serve(delay=0.05)
    connect(server.url, concurrency=3).generate(ask(2, 3, 4, count=4))
    assert server.most == 3 and len(server.asked) == 12


@pytest.mark.parametrize(
    "step",
    [
        (500, {"error": "overloaded"}),
        (429, {"error": "slow down"}),
        (200, b"<html>"),
        (200, {"choices": []}),
        (200, {"choices": [{"text": "a"}]}),
        (200, {"choices": [{"text": 3, "finish_reason": "stop"}]}),
        (200, []),
        completed("a", "content_filter"),
    ],
)
def test_what_is_no_answer_is_asked_for_again(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any], step: Any
) -> None:
    server = serve(step, step)
    found = connect(server.url).generate(ask(2))
    assert responses(found) == [[1, 2, 0]] and found.failed == {}
    assert len({tuple(sorted(one.items())) for one in server.asked}) == 1  # the same request, its seed too
    assert len(server.asked) == 3


def test_a_response_that_is_never_had_has_failed_and_the_others_stand(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    server = serve(*[(503, {"error": f"busy {TOKEN}"})] * 3)
    found = connect(server.url, concurrency=1).generate(ask(2, 3))
    assert list(found.failed) == [0]
    assert "asked 3 times" in found.failed[0] and "answers 503" in found.failed[0]
    assert TOKEN not in found.failed[0] and "busy ***" in found.failed[0]
    assert responses(found) == [[], [1, 2, 0]]
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("text", "why"), [("", "the response is empty"), ("a" * 95, "95 tokens, too many for the policy's context of 96")]
)
def test_a_response_that_can_not_be_learnt_from_has_failed(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any],
    text: str, why: str,
) -> None:  # fmt: skip
    server = serve(completed(text, "length"))
    assert why in connect(server.url).generate(ask(2)).failed[0]
    assert len(server.asked) == 1  # it would be the same again


def test_a_late_answer_is_asked_for_again_and_has_failed_in_the_end(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    server = serve(delay=5.0)
    begun = time.monotonic()
    found = connect(server.url, timeout=0.2, retries=1).generate(ask(2))
    assert time.monotonic() - begun < 3.0
    assert "no answer within 0.2 s" in found.failed[0] and len(server.asked) == 2


def test_an_endpoint_that_is_not_there_fails_every_response(
    connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    found = connect("http://127.0.0.1:1/v1").generate(ask(2, 2))
    assert sorted(found.failed) == [0, 1] and "Connection refused" in found.failed[0]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (400, "answers 400"),
        (401, "environment variable OPENAI_API_KEY"),
        (404, "is --engine.model m served"),
        (307, "answers 307"),
    ],
)
def test_what_every_request_would_meet_ends_the_run(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any],
    status: int, why: str,
) -> None:  # fmt: skip
    elsewhere = serve()
    server = serve(*[(status, {"error": f"bad key {TOKEN}"})] * 40, Location=f"{elsewhere.url}/completions")
    begun = time.monotonic()
    with pytest.raises(RunError, match=why) as caught:
        connect(server.url, concurrency=2).generate(ask(2, count=40))
    assert TOKEN not in str(caught.value)
    assert time.monotonic() - begun < 5.0 and elsewhere.asked == []


def test_pauses_grow_and_are_as_long_as_the_endpoint_asks_for(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def pauses(server: ReferenceEndpoint) -> list[float]:
        engine, found = connect(server.url, retries=3), list[float]()
        monkeypatch.setattr(engine._asker.over, "wait", lambda seconds: found.append(seconds))
        engine.generate(ask(2))
        return found

    monkeypatch.setattr(asking, "FIRST_PAUSE", 1.0)
    first, second, third = pauses(serve(*[(500, {})] * 3))
    assert 1 <= first <= 2 <= second <= 4 <= third <= 8
    assert pauses(serve(*[(429, {})] * 3, Retry_After="20")) == [20, 20, 20]
    assert pauses(serve(*[(429, {})] * 3, Retry_After="9999")) == [60, 60, 60]


def test_state_goes_on_with_other_seeds(
    serve: Callable[..., ReferenceEndpoint], connect: Callable[..., Endpoint], ask: Callable[..., Any]
) -> None:
    """Of requests that have no seed of their own."""
    server = serve()
    engine = connect(server.url)
    engine.generate(ask(2, seed=None))
    engine.generate(ask(2, seed=None))
    later = connect(server.url)
    later.load_state(engine.state())
    later.generate(ask(2, seed=None))
    assert len({one["seed"] for one in server.asked}) == 3


# In a plan and in a run


@pytest.fixture
def registry() -> Registry:
    """What is installed, and an algorithm that needs no log-probs."""
    found = registries.load()
    found.add(IMITATE, registries._Source("fake", "fake-package", "1.0"))
    return found


AT = ("--engine", "openai", "--engine.url", "https://host/v1", "--engine.model", "m")


def refusals(typed: Any, registry: Registry, machine: Machine, *words: str) -> list[str]:
    with pytest.raises(RequestError) as caught:
        compose(typed(*words), registry, machine)
    return [problem.what for problem in caught.value.problems]


def test_it_is_refused_where_log_probs_or_the_policys_own_samples_are_needed(
    typed: Any, registry: Registry, machine: Machine
) -> None:
    need = "--algo ppo needs 'logprobs', which nothing provides"
    assert refusals(typed, registry, machine, "--algo", "ppo", *AT, "--eval-rows", "0") == [need]
    strict = attrs.evolve(IMITATE, name="strict", requires={"rollouts", "on-policy"})
    registry.add(strict, registries._Source("fake", "fake-package", "1.0"))
    need = "--algo strict needs 'on-policy', which nothing provides"
    assert refusals(typed, registry, machine, "--algo", "strict", *AT, "--eval-rows", "0") == [need]
    assert compose(typed("--algo", "strict", "--engine", "hf"), registry, machine).engine.name == "hf"  # type: ignore[union-attr]


def test_it_is_refused_where_rewards_before_and_after_would_be_the_endpoints(
    typed: Any, registry: Registry, machine: Machine
) -> None:
    (what,) = refusals(typed, registry, machine, "--algo", "imitate", *AT)
    assert "held-out rewards would be those of the endpoint's model" in what


def test_it_is_allowed_where_no_log_probs_are_needed(typed: Any, registry: Registry, machine: Machine) -> None:
    plan = compose(typed("--algo", "imitate", *AT, "--eval-rows", "0"), registry, machine)
    assert "--engine openai: samples are of m at the endpoint, which never changes" in plan.notes
    assert TOKEN not in str(plan.to_json())


def test_its_address_is_needed(typed: Any, registry: Registry, machine: Machine) -> None:
    found = refusals(typed, registry, machine, "--algo", "imitate", "--engine", "openai", "--eval-rows", "0")
    assert found == ["--engine.url is required", "--engine.model is required"]


def test_a_run_leaves_out_what_could_not_be_had_and_counts_it(
    serve: Callable[..., ReferenceEndpoint], typed: Any, registry: Registry, machine: Machine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 2 steps with 4 prompts, twice each: the first request fails, so its group of two is left out."""
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(registries, "loaded", lambda: registry)
    server = serve(*[(500, {})] * 2, *[completed(" 7", "stop")] * 14)
    words = ["--engine.url", server.url, "--engine.retries", "1", "--engine.concurrency", "1", "--eval-rows", "0"]
    words += ["--batch-size", "4", "--max-steps", "2", "--mem", "fp32", "--track", "none"]
    plan = compose(typed("--algo", "imitate", *AT[:2], *AT[4:], *words), registry, machine)
    said: list[str] = []
    parts = assemble(plan, said.append)
    directory = RunDirectory(tmp_path / "run")
    directory.open(plan)
    Loop(parts, directory, said.append).run(None)
    directory.close()
    first, second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (first["rollout/failed"], first["rollout/left_out"]) == (1, 2)
    assert (second["rollout/failed"], second["rollout/left_out"]) == (0, 0)
    assert "step 1: 1 rollouts failed, 2 are left out, whole groups; first: the endpoint, asked 2 times" in said[-1]
    assert first["response/length"] == second["response/length"]  # the mean is of those that were had
    assert len(server.asked) == 2 + 15
