"""Checkpoints: bit-exact, refused by name where torn, and gone in an order that never leaves half a one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_ranks import in_two_ranks
from rlhf import checkpoint
from rlhf.checkpoint import Piece
from rlhf.loop import resume_from
from rlhf.rundir import RunDirectory
from rlhf.world import World

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types, shapes, dtypes and bits (a NaN equals itself)."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def round_trip(root: Path, state: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.load(checkpoint.save(root, 1, state))


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for dtype in DTYPES:
        bits = torch.randint(0, 2, (24,)) if dtype == torch.bool else torch.randint(-100, 100, (24,))
        found[str(dtype)] = bits.to(dtype).view(2, 3, 4)
    return found


def test_nested_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "every dtype": tensors(),
        "shapes": {
            "0-dim": torch.tensor(1 / 3, dtype=torch.bfloat16),
            "empty": torch.zeros(0),
            "empty matrix": torch.zeros(0, 3, dtype=torch.int32),
            "transposed": torch.arange(6.0).view(2, 3).T,
            "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64),
        },
        "json": {"int": 2**70, "float": 0.1, "nan": math.nan, "inf": -math.inf, "none": None, "bool": True,
                 "text": "\ud800 \u2028 é", "": "empty key", "list": [1, [2.5, {"deep": torch.ones(1)}], []], "{}": {}},
        "one tensor": torch.arange(3),
        "nothing": {},
    }  # fmt: skip
    assert same(state, round_trip(tmp_path, state))


def test_paths_that_look_alike_stay_two_tensors(tmp_path: Path) -> None:
    state = {
        "x": {"a": {"b": torch.zeros(2)}, "a/b": torch.ones(2), "a~1b": torch.full((2,), 2.0), "~": [torch.ones(1)]}
    }
    assert same(state, round_trip(tmp_path, state))


@pytest.mark.parametrize(
    "content",
    [
        {"$tensor": "hello"},
        {"$tensor": "/a"},
        {"$tensor": {"$tensor": 1}},
        {"$plain": {"$tensor": "/a"}},
        {"$plain": 1},
        {"$tensor": torch.ones(2)},
        {"$plain": {}, "$tensor": 1},
    ],
    ids=str,
)
def test_a_users_dict_that_looks_like_our_own_mark_is_only_a_dict(tmp_path: Path, content: dict[str, Any]) -> None:
    state = {"x": {"a": torch.zeros(1), "mine": content}}
    assert same(state, round_trip(tmp_path, state))


def test_tensors_that_share_memory_are_kept_each(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    state = {"x": {"whole": x, "again": x, "part": x[:2], "other": x[3:]}}
    assert same(state, round_trip(tmp_path, state))


def test_gradients_and_graphs_are_left_behind(tmp_path: Path) -> None:
    kept = round_trip(tmp_path, {"x": torch.ones(2, requires_grad=True) * 2})["x"]
    assert kept.tolist() == [2, 2] and not kept.requires_grad


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": {1: 2}}, "'/a': keys must be text"),
        ({"a": [object()]}, "'/a/0' is a object: only JSON values and tensors"),
        ({"a": {1, 2}}, "'/a' is a set"),
        ({"a": b"x"}, "'/a' is a bytes"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        checkpoint.save(tmp_path, 1, {"x": content})
    assert not checkpoint.whole(tmp_path)


def small(number: int) -> dict[str, Any]:
    return {"loop": {"step": number}, "weights": {"w": torch.full((3,), float(number))}}


@pytest.fixture
def two(tmp_path: Path) -> RunDirectory:
    """A run with whole checkpoints of steps 1 and 2."""
    directory = RunDirectory(tmp_path)
    for step in (1, 2):
        checkpoint.save(directory.checkpoints, step, small(step), {"loss": 0.5})
    return directory


def test_torn_at_any_byte_of_any_file_it_is_refused_by_name_and_the_one_before_is_used(two: RunDirectory) -> None:
    newest = two.checkpoints / "step-000002"
    files = sorted(path.name for path in newest.iterdir())
    assert files == ["manifest.json", "state.json", "weights.safetensors"]
    for name in files:
        path = newest / name
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            said: list[str] = []
            found = resume_from(two, said.append)
            assert found is not None and found[1]["loop"]["step"] == 1, (name, length)
            assert len(said) == 1 and str(path) in said[0] and "trying the one before" in said[0], (name, length)
        path.write_bytes(content)
        for i in range(len(content)) if name != "manifest.json" else ():  # whose own bytes nothing vouches for
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            with pytest.raises(ValueError, match=f"{name}: was changed"):
                checkpoint.load(newest)
        path.write_bytes(content)
        path.unlink()
        if name == "manifest.json":  # never written: not even seen
            assert [saved.step for saved in checkpoint.whole(two.checkpoints)] == [1]
        else:
            with pytest.raises(ValueError, match=f"{name}: is missing"):
                checkpoint.load(newest)
        path.write_bytes(content)
    assert checkpoint.load(newest)["loop"]["step"] == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format=2),
        lambda m: m.pop("files"),
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"].pop("weights.safetensors"),
        lambda m: m["files"]["state.json"].pop("sha256"),
        lambda m: m.update(files=["state.json"]),
    ],
)
def test_an_edited_manifest_is_refused_by_name(two: RunDirectory, edit: Any) -> None:
    path = two.checkpoints / "step-000002" / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    said: list[str] = []
    found = resume_from(two, said.append)
    assert found is not None and found[1]["loop"]["step"] == 1
    assert str(path) in said[0]


def test_with_every_checkpoint_torn_there_is_none(two: RunDirectory) -> None:
    for path in two.checkpoints.glob("*/state.json"):
        path.write_text("{")
    said: list[str] = []
    assert resume_from(two, said.append) is None and len(said) == 2


def test_only_folders_of_the_right_name_are_checkpoints(two: RunDirectory) -> None:
    (two.checkpoints / "step-000002").rename(two.checkpoints / "step-2-copy")
    assert [(saved.step, saved.heldout) for saved in checkpoint.whole(two.checkpoints)] == [(1, {"loss": 0.5})]
    assert checkpoint.whole(two.checkpoints / "nowhere") == []


def test_steps_of_any_size_stay_in_order(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999):
        checkpoint.save(tmp_path, step, small(step))
    assert [saved.step for saved in checkpoint.whole(tmp_path)] == [999_999, 1_000_000]


def steps(root: Path) -> list[int]:
    return [saved.step for saved in checkpoint.whole(root)]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, small(step))
        checkpoint.prune(tmp_path, step, keep=2, best=2 if step >= 2 else None)
    assert steps(tmp_path) == [2, 4, 5]
    checkpoint.prune(tmp_path, 5, keep=1, best=None)
    assert steps(tmp_path) == [5]


def test_a_torn_newer_one_does_not_push_out_those_that_are_whole(tmp_path: Path) -> None:
    for step in (4, 8):
        checkpoint.save(tmp_path, step, small(step))
    (tmp_path / "step-000008" / "state.json").write_text("{")  # refused, so the run goes on from 4
    checkpoint.save(tmp_path, 5, small(5))
    checkpoint.prune(tmp_path, 5, keep=1, best=None)
    assert steps(tmp_path) == [5]
    assert checkpoint.load(tmp_path / "step-000005")["loop"]["step"] == 5


def test_a_step_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, {"old": torch.ones(1), **small(1)})
    (folder / checkpoint.MANIFEST).unlink()  # torn
    assert same(checkpoint.load(checkpoint.save(tmp_path, 3, small(2))), small(2))
    assert not (folder / "old.safetensors").exists()


def test_a_deletion_cut_short_leaves_no_checkpoint(two: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two.checkpoints / "step-000002"

    def cut_short(path: Path) -> None:
        assert path == folder and not (folder / checkpoint.MANIFEST).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.checkpoint.shutil.rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove(folder)
    assert (folder / "state.json").exists() and steps(two.checkpoints) == [1]


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(path: Path, text: str) -> None:
        assert path.name == checkpoint.MANIFEST
        listed = json.loads(text)["files"]
        assert {p.name: p.stat().st_size for p in path.parent.iterdir()} == {n: f["size"] for n, f in listed.items()}
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_atomic", cut_short)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, small(1))
    assert steps(tmp_path) == []


def test_an_atomic_write_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    checkpoint.write_atomic(path, "before")

    def cut_short(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.files.os.replace", cut_short)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, "after")
    assert path.read_text() == "before"


# Tensors that are spread over ranks


def spread_state(rank: int) -> dict[str, Any]:
    """A [2, 5] tensor of 0..9, of which rank 0 has the first 3 elements and rank 1 the rest; another is rank 1's."""
    whole = torch.arange(10, dtype=torch.bfloat16)
    own = Piece(whole[:3] if rank == 0 else whole[3:], (2, 5), 0 if rank == 0 else 3)
    there = Piece(torch.ones(4 * rank), (2, 2), 0)
    return {"backend": {"weights": {"a/b": own, "c": there}, "step": 3 + rank}, "other": {"x": torch.ones(2) * rank}}


