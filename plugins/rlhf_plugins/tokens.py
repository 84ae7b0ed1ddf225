"""Tokens that servers ask for: in a file for its owner's eyes alone or in the environment, never on a command line."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.api import Problem, RequestError


def token_in_file(path: Path, missing: str, *, least: int = 1) -> str:
    """The token in a file that is there.

    Args:
        missing: what to do where it isn't, or holds none.
        least: characters of a token.

    Raises:
        RequestError: it isn't, or others can read it, or it holds no token.
    """
    try:
        mode, token = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(Problem(f"token file {path}: {error}", missing)) from error
    if mode & 0o077:
        raise RequestError(Problem(f"token file {path} can be read by others", f"chmod 600 {path}"))
    if len(token) < least or not token.isascii() or not token.isprintable() or " " in token:
        what = f"token file {path} holds no token, which is one line of {least} plain letters or more"
        raise RequestError(Problem(what, missing))
    return token


def token_in(variable: str) -> str:
    """The token in an environment variable; empty where it isn't set.

    Raises:
        RequestError: it holds what can't be sent.
    """
    token = os.environ.get(variable, "")
    if not (token.isascii() and token.isprintable()):
        what = f"the environment variable {variable} holds no token"
        raise RequestError(Problem(what, "it is one line of plain letters"))
    return token
