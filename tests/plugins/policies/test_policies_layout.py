"""Rows, rectangles, positions and masks, by hand."""

from __future__ import annotations

import torch

from rlhf.sequences import Sequences
from rlhf_plugins.policies.layout import Costs, lay_out

CHEAP = Costs(pair=0.0, call=0.0)


def sequences() -> Sequences:
    """Prompt [1, 2] with responses [3, 4] and [5]; prompt [6] with [7, 8, 9]."""
    prompts = [torch.tensor([1, 2]), torch.tensor([6])]
    responses = [torch.tensor([3, 4]), torch.tensor([7, 8, 9]), torch.tensor([5])]
    return Sequences.of(prompts, responses, prompt_of=[0, 1, 0])


def test_a_shared_row_by_hand() -> None:
    (grid,) = lay_out(sequences(), share=True, single=True, costs=CHEAP)
    assert grid.ids.tolist() == [[6, 7, 8, 9, 9], [1, 2, 3, 4, 5]]  # the shorter row is filled with its last token
    assert grid.positions[1].tolist() == [0, 1, 2, 3, 2]  # the second response stands behind the prompt too
    assert grid.mask is not None
    assert grid.mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # 5 sees 1 2 and itself, not 3 4
    ]
    assert grid.mask[0, 0, :4, :4].int().tolist() == torch.ones(4, 4).tril().int().tolist()
    # row 0 (sequence 1, tokens 2 to 4): before 7 8 9 stand 6 7 8. Row 1: before 3 4 stand 2 3; before 5 stands 2
    assert dict(zip(grid.token.tolist(), grid.before.tolist(), strict=True)) == {2: 0, 3: 1, 4: 2, 0: 6, 1: 7, 5: 6}
    assert dict(zip(grid.sequence.tolist(), grid.last.tolist(), strict=True)) == {1: 3, 0: 8, 2: 9}


def test_plain_rows_need_no_mask_and_go_by_length() -> None:
    grids = lay_out(sequences(), share=False, single=False, costs=Costs(pair=0.0, call=0.5))
    assert [grid.ids.tolist() for grid in grids] == [[[1, 2, 5]], [[1, 2, 3, 4], [6, 7, 8, 9]]]
    assert all(grid.mask is None for grid in grids)


def test_calls_are_weighed_against_padding() -> None:
    """Joining both rectangles costs one token of padding and saves one call."""
    assert len(lay_out(sequences(), share=False, single=False, costs=Costs(pair=0.0, call=0.9))) == 2
    assert len(lay_out(sequences(), share=False, single=False, costs=Costs(pair=0.0, call=1.1))) == 1
    assert len(lay_out(sequences(), share=False, single=True, costs=CHEAP)) == 1


def of_one_prompt(prompt: int, response: int, count: int) -> Sequences:
    ids = [torch.ones(response, dtype=torch.long)] * count
    return Sequences.of([torch.ones(prompt, dtype=torch.long)], ids, prompt_of=[0] * count)


def rows(of: Sequences, pair: float) -> int:
    return sum(len(grid.ids) for grid in lay_out(of, share=None, single=False, costs=Costs(pair=pair, call=0.0)))


def test_responses_share_a_prompt_as_long_as_that_costs_less() -> None:
    """Costs by hand, T tokens a row: T + pair T^2, of plain rows T + 0.75 pair T^2.

    100 / 100 tokens, 4 responses, pair 1/1000: one row of 500 costs 750; two of 300, 780; four plain ones of 200, 920.
    At pair 1/100: one row 3000; two rows 2400; four plain ones 4 (200 + 300) = 2000.
    """
    assert rows(of_one_prompt(100, 100, 4), pair=1 / 1000) == 1
    assert rows(of_one_prompt(100, 100, 4), pair=1 / 100) == 4
    # pair 1/300: one row 500 + 833 = 1333; two 2 (300 + 300) = 1200; four 4 (200 + 100) = 1200; three in between 1185
    assert rows(of_one_prompt(100, 100, 4), pair=1 / 400) == 2


def test_costs_by_hand() -> None:
    """100 tokens: 100 products, and pairs at .001 each: 10 where a mask is used, 7.5 in a causal kernel."""
    costs = Costs(pair=0.001, call=0.0)
    assert (costs.row(100, shared=True), costs.row(100, shared=False)) == (110.0, 107.5)


def test_there_are_no_more_rows_than_responses() -> None:
    """By the formula three rows would cost less than two: T + .75 T^2 at T = 1 + 200/3 and 101: 10506 and 15504."""
    assert rows(of_one_prompt(1, 100, 2), pair=1.0) == 2


def test_every_token_is_read_exactly_once_whatever_the_layout() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (40,), generator=draw).tolist()
    of = Sequences.of(
        [torch.ones(n, dtype=torch.long) for n in (3, 50, 17)],
        [torch.ones(n, dtype=torch.long) for n in sizes],
        prompt_of=[i % 3 for i in range(40)],
    )
    for share in (True, False, None):
        grids = lay_out(of, share=share, single=False, costs=Costs(pair=1e-3, call=10.0))
        assert sorted(torch.cat([grid.token for grid in grids]).tolist()) == list(range(sum(sizes)))
        assert sorted(torch.cat([grid.sequence for grid in grids]).tolist()) == list(range(40))
