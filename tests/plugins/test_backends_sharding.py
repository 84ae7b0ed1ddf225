"""What backends that shard have in common, without any process: pieces, blocks, forwards with and without hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rlhf.checkpoint import Spread
from rlhf.errors import RunError
from rlhf.scores import Scores
from rlhf_plugins.backends import sharding


def test_a_piece_leaves_padding_out() -> None:
    flat = torch.arange(6.0)  # elements 4 to 7 of 8, and two of padding
    piece = sharding.piece_of(flat, (2, 4), 4)
    assert piece.tensor.tolist() == [0.0, 1.0, 2.0, 3.0] and piece.shape == (2, 4) and piece.start == 4
    assert sharding.piece_of(flat, (2, 4), 8).tensor.numel() == 0  # nothing but padding
    assert sharding.piece_of(flat, (2, 4), 0).tensor.tolist() == flat.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_are_filled_from_whole_tensors_and_from_others_pieces(ranks: int, tmp_path: Path) -> None:
    whole = torch.arange(10.0).view(2, 5)
    size = -(-10 // ranks)
    parts = []
    for rank in range(ranks):  # as another number of ranks saved it: each its part, in a file of its own
        piece = sharding.piece_of(
            torch.cat([whole.view(-1), torch.zeros(9)])[rank * size :][:size], (2, 5), rank * size
        )
        path = tmp_path / f"rank-{rank}.safetensors"
        save_file({"w": piece.tensor}, path)
        parts.append((piece.start, piece.start + piece.tensor.numel(), path, "w"))
    for saved in (whole, Spread((2, 5), tuple(parts))):
        for start in (0, 4, 8):  # three ranks now, the last with two elements of padding
            flat = torch.full((4,), -1.0)
            sharding.fill(flat, saved, start)
            assert flat.tolist() == [float(i) if i < 10 else -1.0 for i in range(start, start + 4)]
        beyond = torch.full((4,), -1.0)
        sharding.fill(beyond, saved, 12)  # a rank that has nothing of it
        assert beyond.tolist() == [-1.0] * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        return self.linear(x)


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


def test_blocks_are_what_must_not_be_split_even_under_another_class_of_that_name() -> None:
    net = nn.ModuleDict({"policy": Net(), "other": nn.Linear(2, 2)})
    layers = cast(Net, net["policy"]).layers
    layers[1].__class__ = type("Block", (Block,), {})  # as gradient checkpointing does
    assert sharding.blocks_of(net) == list(layers)
    assert sharding.blocks_of(nn.Linear(2, 2)) == []


def test_scores_go_through_plain_tensors() -> None:
    scores = [Scores("policy", logp_=torch.zeros(2), entropy_=torch.ones(2)), Scores("value", values_=torch.ones(3))]
    container = nn.Module()
    container.forward = lambda requests: scores  # type: ignore[method-assign]
    outputs = sharding.Visible(container)([])
    assert isinstance(outputs[0], dict)
    for ours, theirs in zip(sharding.scores_of(outputs), scores, strict=True):
        assert ours.role == theirs.role
        for name in ("logp_", "entropy_", "values_", "score_"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.data_ptr() != b.data_ptr())  # no view of what others hold


def test_bare_forwards_call_no_hook_and_hooks_come_back() -> None:
    net = Block()
    calls: list[str] = []
    net.linear.register_forward_pre_hook(lambda *a: calls.append("before"))
    net.register_forward_hook(lambda *a: calls.append("after"))
    x = torch.ones(1, 2)
    with pytest.raises(ZeroDivisionError), sharding.bare(net):
        net(x)
        assert calls == []
        raise ZeroDivisionError
    net(x)
    assert calls == ["before", "after"]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(RunError, match="nothing is to be trained"):
        sharding.something_to_train([])
