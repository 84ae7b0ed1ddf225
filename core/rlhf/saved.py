"""Which checkpoints a folder holds. Imports no torch: asked before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import attrs

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{6,})")


@attrs.frozen
class Saved:
    """A whole checkpoint on disk."""

    step: int
    path: Path
    heldout: Mapping[str, float] | None


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
