"""What a name stands for that is no file or folder here: a slip, or a model or data set of the Hugging Face hub.

The hub is asked once, with a short deadline, and only after its cache on this disk. Libraries that load from it try for
minutes before they give up, and then speak of their own arguments.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rlhf.options import nearest

Kind = Literal["model", "dataset"]

DEADLINE = 5.0
"""Seconds for the hub to answer whether it has a name."""
_FILES = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".tar",
          ".xlsx", ".yaml", ".yml", ".py", ".md", ".pkl", ".bin", ".pt",
          ".pth", ".ckpt", ".safetensors", ".gguf")  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_id(text: str, endings: tuple[str, ...] = ()) -> bool:
    """Whether a text can be the hub's name of something, and doesn't rather look like a path.

    Args:
        endings: of file names, beside the usual ones.
    """
    return bool(_ID.fullmatch(text)) and not text.lower().endswith((*_FILES, *endings))


def near(path: str, wanted: Callable[[Path], bool] = Path.exists) -> str:
    """ "did you mean ...? ", for a path that isn't there and one like it that is; else empty."""
    place = Path(path).expanduser()
    if place.exists():  # it is there, and is something else
        return ""
    missing = next((p for p in (*reversed(place.parents), place) if not p.exists()), place)
    rest = place.relative_to(missing)
    try:
        names = [entry.name for entry in os.scandir(missing.parent) if not entry.name.startswith(".")]
    except OSError:
        return ""
    fitting = [name for name in names if wanted(missing.parent / name / rest)]
    # By their stems: a common ending makes nothing alike. Of one stem, the same ending goes first.
    stems = {name.partition(".")[0]: name for name in sorted(fitting, key=lambda n: Path(n).suffix == missing.suffix)}
    stem = nearest(missing.name.partition(".")[0], stems, 0.6)
    return f"did you mean {missing.parent / stems[stem] / rest}? " if stem else ""


def cached(kind: Kind, name: str) -> Path | None:
    """The newest snapshot of it in the hub's cache on this disk."""
    repository = _home("HF_HUB_CACHE", "hub") / f"{kind}s--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


@functools.cache
def unavailable(kind: Kind, name: str) -> str:
    """Why a model or data set can't be had, to be read after "it isn't here, and"; empty where it can."""
    if cached(kind, name) or (kind == "dataset" and _prepared(name)):
        return ""
    what = "model" if kind == "model" else "data set"
    flag = next(
        (flag for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if _is_set(flag)), ""
    )
    if flag:
        return f"the hub's cache has no such {what} ({flag} is set, so the hub is not asked)"
    found: list[str] = []
    # A thread, since looking up a host's name heeds no timeout.
    asking = threading.Thread(target=lambda: found.append(_ask(kind, name, what)), daemon=True)
    asking.start()
    asking.join(DEADLINE + 1)
    return found[0] if found else f"the hub can't be reached (no answer in {DEADLINE:g} s)"


def _ask(kind: Kind, name: str, what: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=DEADLINE)
    except GatedRepoError:  # it is there; what the user may read is told when it is loaded
        return ""
    except RepositoryNotFoundError:
        return f"the hub has no such {what}, or a private one (then: hf auth login)"
    except HFValidationError:
        return f"it is no name of a {what} of the hub"
    except HfHubHTTPError as error:
        return f"the hub can't be asked: {str(error).splitlines()[0]}"
    except Exception as error:  # of the network: its libraries' errors have no class in common
        return f"the hub can't be reached ({type(error).__name__}: {error})"
    return ""


def _prepared(name: str) -> bool:
    """Whether the `datasets` library has it in its own cache, where names are spelt in its own way."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    try:
        places = list(os.scandir(_home("HF_DATASETS_CACHE", "datasets")))
    except OSError:
        return False
    return any(re.sub(r"[^a-z0-9]", "", place.name.lower()) == wanted for place in places)


def _home(variable: str, folder: str) -> Path:
    own = os.environ.get(variable)
    return Path(own or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / folder).expanduser()


def _is_set(flag: str) -> bool:
    return os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")
