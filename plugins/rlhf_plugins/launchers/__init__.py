"""Launchers: what starts the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.api import LauncherEntry, hookimpl


@hookimpl
def rlhf_launchers() -> Iterable[Any]:
    yield LauncherEntry(
        name="local",
        summary="on this machine: in the process that was started, or with --nproc in several of its own",
        impl="rlhf_plugins.launchers.local:Local",
        rank=10,
    )
