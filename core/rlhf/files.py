"""Files that are seen whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import Problem, RequestError, RunError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is seen whole or not at all, and stays after a power cut. What UTF-8 can't hold, such as
    half a surrogate pair in an error's message, is written as its escape."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def check_free(target: Path) -> None:
    """Nothing is at `target`, and something can be.

    Raises:
        RequestError: that isn't so.
    """
    try:
        target.lstat()  # follows no link, so that one to nothing is something
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_be_written(target, error) from error
    raise RequestError(Problem(f"--output {target}: is there already", "give a folder that isn't"))


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends, and is gone where that fails.

    Raises:
        RequestError: none can be made beside `target`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=".rlhf-", dir=target.parent))
    except OSError as error:
        raise cannot_be_written(target, error) from error
    try:
        made = holder / "made"
        made.mkdir()  # one inside: a temporary folder is its owner's alone
        yield made
        made.rename(target)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def cannot_be_written(target: Path, error: OSError) -> RequestError:
    """What to say of an `--output` that nothing can be written to."""
    return RequestError(Problem(f"--output {target}: cannot be written: {error.strerror}", "give another folder"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written here fails as the run's trouble, such as a full disk, and not as a fault of the program.

    Raises:
        RunError: it can't be written; says why.
    """
    try:
        yield
    except Exception as error:
        # By its name: safetensors has an error of its own for this, and isn't imported for it.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
