"""Names that are no place here: what looks like a path, and one question to the hub, which is stood in for."""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from rlhf import hub

RESPONSE: Any = types.SimpleNamespace(headers={}, request=None)  # an error of the library's carries one
unavailable = hub.unavailable  # the real one: the fixture of all tests puts another in its place


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    unavailable.cache_clear()
    yield
    unavailable.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[tuple[str, str]]]:
    """Put an answer in the hub's place; returns what it is asked."""

    def put(answer: Callable[[], Any]) -> list[tuple[str, str]]:
        questions: list[tuple[str, str]] = []

        class FakeApi:
            def repo_info(self, name: str, *, repo_type: str, timeout: float) -> Any:
                assert 0 < timeout <= 10
                questions.append((repo_type, name))
                return answer()

        monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
        return questions

    return put


def raising(error: Exception) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


@pytest.mark.parametrize(
    ("text", "is_id"),
    [("gpt2", True), ("org/name", True), ("org/Set-3.1-Pro", True), ("org/Qwen2.5-0.5B", True), ("a/b/c", False),
     ("./a", False), ("../a", False), ("~/a", False), ("/a", False), ("ok.txt", False), ("org/rows.jsonl", False),
     ("x.table", False), ("a b", False), ("", False), ("s3://a", False)],
)  # fmt: skip
def test_what_can_be_a_hub_id(text: str, is_id: bool) -> None:
    assert hub.is_id(text, (".table",)) is is_id


def test_it_is_asked_once(asked: Any) -> None:
    questions = asked(lambda: None)
    assert [unavailable("model", "org/a"), unavailable("model", "org/a"), unavailable("dataset", "org/a")] == [""] * 3
    assert questions == [("model", "org/a"), ("dataset", "org/a")]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE),
         "the hub has no such model, or a private one"),
        (errors.GatedRepoError("403", response=RESPONSE), ""),
        (errors.HfHubHTTPError("503 busy", response=RESPONSE),
         "the hub can't be asked: 503 busy"),
        (errors.HFValidationError("bad"), "it is no name of a model of the hub"),
        (ConnectionError("no route"), "the hub can't be reached (ConnectionError: no route)"),
    ],
)  # fmt: skip
def test_what_it_answers(asked: Any, error: Exception, says: str) -> None:
    asked(raising(error))
    assert unavailable("model", "org/a").startswith(says) and bool(unavailable("model", "org/a")) == bool(says)


def test_it_has_a_deadline(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEADLINE", 0.1)  # and a second is allowed on top
    asked(lambda: time.sleep(5))
    begun = time.monotonic()
    assert unavailable("model", "org/a").startswith("the hub can't be reached (no answer")
    assert time.monotonic() - begun < 4  # it slept for 5


@pytest.mark.parametrize("flag", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_is_offline_asks_nothing(asked: Any, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    questions = asked(lambda: None)
    monkeypatch.setenv(flag, "1")
    assert unavailable("model", "org/a") == (
        f"the hub's cache has no such model ({flag} is set, so the hub is not asked)"
    )
    assert questions == []


def test_what_is_in_the_cache_is_not_asked_for(asked: Any, tmp_path: Path) -> None:
    questions = asked(raising(ConnectionError()))
    for repository in ("models--org--a", "datasets--org--b"):
        (tmp_path / "hf" / "hub" / repository / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / "hf" / "hub" / repository / "refs").mkdir()
        (tmp_path / "hf" / "hub" / repository / "refs" / "main").write_text("abc\n")
    (tmp_path / "hf" / "datasets" / "org___my_set").mkdir(parents=True)
    assert unavailable("model", "org/a") == unavailable("dataset", "org/b") == unavailable("dataset", "org/MySet") == ""
    assert questions == []
    assert unavailable("dataset", "org/a") and questions == [("dataset", "org/a")]


def test_the_nearest_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("")
    assert hub.near(f"{tmp_path}/row.jsonl") == f"did you mean {tmp_path}/rows.jsonl? "
    assert hub.near(f"{tmp_path}/runs/frist/model") == f"did you mean {tmp_path}/runs/first/model? "
    assert hub.near(f"{tmp_path}/runs/frist/other") == ""
    assert hub.near(f"{tmp_path}/row.jsonl", Path.is_dir) == ""
    assert hub.near(f"{tmp_path}/quite/else") == ""
    assert hub.near(f"{tmp_path}/nosuch.jsonl") == ""  # a common ending makes nothing alike
    assert hub.near(f"{tmp_path}/runs") == ""  # it is there
    (tmp_path / "row.csv").write_text("")
    assert hub.near(f"{tmp_path}/rwos.jsonl") == f"did you mean {tmp_path}/rows.jsonl? "
