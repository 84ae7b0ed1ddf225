"""Weights on their way to another process that has the same GPU: they stay in its memory, and what is sent is how to
find them there (CUDA IPC). **Not run on a GPU yet.**

The handle travels as plain values: torch would pickle them. One is opened once: torch counts who has opened a block,
and gives the memory of one that an engine had not let go of when it was lost to nobody else.
"""

from __future__ import annotations

import base64

import attrs
import torch
from torch import Tensor

from rlhf_plugins.engines.vllm import wire
from rlhf_plugins.engines.vllm.packing import Place, text_of


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
class Probe:
    """Does the server see this buffer, with this text at its beginning?"""

    handle: Handle
    content: str


@attrs.frozen
class Laid:
    """Some of the weights, in a buffer; of one load all of the same handle are the same buffer, filled anew."""

    load: str
    handle: Handle
    places: tuple[Place, ...]


def seen(probe: Probe) -> bool:
    """Whether this process can read the probe's buffer."""
    try:
        return text_of(imported(probe.handle)[: len(probe.content.encode())]) == probe.content
    except (wire.WireError, RuntimeError, AssertionError, ValueError):  # no GPU, another one, or not allowed
        return False


class Opened:
    """A buffer of the trainer's, while a load lasts."""

    def __init__(self) -> None:
        self._handle: Handle | None = None
        self._buffer: Tensor | None = None

    def copied(self, handle: Handle, size: int) -> Tensor:
        """Its first bytes, uint8 [size], in the same GPU's memory.

        Raises:
            WireError: there is no such buffer.
        """
        if self._handle != handle or self._buffer is None:
            self.close()
            try:
                self._handle, self._buffer = handle, imported(handle)
            except (RuntimeError, AssertionError, ValueError) as error:
                raise wire.WireError(f"the buffer on GPU {handle.gpu[:80]} can't be opened: {error}") from error
        if size > len(self._buffer):
            raise wire.WireError(f"{size} bytes don't lie in a buffer of {len(self._buffer)}")
        copy = self._buffer[:size].clone()
        settled(copy)
        return copy

    def close(self) -> None:
        """Let it go."""
        self._handle = self._buffer = None


def settled(buffer: Tensor) -> None:
    """Wait until the GPU has done what was asked of it."""
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()


def exported(buffer: Tensor) -> Handle:
    """How another process finds a buffer: uint8 [n], all of its storage."""
    from torch.multiprocessing.reductions import reduce_tensor

    settled(buffer)
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
