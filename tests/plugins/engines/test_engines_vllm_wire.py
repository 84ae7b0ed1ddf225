"""The wire: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import save_file

from rlhf_plugins.engines.vllm import buckets, wire
from rlhf_plugins.engines.vllm.sampler import Answer, Ask

ASK = Ask((1, 2), 7, 16, 0.7, 0.9, 20, ("\n\n", "é"), (0, 2))
SHARED_MEMORY = pytest.mark.skipif(not os.path.isdir(wire.SHARED_MEMORY), reason="no /dev/shm here")


@pytest.mark.parametrize(
    "message",
    [
        wire.SampleRequest("r", 3, (ASK, attrs.evolve(ASK, stop=(), seed=(1 << 64) - 1))),
        wire.Answers(3, (Answer((5, 6), (-0.1, -1 / 3), "stop"), Answer((), (), "length", "lost"))),
        wire.ScoreRequest("r", 0, ((1, 2, 3), (4, 5))),
        wire.Begin("r", 2, {"r": 8, "target_modules": ["q_proj"]}, False, ""),
        wire.Begin("r", 2, None, True, "m"),
        wire.PrintsRequest("r", 2, {"a.weight": (3, 4)}),
        wire.Prints(2, {"a.weight": (1 / 3, -2.5)}),
        wire.Nothing(),
        wire.Health(1, "i", "ready", "", "", -1, "m"),
    ],
)
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    assert wire.read(wire.write(message), type(message)) == message


def changed(**fields: Any) -> bytes:
    """A request to sample in which the ask differs."""
    message = attrs.asdict(wire.SampleRequest("r", 3, (ASK,)))
    message["asks"][0].update(fields)
    return json.dumps(message).encode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "message must be an object"),
        (b'{"run": "r", "version": 3}', "message lacks asks"),
        (b'{"run": "r", "version": 3, "asks": [], "code": 1}', "message has code, which is unknown"),
        (b'{"run": "r", "version": "3", "asks": []}', "message.version must be int, not '3'"),
        (b'{"run": "r", "version": true, "asks": []}', "message.version must be int"),
        (b'{"run": "r", "version": 1.0, "asks": []}', "message.version must be int"),
        (b'{"run": "r", "version": 3, "asks": {}}', "message.asks must be tuple"),
        (changed(prompt="12"), r"message.asks\[0\].prompt must be tuple"),
        (changed(prompt=[1, None]), r"message.asks\[0\].prompt\[1\] must be int"),
        (changed(temperature=float("nan")), "not JSON: NaN"),
        (changed(temperature=None), r"message.asks\[0\].temperature must be float"),
    ],
)
def test_another_message_is_refused_by_place(text: bytes, why: str) -> None:
    with pytest.raises(wire.WireError, match=why):
        wire.read(text, wire.SampleRequest)


def test_a_word_that_is_none_of_the_choice_is_refused() -> None:
    text = wire.write(wire.Answers(1, (Answer((1,), (-1.0,), "stop"),))).replace(b'"stop"', b'"eos"')
    with pytest.raises(wire.WireError, match=r"answers\[0\].finish must be"):
        wire.read(text, wire.Answers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ()), ("prompt", (-1,)), ("prompt", (1 << 31,)), ("seed", -1), ("seed", 1 << 64), ("max_tokens", 0),
        ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("stop", ("",)),
        ("stop_tokens", (-1,)),
    ],
)  # fmt: skip
def test_what_can_not_be_sampled_is_refused(field: str, value: Any) -> None:
    wire.check([ASK])
    with pytest.raises(wire.WireError, match=rf"asks\[1\].{field} is out of range"):
        wire.check([ASK, attrs.evolve(ASK, **{field: value})])


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([], "0 answers to 1 requests"),
        ([Answer((1,), (), "stop")], "0 log-probs for 1 tokens"),
        ([Answer((), (), "stop")], "answer 0 has 0 tokens; 1 to 16 were asked for"),
        ([Answer((1,) * 17, (-1.0,) * 17, "length")], "17 tokens; 1 to 16"),
    ],
)
def test_an_answer_that_is_none_is_refused(answers: list[Answer], why: str) -> None:
    with pytest.raises(wire.WireError, match=why):
        wire.check_answers([ASK], answers)
    wire.check_answers([ASK], [Answer((), (), "length", "engine: lost")])


# Weights


def test_buckets_hold_no_more_than_their_size_but_for_a_larger_tensor() -> None:
    weights = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(9), "d": torch.zeros(1)}  # 4 bytes each
    found = [list(bucket) for bucket in buckets.buckets(weights.items(), size=20)]
    assert found == [["a", "b"], ["c"], ["d"]]


def test_a_bucket_holds_copies() -> None:
    """A stream may give the same memory again and again: what was gathered is freed when the next one is asked for."""
    memory = torch.zeros(2)

    def stream() -> Any:
        for i in range(3):
            memory.fill_(i)
            yield str(i), memory

    (found,) = buckets.buckets(stream())
    assert [found[str(i)].tolist() for i in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_a_body_keeps_types_and_bits() -> None:
    bucket = {"x": torch.tensor([1 / 3, -0.0]), "y": torch.tensor([[1.5]], dtype=torch.bfloat16)}
    found = buckets.from_bytes(buckets.to_bytes(bucket))
    assert {n: (t.dtype, t.tolist()) for n, t in found.items()} == {n: (t.dtype, t.tolist()) for n, t in bucket.items()}
    with pytest.raises(wire.WireError, match="no safetensors"):
        buckets.from_bytes(b"\x80\x04pickle")


@SHARED_MEMORY
def test_a_file_of_shared_memory_is_taken_once() -> None:
    folder = buckets.SharedFolder()
    try:
        assert folder.path.stat().st_mode & 0o077 == 0
        path = folder.write({"x": torch.ones(3)})
        assert path is not None
        assert buckets.take(str(path))["x"].tolist() == [1, 1, 1]
        assert not path.exists()
        with pytest.raises(wire.WireError, match="can't be read: No such file"):
            buckets.take(str(path))
        (folder.path / "odd").write_bytes(b"no tensors")
        with pytest.raises(wire.WireError, match="no safetensors"):
            buckets.take(str(folder.path / "odd"))
    finally:
        folder.close()
    assert not folder.path.exists()


@SHARED_MEMORY
def test_no_other_file_can_be_named(tmp_path: Path) -> None:
    folder = buckets.SharedFolder()
    try:
        secret = tmp_path / "secret.safetensors"
        save_file({"x": torch.ones(1)}, secret)
        (folder.path / "link").symlink_to(secret)
        (folder.path / "inner").mkdir()
        up = f"{folder.path}/../{folder.path.name}/x"
        for path in (
            secret,
            folder.path / "link",
            folder.path / "inner",
            folder.path,
            up,
            "",
            "x",
            f"{folder.path}/../x",
        ):
            with pytest.raises(wire.WireError):
                buckets.take(str(path))
        assert secret.exists()
    finally:
        folder.close()


@SHARED_MEMORY
def test_where_there_is_no_room_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = buckets.SharedFolder()
    try:
        monkeypatch.setattr(buckets.shutil, "disk_usage", lambda path: attrs.make_class("U", ["free"])(16 << 20))
        assert folder.write({"x": torch.ones(1)}) is None
        assert list(folder.path.iterdir()) == []
    finally:
        folder.close()
