"""Ragged-flat tensors: sums, spreading, padding and last tokens of responses laid end to end.

`lengths = [2, 0, 3]` with `x = [a, b, c, d, e]` are the responses `[a, b]`, `[]` and `[c, d, e]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_length(**named: Tensor) -> None:
    """Refuse tensors that are not all one-dimensional and equally long.

    Broadcasting would otherwise turn `[N]` against `[1]`, or `[B]` against `[B, 1]`, into a plausible number.

    Raises: ValueError, naming every tensor and its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected one-dimensional tensors of one length, given {given}")


def check_ragged(lengths: Tensor, **flat: Tensor) -> None:
    """Refuse `lengths` that are not int64 `[B]` and nonnegative, and flat tensors that are not `[lengths.sum()]`.

    Raises: ValueError, saying what was given and what was expected.
    """
    if lengths.dim() != 1 or lengths.dtype != torch.int64:
        raise ValueError(f"expected lengths int64 [B], given {lengths.dtype} {list(lengths.shape)}")
    if bool((lengths < 0).any()):
        raise ValueError(f"expected lengths >= 0, given {lengths.tolist()}")
    n = int(lengths.sum())
    for name, tensor in flat.items():
        if tensor.dim() != 1 or tensor.shape[0] != n:
            raise ValueError(f"expected {name} [{n}] (the sum of lengths), given {list(tensor.shape)}")


def own_tokens(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as bool `[N]`: itself after a check, or all True for None.

    mask: bool [N] or None. like: any tensor [N], for its length and device.
    Raises: ValueError if the mask is not bool or not as long as `like` (an integer mask would index, not select).
    """
    if mask is None:
        return torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
    if mask.dtype != torch.bool or mask.shape != like.shape:
        raise ValueError(f"expected mask torch.bool {list(like.shape)}, given {mask.dtype} {list(mask.shape)}")
    return mask


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half precision raised to float32: sums over tokens need more than bfloat16's 8 bits (256 + 1 is 256)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def after_tokens(values: Tensor, last: Tensor, lengths: Tensor) -> Tensor:
    """Read after each token what `values` holds before it: [N], differentiable.

    values: [N], before each token of responses of `lengths` (int64 [B], none empty). last: [B], after each one's last.
    Raises: ValueError if a shape differs or a response is empty.
    """
    check_ragged(lengths, values=values)
    check_same_length(last=last, lengths=lengths)
    if bool((lengths < 1).any()):
        raise ValueError(f"expected responses of a token at least, given lengths {lengths.tolist()}")
    ends = (lengths.cumsum(0) - 1).to(values.device)
    return torch.cat([values[1:], values[:1]]).index_put((ends,), last)


def repeat(x: Tensor, lengths: Tensor) -> Tensor:
    """Spread one value a response over the response's tokens: [B] -> [N], same unit; differentiable.

    Raises: ValueError if x and lengths are not both [B].
    """
    check_ragged(lengths)
    check_same_length(x=x, lengths=lengths)
    return torch.repeat_interleave(x, lengths)


def segment_sum(x: Tensor, lengths: Tensor) -> Tensor:
    """Sum over each response's tokens: [N] -> [B], same unit; differentiable; 0 for a response of no tokens.

    A sum, not a mean: the caller divides, and says by what.

    Terms are added one by one in token order on a CPU, so the result depends neither on the number of threads nor
    on the other responses. On CUDA `index_add_` uses atomics, whose order varies, unless
    `torch.use_deterministic_algorithms(True)`. Half-precision terms are summed and returned in float32; bools are
    counted in int64.

    Raises: ValueError if x is not [lengths.sum()].
    """
    check_ragged(lengths, x=x)
    x = x.long() if x.dtype == torch.bool else at_least_float32(x)
    response = repeat(torch.arange(lengths.shape[0], device=lengths.device), lengths)  # [N], index of the response
    return x.new_zeros(lengths.shape[0]).index_add(0, response, x)


def pad(x: Tensor, lengths: Tensor, value: float | bool) -> Tensor:
    """Rows of equal length: [N] -> [B, T], T = the longest length, `value` after each response's end; differentiable.

    Raises: ValueError if x is not [lengths.sum()].
    """
    check_ragged(lengths, x=x)
    return x.new_full((lengths.shape[0], _longest(lengths)), value).masked_scatter(_inside(lengths), x)


def unpad(x: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `pad`: [B, T] -> [N]; T may exceed the longest length; differentiable.

    Raises: ValueError if x is not two-dimensional, has another number of rows than lengths, or is too narrow.
    """
    check_ragged(lengths)
    if x.dim() != 2 or x.shape[0] != lengths.shape[0] or x.shape[1] < _longest(lengths):
        raise ValueError(f"expected x [{lengths.shape[0]}, >= {_longest(lengths)}], given {list(x.shape)}")
    return x[:, : _longest(lengths)][_inside(lengths)]


def last_index(lengths: Tensor, mask: Tensor | None = None) -> Tensor:
    """Index into the flat [N] of each response's last token, or with a mask of its last own token: -> int64 [B].

    Raises: ValueError naming the responses that have no (own) token: they have no last one.
    """
    check_ragged(lengths)
    n = int(lengths.sum())
    flat = torch.arange(n, device=lengths.device)  # [N]
    flat = torch.where(own_tokens(mask, flat), flat, -1)
    response = repeat(torch.arange(lengths.shape[0], device=lengths.device), lengths)  # [N]
    last = lengths.new_full((lengths.shape[0],), -1).scatter_reduce(0, response, flat, "amax")
    if bool((last < 0).any()):
        missing = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"responses {missing} have no token of the policy's own, so no last one; drop them first")
    return last


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.shape[0] else 0


def _inside(lengths: Tensor) -> Tensor:
    """bool [B, T]: True before each response's end."""
    return torch.arange(_longest(lengths), device=lengths.device)[None, :] < lengths[:, None]
