"""Checkpoints: a folder exists as one when its manifest does. The manifest names every file with size and hash, and is
written last and synced, so a torn checkpoint is never seen, on any file system. Tensors are safetensors, the rest is
JSON; nothing is pickled.

Of several ranks, rank 0 writes what all of them have alike. A tensor that is spread over ranks stands in each rank's
state as its `Piece`, goes into that rank's own file, and comes back as a `Spread`, of which any rank of any number of
ranks reads the range that it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf.files import sync, write_atomic
from rlhf.saved import MANIFEST, whole

if TYPE_CHECKING:
    from rlhf.world import World

_FORMAT = 1
_TENSOR = "$tensor"
_SPREAD = "$spread"
_PLAIN = "$plain"
"""Wraps a dict of the user's own whose only key is one of these three."""


@attrs.frozen(eq=False)
class Piece:
    """This rank's part of a tensor that is spread over ranks: a run of its elements, in row-major order."""

    tensor: torch.Tensor  # [n], may be empty
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    """Where the piece begins in the flattened whole."""


@attrs.frozen(eq=False)
class Spread:
    """A tensor that was saved in pieces. Nothing is read until it is asked for."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, Path, str], ...]
    """(first element, the one after the last, file, name in the file), in order, without a hole."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened whole, [stop - start]."""
        found = []
        for first, last, path, name in self.parts:
            if first < stop and start < last:
                with safe_open(path, framework="pt") as file:
                    found.append(file.get_slice(name)[max(start - first, 0) : min(stop, last) - first])
        if not found:
            _, _, path, name = self.parts[0]
            with safe_open(path, framework="pt") as file:
                found.append(file.get_slice(name)[0:0])  # of its dtype
        return torch.cat(found)

    def whole(self) -> torch.Tensor:
        """All of it, in its shape."""
        whole = self.read(0, math.prod(self.shape))
        return whole.reshape(self.shape)


def save(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    heldout: Mapping[str, float] | None = None,
    world: World | None = None,
) -> Path:
    """Write a checkpoint; returns its folder. Called on every rank, with a folder that they share.

    Args:
        state: part -> nested dicts and lists of JSON values, tensors and pieces. Rank 0's is what is kept; of the
            others', the pieces, under the same names.
    """
    folder = root / f"step-{step:06d}"
    rank = 0 if world is None else world.rank
    if rank == 0:
        if folder.exists():  # torn, or of a run that went back beyond it
            remove(folder)
        folder.mkdir(parents=True)
    if world is not None:
        world.barrier()
    pieces = {
        f"{part}{where}@{piece.start}": piece.tensor.detach().cpu().contiguous()
        for part, content in state.items()
        for where, piece in _pieces(content, "")
        if piece.tensor.numel()
    }
    written: dict[str, dict[str, Any]] = {}
    if pieces:
        own = folder / f"rank-{rank}.safetensors"
        save_file(_unshared(pieces), own)
        written[own.name] = _entry(own)
    everybody = [written] if world is None else world.gather(written)
    if rank == 0:
        _save_common(folder, step, state, heldout, {name: entry for one in everybody for name, entry in one.items()})
        sync(root)
    if world is not None:
        world.barrier()  # nobody goes on before it is whole
    return folder


