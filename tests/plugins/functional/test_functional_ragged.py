"""Ragged-flat helpers: worked values, empty rows, gradients, and sums that do not depend on threads or neighbours."""

from __future__ import annotations

import pytest
import torch

from rlhf_plugins.functional import ragged

LENGTHS = torch.tensor([2, 0, 3])
X = torch.tensor([1.0, 2.0, 10.0, 20.0, 40.0])


def test_segment_sum_by_hand() -> None:
    assert ragged.segment_sum(X, LENGTHS).tolist() == [3.0, 0.0, 70.0]  # small integers: exact


def test_segment_sum_counts_bools() -> None:
    own = torch.tensor([True, False, True, True, False])
    counts = ragged.segment_sum(own, LENGTHS)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 0, 2]


def test_segment_sum_raises_half_precision() -> None:
    total = ragged.segment_sum(torch.ones(1000, dtype=torch.bfloat16), torch.tensor([1000]))
    assert total.dtype == torch.float32
    assert total.item() == 1000.0  # bfloat16 would stop at 256


def test_segment_sum_adds_in_order_whatever_the_threads_and_neighbours() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([70_000, 1, 0, 129_999])
    expected = []
    for row in torch.split(x, lengths.tolist()):
        total = torch.tensor(0.0)
        for term in row:
            total = total + term
        expected.append(total.item())
    threads = torch.get_num_threads()
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            assert ragged.segment_sum(x, lengths).tolist() == expected  # bitwise: same terms in the same order
    finally:
        torch.set_num_threads(threads)
    alone = ragged.segment_sum(x[:70_000], torch.tensor([70_000]))
    assert alone.item() == expected[0]


def test_segment_sum_gradient_goes_to_the_own_row() -> None:
    x = X.clone().requires_grad_()
    (x_grad,) = torch.autograd.grad((ragged.segment_sum(x, LENGTHS) * torch.tensor([1.0, 5.0, 7.0])).sum(), x)
    assert x_grad.tolist() == [1.0, 1.0, 7.0, 7.0, 7.0]


def test_repeat_by_hand() -> None:
    assert ragged.repeat(torch.tensor([1.0, 2.0, 3.0]), LENGTHS).tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]


def test_pad_by_hand() -> None:
    assert ragged.pad(X, LENGTHS, -1.0).tolist() == [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [10.0, 20.0, 40.0]]


def test_pad_bool() -> None:
    own = torch.tensor([True, False, True, True, False])
    padded = ragged.pad(own, LENGTHS, False)
    assert padded.tolist() == [[True, False, False], [False] * 3, [True, True, False]]


def test_unpad_by_hand_ignores_padding_and_extra_columns() -> None:
    rows = torch.tensor([[1.0, 2.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0], [10.0, 20.0, 40.0, 9.0]])
    assert ragged.unpad(rows, LENGTHS).tolist() == X.tolist()


def test_pad_and_unpad_gradients() -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged.pad(x, LENGTHS, 3.0).square(), (x,))
    rows = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: ragged.unpad(rows, LENGTHS).square(), (rows,))


def test_last_index_by_hand() -> None:
    assert ragged.last_index(torch.tensor([2, 1, 3])).tolist() == [1, 2, 5]


def test_last_index_with_mask_is_the_last_own_token() -> None:
    own = torch.tensor([True, False, True, False, True, False])
    assert ragged.last_index(torch.tensor([2, 1, 3]), own).tolist() == [0, 2, 4]


def test_last_index_names_rows_without_one() -> None:
    with pytest.raises(ValueError, match=r"responses \[1\] have"):  # not the first one, whose last token is at 0
        ragged.last_index(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"\[1\]"):
        ragged.last_index(LENGTHS)
    with pytest.raises(ValueError, match=r"\[0\]"):
        ragged.last_index(torch.tensor([1, 1]), torch.tensor([False, True]))


def test_no_responses() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0)
    assert ragged.segment_sum(x, none).shape == (0,)
    assert ragged.repeat(x, none).shape == (0,)
    assert ragged.pad(x, none, 0.0).shape == (0, 0)
    assert ragged.unpad(torch.zeros(0, 0), none).shape == (0,)
    assert ragged.last_index(none).shape == (0,)


def test_only_empty_responses() -> None:
    assert ragged.segment_sum(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert ragged.pad(torch.zeros(0), torch.tensor([0, 0]), 0.0).shape == (2, 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([2, 2]), "x \\[4\\]"),
        (torch.tensor([6, -1]), ">= 0"),
        (torch.tensor([2.0, 3.0]), "int64"),
        (torch.tensor([[2, 3]]), "int64 \\[B\\]"),
    ],
)
def test_wrong_lengths_are_refused(lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged.segment_sum(X, lengths)
    with pytest.raises(ValueError, match=message):
        ragged.pad(X, lengths, 0.0)
    if "x" in message:
        return  # they would do for what takes no flat tensor
    of_each = torch.zeros(lengths.shape[0])
    for refuse in (lambda: ragged.repeat(of_each, lengths), lambda: ragged.unpad(torch.zeros(2, 9), lengths)):
        with pytest.raises(ValueError, match=message):
            refuse()
    with pytest.raises(ValueError, match=message):
        ragged.last_index(lengths)


def test_too_narrow_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r">= 3"):
        ragged.unpad(torch.zeros(3, 2), LENGTHS)
    for shape in ((3, 3, 1), (2, 3), (4, 3)):
        with pytest.raises(ValueError, match=r"expected x \[3, >= 3\]"):
            ragged.unpad(torch.zeros(shape), LENGTHS)


def test_broadcastable_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        ragged.check_same_length(a=torch.zeros(3), b=torch.zeros(1))
    with pytest.raises(ValueError, match="one-dimensional"):
        ragged.check_same_length(a=torch.zeros(3, 1), b=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"x \[1\], lengths \[3\]"):
        ragged.repeat(torch.zeros(1), LENGTHS)


def test_integer_and_misfit_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        ragged.own_tokens(torch.tensor([1, 0]), torch.zeros(2))
    with pytest.raises(ValueError, match="bool"):
        ragged.own_tokens(torch.tensor([True]), torch.zeros(2))


def test_after_tokens_by_hand() -> None:
    """Before the tokens 1, 2, 10, 20, 40; after each response's last 3 and 50."""
    lengths, last = torch.tensor([2, 3]), torch.tensor([3.0, 50.0])
    assert ragged.after_tokens(X, last, lengths).tolist() == [2.0, 3.0, 20.0, 40.0, 50.0]
    assert ragged.after_tokens(X[:0], last[:0], lengths[:0]).tolist() == []
    x, end = X.clone().requires_grad_(), last.clone().requires_grad_()
    (ragged.after_tokens(x, end, lengths) * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 0.0, 3.0, 4.0]
    assert end.grad is not None and end.grad.tolist() == [2.0, 5.0]


def test_after_tokens_refuses_what_has_no_token() -> None:
    with pytest.raises(ValueError, match="a token at least"):
        ragged.after_tokens(X, torch.zeros(3), LENGTHS)
    with pytest.raises(ValueError, match="one length"):
        ragged.after_tokens(X, torch.zeros(3), torch.tensor([2, 3]))
