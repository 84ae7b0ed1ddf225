"""Attention over a row of sequences: who sees whom, and against the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.sequences import Sequences
from rlhf_plugins.policies.layout import lay_flat
from rlhf_plugins.policies.ragged import Block, Costs, Stretch, attend, blocks_of

TOGETHER = Costs(pair=1e-9, call=1.0, most=10**9)
"""Nothing is cut, and everything shares a product."""


def sequences(draw: torch.Generator, shapes: list[tuple[int, list[int]]]) -> Sequences:
    """For each prompt its length and those of its responses."""
    responses = [(u, n) for u, (_, lengths) in enumerate(shapes) for n in lengths]
    return Sequences.of(
        [torch.randint(0, 9, (size,), generator=draw) for size, _ in shapes],
        [torch.randint(0, 9, (n,), generator=draw) for _, n in responses],
        prompt_of=[u for u, _ in responses],
    )


def seen(blocks: tuple[Block, ...], count: int) -> Tensor:
    """bool [N, N]: which keys each place of the row looks at; every place must be a query once."""
    table, times = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    for block in blocks:
        for i, stretch in enumerate(block.stretches):
            for j in range(stretch.queries):
                place = int(block.query[i, j])
                times[place] += 1
                looked_at = block.key[i][~block.hidden[i, 0, 0, j]]
                assert len(set(looked_at.tolist())) == len(looked_at)  # none counts twice
                table[place, looked_at] = True
    assert times.tolist() == [1] * count
    return table


def visible(of: Sequences) -> Tensor:
    """The same by definition: a response's token sees its prompt, and of its own response what isn't later."""
    owner, position = [], []
    for prompt in range(len(of.prompts)):
        owner += [(prompt, -1)] * len(of.prompts[prompt])
        position += list(range(len(of.prompts[prompt])))
        for i in (of.prompt_of == prompt).nonzero().flatten().tolist():
            owner += [(prompt, i)] * int(of.lengths[i])
            position += list(range(int(of.lengths[i])))
    return torch.tensor(
        [
            [a[0] == b[0] and (b[1] == -1 if a[1] != b[1] else position[j] <= position[i]) for j, b in enumerate(owner)]
            for i, a in enumerate(owner)
        ]
    )


def test_a_row_by_hand() -> None:
    """Prompt [1, 2] with responses [3, 4] and [5]; prompt [6] with [7, 8, 9]."""
    prompts = [torch.tensor([1, 2]), torch.tensor([6])]
    responses = [torch.tensor([3, 4]), torch.tensor([7, 8, 9]), torch.tensor([5])]
    grid = lay_flat(Sequences.of(prompts, responses, prompt_of=[0, 1, 0]), Costs(pair=1e-9, call=1.0, most=31))
    assert grid.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert grid.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3]]
    assert grid.mask is None
    # before 3 4 stand places 1 2; before 5 (token 5) the prompt's end, 1; before 7 8 9 (tokens 2 to 4) 5 6 7
    assert dict(zip(grid.token.tolist(), grid.before.tolist(), strict=True)) == {0: 1, 1: 2, 5: 1, 2: 5, 3: 6, 4: 7}
    assert dict(zip(grid.sequence.tolist(), grid.last.tolist(), strict=True)) == {0: 3, 2: 4, 1: 8}
    assert [block.stretches for block in grid.blocks] == [
        (Stretch((4, 5), ((0, 2),)),),  # 5 looks at 1 2 and itself
        (Stretch((0, 4)),),
        (Stretch((5, 9)),),
    ]


def test_stretches_alike_share_a_product_where_a_call_costs_more_than_filling_up() -> None:
    texts = [((0, 2), [(2, 6)]), ((6, 8), [(8, 13)])]  # 6 and 7 tokens: joined, 2 x 7 x 7 pairs instead of 36 + 49
    assert len(blocks_of(texts, Costs(pair=1.0, call=12.0, most=10**9))) == 2
    assert len(blocks_of(texts, Costs(pair=1.0, call=200.0, most=10**9))) == 1
    assert len(blocks_of(texts, Costs(pair=1.0, call=200.0, most=97))) == 2  # 98 are more than may be held


def test_a_long_text_is_cut_where_that_computes_less() -> None:
    """c pieces of 100 tokens cost c calls and 100 x 100 (c + 1) / 2c pairs: least at c = 100 sqrt(pair / 2 call).

    At pair 1/100 and call 2: c = 5.
    """
    blocks = blocks_of([((0, 60), [(60, 100)])], Costs(pair=0.01, call=2.0, most=10**9))
    stretches = sorted((s for block in blocks for s in block.stretches), key=lambda s: s.own)
    assert [s.own for s in stretches] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]
    assert [s.before for s in stretches] == [(), ((0, 20),), ((0, 40),), ((0, 60),), ((0, 80),)]


def test_no_piece_holds_more_pairs_than_allowed() -> None:
    blocks = blocks_of([((0, 50), [(50, 100), (100, 140)])], Costs(pair=1e-9, call=1.0, most=1000))
    assert max(s.queries * s.keys for block in blocks for s in block.stretches) <= 1000
    assert torch.equal(seen(blocks, 140), visible(sequences(torch.Generator(), [(50, [50, 40])])))


@pytest.mark.parametrize("costs", [TOGETHER, Costs(0.01, 1.0, 10**9), Costs(0.3, 1.0, 10**9), Costs(0.01, 9.0, 300)])
def test_everybody_sees_what_they_should_however_the_row_is_cut(costs: Costs) -> None:
    draw = torch.Generator().manual_seed(0)
    of = sequences(draw, [(3, [5, 1, 9]), (1, [1]), (12, [4]), (7, [2, 2, 2, 30]), (5, [8])])
    grid = lay_flat(of, costs)
    assert torch.equal(seen(grid.blocks, grid.ids.numel()), visible(of))


@pytest.mark.parametrize("costs", [TOGETHER, Costs(0.01, 1.0, 10**9), Costs(0.3, 1.0, 10**9)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_and_its_gradients_are_those_of_the_formula(costs: Costs, heads: tuple[int, int]) -> None:
    """Against softmax(scale Q K^T) V over the whole row with a mask, in float64 for both but for the keys' and values'
    gradients, which are added up in float32 (relative 6e-8 a term)."""
    draw = torch.Generator().manual_seed(1)
    of = sequences(draw, [(3, [5, 1, 9]), (12, [4]), (7, [2, 2, 13])])
    grid, (count_q, count_k), d = lay_flat(of, costs), heads, 8
    n = grid.ids.numel()
    # strided as a model's are: [1, N, heads, d] turned round
    q, k, v = (
        torch.randn(1, n, h, d, generator=draw, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for h in (count_q, count_k, count_k)
    )
    out = attend(q, k, v, grid.blocks, 0.3)
    weights = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))

    repeated = (x.repeat_interleave(count_q // count_k, dim=1) for x in (k, v))
    keys, values = repeated
    scores = (0.3 * q @ keys.transpose(2, 3)).masked_fill(~visible(of), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