def test_pieces_of_two_fake_ranks_are_read_by_any_number(tmp_path: Path) -> None:
    folder, same_folder = in_two_ranks(
        lambda rank, world: checkpoint.save(tmp_path, 1, spread_state(rank), None, world)
    )
    assert folder == same_folder and [saved.step for saved in checkpoint.whole(tmp_path)] == [1]
    state = checkpoint.load(folder)
    assert state["backend"]["step"] == 3 and state["other"]["x"].tolist() == [0, 0]  # what isn't spread is rank 0's
    found = state["backend"]["weights"]["a/b"]
    assert found.shape == (2, 5)
    assert found.whole().dtype == torch.bfloat16 and found.whole().tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for start, stop in ((0, 10), (0, 3), (3, 10), (2, 4), (4, 5), (9, 10), (6, 6)):
        assert found.read(start, stop).tolist() == list(range(start, stop))
    assert state["backend"]["weights"]["c"].whole().tolist() == [[1, 1], [1, 1]]


def test_one_rank_may_hold_pieces_too(tmp_path: Path) -> None:
    state = {"a": {"x": Piece(torch.arange(4), (4,), 0)}}
    assert checkpoint.load(checkpoint.save(tmp_path, 1, state))["a"]["x"].whole().tolist() == [0, 1, 2, 3]


def test_a_hole_between_pieces_is_refused(tmp_path: Path) -> None:
    def work(rank: int, world: World) -> Path:
        piece = Piece(torch.zeros(2), (5,), 3 * rank)  # nobody has element 2
        return checkpoint.save(tmp_path, 1, {"a": {"x": piece}}, None, world)

    folder = in_two_ranks(work)[0]
    with pytest.raises(ValueError, match="elements 2 to 3"):
        checkpoint.load(folder)


def test_a_torn_file_of_a_rank_is_refused(tmp_path: Path) -> None:
    folder = in_two_ranks(lambda rank, world: checkpoint.save(tmp_path, 1, spread_state(rank), None, world))[0]
    file = folder / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rank-1\.safetensors: is torn"):
        checkpoint.load(folder)
