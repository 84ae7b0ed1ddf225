"""Weights on their way to another process: cut into buckets of a bounded size, each a safetensors file."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rlhf_plugins.engines.vllm import wire


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = wire.BUCKET) -> Iterator[dict[str, Tensor]]:
    """Copies on the CPU of what comes, so many bytes at once, or a single larger tensor. What they were copied from may
    be gone as soon as the next one is asked for."""
    found: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights:
        own = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        if found and held + own.nbytes > size:
            yield found
            found, held = {}, 0
        found[name] = own
        held += own.nbytes
    if found:
        yield found


class SharedFolder:
    """A folder in this host's shared memory, for this user alone."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=wire.PREFIX, dir=wire.SHARED_MEMORY))
        self._count = 0

    def probe(self, content: str) -> Path:
        """A file that says something which only who sees this very memory can read."""
        path = self.path / "probe"
        path.write_text(content)
        return path

    def write(self, bucket: Mapping[str, Tensor]) -> Path | None:
        """Write a bucket; None where there is no room for it. Containers often have 64 MB."""
        room = shutil.disk_usage(self.path).free
        if sum(tensor.nbytes for tensor in bucket.values()) + (16 << 20) > room:
            return None
        self._count += 1
        path = self.path / f"{self._count}.safetensors"
        save_file(dict(bucket), path)
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def to_bytes(bucket: Mapping[str, Tensor]) -> bytes:
    """A bucket as a body."""
    return save(dict(bucket))


def from_bytes(body: bytes) -> dict[str, Tensor]:
    """The other way.

    Raises:
        WireError: it is no safetensors.
    """
    try:
        return load_bytes(body)
    except Exception as error:  # safetensors has an exception of its own, which is none of ValueError
        raise wire.WireError(f"the body is no safetensors: {error}") from error


def take(path: str) -> dict[str, Tensor]:
    """The bucket in a file of shared memory, which is gone then; its pages are freed with the tensors.

    Raises:
        WireError: it is no such file.
    """
    file = checked(path)
    try:
        return load_file(file)
    except Exception as error:
        raise wire.WireError(f"{path} is no safetensors: {error}") from error
    finally:
        file.unlink(missing_ok=True)


def checked(path: str) -> Path:
    """A path that a client may name: a file of this user, in a folder that `SharedFolder` made.

    Raises:
        WireError: it is another one, or isn't there.
    """
    file = Path(path)
    right = str(file) == os.path.normpath(path) and file.parent.name.startswith(wire.PREFIX)
    if not right or str(file.parent.parent) != wire.SHARED_MEMORY:
        raise wire.WireError(f"{path} is not in a folder {wire.SHARED_MEMORY}/{wire.PREFIX}...")
    try:
        folder, found = file.parent.lstat(), file.lstat()
    except OSError as error:
        raise wire.WireError(f"{path} can't be read: {error.strerror}") from error
    mine = folder.st_uid == found.st_uid == os.getuid()
    if not (mine and stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(found.st_mode)):
        raise wire.WireError(f"{path} is no plain file of this user")
    return file
