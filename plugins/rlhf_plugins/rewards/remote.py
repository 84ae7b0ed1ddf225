"""What rewards that ask a server have in common: who may be sent a token. Entry modules import this, and every command
imports those: what opens connections is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.api import Problem, RequestError


def is_loopback(host: str) -> bool:
    """Whether the host is this very one, so that nothing travels over a network."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def address_problems(config: Any, flag: str, sends_token: bool) -> Iterator[Problem]:
    """What is wrong with `config.url`, and whether a token would be read by anybody on the way.

    Args:
        flag: "--reward.NAME", for the message.
    """
    from rlhf_plugins.engines.exchange import address_of

    try:
        to = address_of(config.url, f"{flag}.url")
    except RequestError as error:
        yield from error.problems
        return
    if sends_token and not (to.tls or is_loopback(to.host) or config.allow_plain_http):
        fix = f"write https://..., or reach it by a tunnel; on a network you trust: {flag}.allow-plain-http true"
        yield Problem(f"{flag}.url {config.url}: its token would travel unencrypted", fix)


def token_for(config: Any, flag: str, *, needed: bool = True) -> str:
    """The token of `config.token_file`, else of the environment variable `config.token_env`; empty where neither is
    named.

    Args:
        needed: whether a variable that is named must be set.

    Raises:
        RequestError: there is none, or the file can be read by others.
    """
    from rlhf_plugins.tokens import token_in, token_in_file

    if getattr(config, "token_file", None):
        return token_in_file(Path(config.token_file).expanduser(), "write the server's token into it")
    if not config.token_env:
        return ""
    token = token_in(config.token_env)
    if needed and not token:
        fix = f"export {config.token_env}=..., or leave {flag}.token-env out"
        raise RequestError(Problem(f"{flag}.token-env {config.token_env}: the variable isn't set", fix))
    return token
