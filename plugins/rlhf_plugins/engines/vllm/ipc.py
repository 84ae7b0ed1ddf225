"""Weights on their way to another process that has the same GPU: they stay in its memory, and what is sent is how to
find them there (CUDA IPC). **Not run on a GPU yet.**

A bucket is packed into one buffer, which is filled anew once the other side has said that it has copied it out. The
handle travels as plain values: torch would pickle them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from rlhf_plugins.engines.vllm import wire

_ALIGN = 256
"""Bytes: where a tensor may begin in a buffer, whatever its type."""


@attrs.frozen
class Handle:
    """Of a buffer of bytes in a GPU's memory: what `torch.multiprocessing.reductions` makes of one; bytes in base64."""

    gpu: str
    """The device's UUID: another process may number it otherwise."""
    size: int
    """Bytes."""
    memory: str
    offset: int
    counter: str
    counter_offset: int
    event: str
    waits: bool


@attrs.frozen
class Place:
    """A tensor in a buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@attrs.frozen
class Probe:
    """Does the server see this buffer, with this text at its beginning?"""

    handle: Handle
    content: str


@attrs.frozen
class Bucket:
    """Some of the weights, in a buffer."""

    load: str
    handle: Handle
    places: tuple[Place, ...]


class Buffer:
    """Where weights are laid for the other process."""

    def __init__(self, device: str, size: int = wire.BUCKET) -> None:
        """size: bytes; one that is too small for a single tensor is replaced by a larger one."""
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._size = size

    def probe(self, content: str) -> Probe:
        """Lay a text."""
        text = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
        self._bytes[: len(text)].copy_(text)
        return Probe(exported(self._bytes), content)

    def buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Handle, tuple[Place, ...]]]:
        """Lay so many at once as there is room for. The other side must have copied them when the next is asked for."""
        places: list[Place] = []
        end = 0
        for name, tensor in weights:
            start = -(-end // _ALIGN) * _ALIGN
            if places and start + tensor.nbytes > self._size:
                yield exported(self._bytes), tuple(places)
                places, start = [], 0
            if start + tensor.nbytes > len(self._bytes):  # alone in it
                self._bytes = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self._bytes.device)
            place = Place(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start)
            _at(self._bytes, place).copy_(tensor.detach())
            places.append(place)
            end = start + tensor.nbytes
        if places:
            yield exported(self._bytes), tuple(places)


def seen(probe: Probe) -> bool:
    """Whether this process can read the probe's buffer."""
    try:
        text = imported(probe.handle)[: len(probe.content.encode())]
        return bytes(text.tolist()) == probe.content.encode()
    except (wire.WireError, RuntimeError, AssertionError, ValueError):  # no GPU, another one, or not allowed
        return False


def take(bucket: Bucket) -> dict[str, Tensor]:
    """Copies of what the buffer holds, in the same GPU's memory; the buffer is let go.

    Raises:
        WireError: the places aren't in it, or there is no such buffer.
    """
    try:
        found = imported(bucket.handle)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise wire.WireError(f"the buffer on GPU {bucket.handle.gpu[:80]} can't be opened: {error}") from error
    copies = {place.name: _at(found, place).clone() for place in bucket.places}
    _wait(found)
    return copies


def _at(buffer: Tensor, place: Place) -> Tensor:
    dtype = getattr(torch, place.dtype, None)
    if isinstance(dtype, torch.dtype) and min((place.start, *place.shape)) >= 0 and place.start % _ALIGN == 0:
        end = place.start + math.prod(place.shape) * dtype.itemsize
        if end <= len(buffer):
            return buffer[place.start : end].view(dtype).view(place.shape)
    raise wire.WireError(f"{place.name[:80]} is no {place.dtype[:20]} of shape {place.shape} in {len(buffer)} bytes")


def _wait(buffer: Tensor) -> None:
    """Until the GPU has done what was asked of it."""
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()


# Handles


def exported(buffer: Tensor) -> Handle:
    """How another process finds a buffer: uint8 [n], all of its storage."""
    from torch.multiprocessing.reductions import reduce_tensor

    _wait(buffer)
    _, values = reduce_tensor(buffer)
    device, memory, size, offset, _, counter, counter_offset, event, waits = values[6:]
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    return Handle(gpu, size, _text(memory), offset, _text(counter), counter_offset, _text(event), waits)


def imported(handle: Handle) -> Tensor:
    """The buffer, uint8 [n].

    Raises:
        WireError: this process has no such GPU.
        RuntimeError: CUDA can't open it.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if handle.gpu not in uuids:
        raise wire.WireError(f"this process has no GPU {handle.gpu[:80]}")
    if handle.size < 1 or handle.offset < 0 or handle.counter_offset < 0:
        raise wire.WireError("a handle of no buffer")
    found: Tensor = rebuild_cuda_tensor(
        Tensor, torch.Size([handle.size]), (1,), 0, torch.storage.TypedStorage, torch.uint8, uuids.index(handle.gpu),
        _bytes(handle.memory), handle.size, handle.offset, False, _bytes(handle.counter), handle.counter_offset,
        _bytes(handle.event), handle.waits,
    )  # fmt: skip
    return found


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise wire.WireError("a handle that is no base64") from error
