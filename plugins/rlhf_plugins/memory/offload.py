"""Frozen weights that visit the device while their role scores, and lie elsewhere the rest of the time.

A role that is frozen is needed for a few forwards a step: the reference and the judges have nothing to do while the
policy samples and learns. Between visits its weights are in the host's memory, or in a file that is mapped into memory
for the visit. A visit brings the same bits back, so results don't change; what it costs is the way there, once for all
forwards of a score.

Left out: bringing the next layer while one computes. That would need less device memory than the whole module.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.api import Context, LoadSpec, MemoryStrategy, RunError
from rlhf_plugins.memory import OffloadConfig


class Shelf(Protocol):
    """Where weights lie between visits."""

    def put(self, weights: Sequence[Tensor]) -> None:
        """Take them, once. Afterwards nothing of them is needed where they were."""

    def fetch(self, device: torch.device) -> list[Tensor]:
        """All of them on the device, in the order they were put."""


class HostShelf:
    """The host's memory: pinned where there is a GPU, so that copies need no second one. Untested on a GPU."""

    def put(self, weights: Sequence[Tensor]) -> None:
        pinned = torch.cuda.is_available()
        self._weights = [w.cpu().pin_memory() if pinned else w.to("cpu", copy=True) for w in weights]

    def fetch(self, device: torch.device) -> list[Tensor]:
        return [weight.to(device, non_blocking=True, copy=True) for weight in self._weights]


class DiskShelf:
    """A safetensors file, mapped for a visit. On a CPU nothing is copied: pages are read as they are used, and are the
    kernel's to drop, not the process's."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def put(self, weights: Sequence[Tensor]) -> None:
        """
        Raises:
            RunError: the file can't be written.
        """
        try:
            descriptor, name = tempfile.mkstemp(prefix="rlhf-offload-", suffix=".safetensors", dir=self._folder)
            os.close(descriptor)
            self._path = Path(name)
            save_file({str(i): weight.detach().cpu().contiguous() for i, weight in enumerate(weights)}, self._path)
        except OSError as error:
            raise RunError(f"--mem offload: {error}; give --mem.offload.folder a place with room") from error
        self._count = len(weights)
        self._file = self._path.open("rb")  # as long as the shelf is
        opened = Path(f"/proc/self/fd/{self._file.fileno()}")
        if opened.exists():  # its name can go at once: the file lives as long as it is open, however the run ends
            self._path.unlink()
            self._path = opened

    def fetch(self, device: torch.device) -> list[Tensor]:
        with safe_open(self._path, framework="pt") as file:
            return [file.get_tensor(str(i)).to(device) for i in range(self._count)]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
            if self._path.suffix:  # where a file had to keep its name
                self._path.unlink(missing_ok=True)


class Offload(MemoryStrategy):
    """See the module."""

    config: OffloadConfig

    def __init__(self, config: OffloadConfig, context: Context) -> None:
        super().__init__(config, context)
        self._visits = 0
        self._shelf: Shelf | None = None

    def wrap(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """Put the module's weights away until its first visit. Buffers stay: they are small."""
        self._shelf = self._shelf or self._made(torch.device(spec.device))
        self._device = torch.device(spec.device)
        weights = _weights(module)
        self._shelf.put([weight.data for weight in weights])
        _let_go(weights)
        return module

    def visit(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """See `rlhf.api.MemoryStrategy`."""
        return self._visit(module)

    @contextlib.contextmanager
    def _visit(self, module: nn.Module) -> Iterator[None]:
        assert self._shelf is not None
        weights = _weights(module)
        if not self._visits:
            for weight, there in zip(weights, self._shelf.fetch(self._device), strict=True):
                weight.data = there
        self._visits += 1
        try:
            yield
        finally:
            self._visits -= 1
            if not self._visits:
                _let_go(weights)

    def _made(self, device: torch.device) -> Shelf:
        to = ("disk" if device.type == "cpu" else "host") if self.config.to == "auto" else self.config.to
        return HostShelf() if to == "host" else DiskShelf(self.config.folder)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Each once, though it may be tied to another."""
    return list(module.parameters())


def _let_go(weights: Sequence[nn.Parameter]) -> None:
    """Nothing stays where they were, and a forward outside a visit fails."""
    for weight in weights:
        weight.data = weight.data.new_empty(0)
