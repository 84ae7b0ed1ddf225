"""The token that a server asks for: in a file for its user's eyes alone, never on a command line."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from rlhf.api import Problem, RequestError
from rlhf_plugins.tokens import token_in_file


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
    return token_in_file(path, "copy the one that the server wrote", least=16)


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
