"""The token that a server asks for: in a file for its user's eyes alone, never on a command line."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from rlhf.api import Problem, RequestError


def token_of(path: Path) -> str:
    """The token in a file; where there is none, one is made, for this user's eyes alone.

    Raises:
        RequestError: others can read it, or it is too short.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        print(f"wrote a new token to {path}", file=sys.stderr)
    except FileExistsError:
        pass
    except OSError as error:
        raise RequestError(
            Problem(f"--token-file {path}: {error.strerror}", "name a file in a folder that is there")
        ) from error
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in a file that is there.

    Raises:
        RequestError: it isn't, or others can read it, or it is too short.
    """
    try:
        mode, token = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(Problem(f"token file {path}: {error}", "copy the one that the server wrote")) from error
    if mode & 0o077:
        raise RequestError(Problem(f"token file {path} can be read by others", f"chmod 600 {path}"))
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise RequestError(
            Problem(f"token file {path} holds no token of 16 letters or more", "delete it, and one is made")
        )
    return token


def token_from(path: str | None, variable: str = "RLHF_ENGINE_TOKEN") -> str:
    """The token for a server that runs already: of a file, else of the environment.

    Raises:
        RequestError: there is none.
    """
    if path:
        return read_token(Path(path))
    token = os.environ.get(variable, "")
    if not token:
        fix = f"--engine.token-file FILE, the one that the server wrote, or the environment variable {variable}"
        raise RequestError(Problem("a server asks for its token, and none was given", fix))
    return token
