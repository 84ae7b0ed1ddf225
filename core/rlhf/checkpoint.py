"""Checkpoints: a folder exists as one when its manifest does. The manifest names every file with size and hash, and is
written last and synced, so a torn checkpoint is never seen, on any file system. Tensors are safetensors, the rest is
JSON; nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
_FORMAT = 1
_TENSOR = "$tensor"
_PLAIN = "$plain"
"""Wraps a dict of the user's own whose only key is one of these two."""
_FOLDER = re.compile(r"step-(\d{6,})")


@attrs.frozen
class Saved:
    """A whole checkpoint on disk."""

    step: int
    path: Path
    heldout: Mapping[str, float] | None


def save(root: Path, step: int, state: Mapping[str, Any], heldout: Mapping[str, float] | None = None) -> Path:
    """Write a checkpoint; returns its folder. `state`: part -> nested dicts and lists of JSON values and tensors."""
    folder = root / f"step-{step:06d}"
    if folder.exists():  # torn, or of a run that went back beyond it
        remove(folder)
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {}
    for part, content in state.items():
        tensors: dict[str, torch.Tensor] = {}
        tree[part] = _take_tensors(content, "", tensors)
        if tensors:
            save_file(_unshared(tensors), folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps(tree), encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": _hash(path)}
        _sync(path)
    manifest = {"format": _FORMAT, "step": step, "heldout": heldout, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    _sync(root)
    return folder


def whole(root: Path) -> list[Saved]:
    """The checkpoints under a folder that have a manifest, oldest first. Their files are not checked here."""
    found = []
    for folder in root.glob("step-*") if root.is_dir() else ():
        match = _FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            try:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                heldout = manifest.get("heldout")
            except (ValueError, AttributeError):
                heldout = None  # an edited manifest: `load` refuses it by name
            found.append(Saved(int(match.group(1)), folder, heldout if isinstance(heldout, dict) else None))
    return sorted(found, key=lambda saved: saved.step)


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
    state = {}
    for part, content in tree.items():
        place = folder / f"{part}.safetensors"
        try:
            state[part] = _give_tensors(content, load_file(place) if place.name in expected else {})
        except KeyError as error:
            raise ValueError(
                f"{folder / MANIFEST}: was changed: no file of it holds tensor {error} of {part}"
            ) from error
    return state


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


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is seen whole or not at all, and stays after a power cut."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def _take_tensors(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[where] = value.detach().cpu().contiguous()
        return {_TENSOR: where}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"state {where!r}: keys must be text, so that they come back as they were")
        taken = {key: _take_tensors(item, f"{where}/{_escaped(key)}", tensors) for key, item in value.items()}
        return {_PLAIN: taken} if set(value) in ({_TENSOR}, {_PLAIN}) else taken
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
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


def _give_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_PLAIN}:
            value = value[_PLAIN]
        return {key: _give_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_give_tensors(item, tensors) for item in value]
    return value


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