def _save_common(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    heldout: Mapping[str, float] | None,
    files: dict[str, dict[str, Any]],
) -> None:
    tree: dict[str, Any] = {}
    for part, content in state.items():
        tensors: dict[str, torch.Tensor] = {}
        tree[part] = to_json(content, "", tensors)
        if tensors:
            save_file(_unshared(tensors), folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps(tree), encoding="utf-8")
    for path in sorted(folder.iterdir()):
        if path.name not in files:  # those of ranks were hashed by who wrote them
            files[path.name] = _entry(path)
    manifest = {"format": _FORMAT, "step": step, "heldout": heldout, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on disk when this returns."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _pieces(value: Any, where: str) -> Iterator[tuple[str, Piece]]:
    if isinstance(value, Piece):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _pieces(item, f"{where}/{_escaped(str(key))}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _pieces(item, f"{where}/{i}")


def load(folder: Path) -> dict[str, Any]:
    """Read a checkpoint back, every file checked against the manifest first.

    Raises:
        ValueError: a file is missing, torn or edited; names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']!r}, and this version reads {_FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
        if "state.json" not in expected:
            raise ValueError("it names no state.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: is no manifest: {error}") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path}: is torn: {path.stat().st_size} bytes, the manifest says {size}")
        if _hash(path) != digest:
            raise ValueError(f"{path}: was changed: its hash is not the manifest's")
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    parts = _parts_of_ranks(folder, [name for name in expected if name.startswith("rank-")])
    state = {}
    for part, content in tree.items():
        place = folder / f"{part}.safetensors"
        spread = {name[len(part) :]: found for name, found in parts.items() if name.startswith(f"{part}/")}
        try:
            state[part] = from_json(content, load_file(place) if place.name in expected else {}, spread)
        except KeyError as error:
            raise ValueError(
                f"{folder / MANIFEST}: was changed: no file of it holds tensor {error} of {part}"
            ) from error
    return state


_Part = tuple[int, int, Path, str]


def _parts_of_ranks(folder: Path, names: Sequence[str]) -> dict[str, list[_Part]]:
    """Tensor -> its pieces, in order."""
    found: dict[str, list[_Part]] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                tensor, _, start = key.rpartition("@")
                size = file.get_slice(key).get_shape()[0]
                found.setdefault(tensor, []).append((int(start), int(start) + size, folder / name, key))
    return {tensor: sorted(parts) for tensor, parts in found.items()}


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that half a deletion is no checkpoint either."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def prune(root: Path, newest: int, keep: int, best: int | None) -> None:
    """Keep the `keep` newest up to step `newest`, which was just saved, and the best step besides.

    Later ones go: they were refused when the run resumed from an earlier one, and must not stand for good ones here.
    """
    found = whole(root)
    newest_steps = [saved.step for saved in found if saved.step <= newest][-keep:]
    for saved in found:
        if saved.step not in newest_steps and saved.step != best:
            remove(saved.path)


def to_json(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON holds of a state; its tensors are put into `tensors`, by where they are."""
    if isinstance(value, Piece):
        return {_SPREAD: {"name": where, "shape": list(value.shape)}}
    if isinstance(value, torch.Tensor):
        tensors[where] = value.detach().cpu().contiguous()
        return {_TENSOR: where}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"state {where!r}: keys must be text, so that they come back as they were")
        taken = {key: to_json(item, f"{where}/{_escaped(key)}", tensors) for key, item in value.items()}
        return {_PLAIN: taken} if set(value) in ({_TENSOR}, {_SPREAD}, {_PLAIN}) else taken
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"state {where!r} is a {type(value).__name__}: only JSON values and tensors can be kept")


def _escaped(key: str) -> str:
    """As in a JSON pointer, so that `{"a": {"b": ...}}` and `{"a/b": ...}` stay two tensors."""
    return key.replace("~", "~0").replace("/", "~1")


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file format refuses tensors that share memory: all but the first of them are copied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


def from_json(
    value: Any, tensors: Mapping[str, torch.Tensor], spread: Mapping[str, Sequence[_Part]] | None = None
) -> Any:
    """The inverse of `to_json`. `spread`: the pieces of what ranks saved, by where it is."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_SPREAD}:
            return _joined(value[_SPREAD]["name"], tuple(value[_SPREAD]["shape"]), spread or {})
        if set(value) == {_PLAIN}:
            value = value[_PLAIN]
        return {key: from_json(item, tensors, spread) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item, tensors, spread) for item in value]
    return value


def _joined(name: str, shape: tuple[int, ...], spread: Mapping[str, Sequence[_Part]]) -> Spread:
    end = 0
    for first, last, _, _ in spread[name]:
        if first != end:
            raise KeyError(f"{name}, elements {end} to {first}")
        end = last
    if end != math.prod(shape):
        raise KeyError(f"{name}, elements {end} to {math.prod(shape)}")
    return Spread(shape, tuple(spread[name]))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
