"""Where the vLLM of a run is: what a plan refuses of it, and what is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from rlhf import registry as registries
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.interfaces import Context
from rlhf.world import World
from rlhf_plugins.engines.vllm import places
from rlhf_plugins.engines.vllm.entry import VLLMConfig
from rlhf_plugins.engines.vllm.failover import Absent, Failover, Shared
from rlhf_plugins.engines.vllm.remote import Deadlines
from rlhf_plugins.engines.vllm.sampler import Settings
from rlhf_plugins.engines.vllm.secret import read_token, token_from, token_of

SETTINGS = Settings("m", {"dtype": "float32", "max_model_len": 96, "gpu_memory_utilization": 0.3, "tokenizer": "m"})


@pytest.fixture
def refusals(typed: Any, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    (tmp_path / "vllm.py").write_text("")  # stands for the real one, which no plan imports
    monkeypatch.syspath_prepend(tmp_path)
    registry = registries.load()

    def of(*words: str) -> list[str]:
        try:
            compose(typed("--algo", "ppo", "--engine", "vllm", *words), registry, machine)
        except RequestError as error:
            return [problem.what for problem in error.problems]
        return []

    return of


def test_a_server_has_an_address_and_nothing_else_has(refusals: Callable[..., list[str]]) -> None:
    url = ("--engine.url", "http://host:1")
    assert refusals() == refusals("--engine.place", "beside") == refusals("--engine.place", "server", *url) == []
    assert refusals("--engine.place", "server") == ["--engine.place server: its address is missing"]
    assert refusals(*url) == ["--engine.url: of a server, and --engine.place is inside"]
    found = refusals("--engine.place", "beside", "--engine.token-file", "f")
    assert found == ["--engine.token-file: of a server, and --engine.place is beside"]
    found = refusals("--engine.place", "server", *url, "--engine.kv-cache-memory-bytes", "1000000")
    assert found == ["--engine.kv-cache-memory-bytes: a server's own choice, who knows its devices"]
    (found,) = refusals("--engine.place", "outside")
    assert "must be one of inside, beside, server, not 'outside'" in found


class Started(Absent):
    why_host = ""
    carrier = "bodies"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be started."""
    found: list[tuple[Any, ...]] = []
    for name in ("Beside", "Server"):
        monkeypatch.setattr(places, name, lambda *a, _of=name, **k: found.append((_of, a, k)) or Started())
    monkeypatch.setenv("RLHF_ENGINE_TOKEN", "the-token-of-the-environment")
    return found


def context(rank: int = 0, size: int = 1) -> Context:
    world = World()
    world.rank, world.size = rank, size
    plan = SimpleNamespace(machine=SimpleNamespace(provides=frozenset()))
    return Context(plan=plan, world=world)  # type: ignore[arg-type]


def test_beside_is_one_a_rank(started: list[tuple[Any, ...]]) -> None:
    config = VLLMConfig(place="beside", start_timeout=1.0, load_timeout=2.0, sample_timeout=3.0, sample_pace=4.0)
    assert isinstance(places.sampler_at(config, SETTINGS, context(1, 2)), Failover)
    deadlines = Deadlines(1.0, 2.0, 3.0, 4.0)
    carried = {"carrier": "host", "device": "cpu", "only": False}
    assert started == [("Beside", (SETTINGS, deadlines), {**carried, "name": "the vLLM beside rank 1", "again": False})]


def test_a_server_is_one_for_all_ranks_and_chooses_for_itself_what_it_knows_best(
    started: list[tuple[Any, ...]],
) -> None:
    config = VLLMConfig(place="server", url="http://host:1", carrier="broadcast")
    assert isinstance(places.sampler_at(config, SETTINGS, context(1, 2)), Shared)
    assert started == []  # rank 0 speaks to it
    places.sampler_at(config, SETTINGS, context(0, 2))
    asked = {"dtype": "float32", "max_model_len": 96}
    expected = ("http://host:1", "the-token-of-the-environment", asked, Deadlines())
    carried = {"carrier": "broadcast", "device": "cpu", "only": True}
    assert started == [("Server", expected, {**carried, "again": False})]


def test_a_way_that_is_not_open_is_told(started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Started, "why_host", "no route to host")
    said: list[str] = []
    at = attrs.evolve(context(), say=said.append)
    places.sampler_at(VLLMConfig(place="server", url="http://host:1"), SETTINGS, at)
    places.sampler_at(VLLMConfig(place="beside"), SETTINGS, at)
    instead = "no route to host; weights go by way of the host instead (bodies)"
    assert said == [f"the vLLM server: {instead}", f"the vLLM beside: {instead}"]


def test_the_options_defaults_are_the_deadlines_own() -> None:
    config = VLLMConfig()
    found = (config.start_timeout, config.load_timeout, config.sample_timeout, config.sample_pace)
    assert found == (Deadlines().start, Deadlines().load, Deadlines().sample, Deadlines().pace)


# Tokens


def test_a_token_is_made_once_and_for_its_user_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine.token"
    token = token_of(path)
    assert len(token) >= 32 and path.stat().st_mode & 0o777 == 0o600
    assert token not in capsys.readouterr().err
    assert token_of(path) == read_token(path) == token_from(str(path)) == token
    assert token_of(tmp_path / "another") != token


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("x" * 32, 0o644, "can be read by others"),
        ("too-few", 0o600, "holds no token"),
        ("with a blank in it, and long", 0o600, "holds no token"),
        ("é" * 32, 0o600, "holds no token"),
    ],
)
def test_what_is_no_token(tmp_path: Path, content: str, mode: int, why: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)
    for reading in (read_token, token_of):
        with pytest.raises(RequestError, match=why) as caught:
            reading(path)
        assert content not in str(caught.value)


def test_a_token_that_is_nowhere_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_ENGINE_TOKEN", raising=False)
    with pytest.raises(RequestError, match="asks for its token"):
        token_from(None)
    with pytest.raises(RequestError, match="No such file"):
        token_from(str(tmp_path / "none"))
    with pytest.raises(RequestError, match="No such file"):
        token_of(tmp_path / "none" / "token")
