"""Weights packed into one buffer of bytes, a bucket at a time, and taken out of it again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from rlhf_plugins.engines.vllm import wire

_ALIGN = 256
"""Bytes: where a tensor may begin in a buffer, whatever its type."""


@attrs.frozen
class Place:
    """A tensor in a buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Buffer:
    """Where weights are laid for another process, for one load."""

    def __init__(self, device: str, size: int = wire.BUCKET) -> None:
        """size: bytes; one that is too small for a single tensor is replaced by a larger one."""
        self.whole = torch.empty(size, dtype=torch.uint8, device=device)
        self._size = size

    def buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Tensor, tuple[Place, ...]]]:
        """Lay so many at once as there is room for: (what they take, uint8 [n]; where each is). It must have been taken
        when the next is asked for."""
        places: list[Place] = []
        end = 0
        for name, tensor in weights:
            start = -(-end // _ALIGN) * _ALIGN
            if places and start + tensor.nbytes > self._size:
                yield self.whole[:end], tuple(places)
                places, start = [], 0
            if start + tensor.nbytes > len(self.whole):  # alone in it
                self.whole = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self.whole.device)
            place = Place(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start)
            _at(self.whole, place).copy_(tensor.detach())
            places.append(place)
            end = start + tensor.nbytes
        if places:
            yield self.whole[:end], tuple(places)


def written(buffer: Tensor, text: str) -> Tensor:
    """The buffer, uint8 [n], with a text of n bytes in it."""
    return buffer.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def text_of(buffer: Tensor) -> str:
    """The other way."""
    return bytes(buffer.tolist()).decode(errors="replace")


def size_of(places: Sequence[Place]) -> int:
    """Bytes that a bucket takes.

    Raises:
        WireError: a place is none.
    """
    return max((place.start + _size(place) for place in places), default=0)


def taken(buffer: Tensor, places: Sequence[Place]) -> dict[str, Tensor]:
    """What lies in a buffer, uint8 [n]: views of it, each of which keeps all of it.

    Raises:
        WireError: a place isn't in it.
    """
    return {place.name: _at(buffer, place) for place in places}


def _at(buffer: Tensor, place: Place) -> Tensor:
    end = place.start + _size(place)
    if end > len(buffer):
        raise _no_place(place, f"in {len(buffer)} bytes")
    return buffer[place.start : end].view(getattr(torch, place.dtype)).view(place.shape)


def _size(place: Place) -> int:
    dtype = getattr(torch, place.dtype, None)
    if not isinstance(dtype, torch.dtype) or min((place.start, *place.shape)) < 0 or place.start % _ALIGN:
        raise _no_place(place, f"at {place.start}")
    return math.prod(place.shape) * dtype.itemsize


def _no_place(place: Place, where: str) -> wire.WireError:
    return wire.WireError(f"{place.name[:80]} is no {place.dtype[:20]} of shape {place.shape} {where}")
