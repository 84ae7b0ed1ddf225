"""Runs one program, once, with limits: what `sandbox` starts. Standard library alone; nothing of this package.

    the trainer -> this process, which watches -> the first of its own process namespace -> the program

Standard input: a line of JSON that says what to run, then nothing; its end is the end of the trainer, and of all this.
The program's output goes to standard output; what is told of it goes to the descriptor `report`.

Where the system permits it, the program has namespaces of its own (user, processes, network, IPC, mounts): no network;
no other process to be seen, and none of its own left when it ends; nothing to be written but an empty folder in memory;
homes, temporary files and /proc out of sight.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR = 442  # the same number on every architecture
_RECURSIVE = 0x8000
_NOBODY = 65534
_OURS = 3
"""Tasks of a namespace that aren't the program's own: the one that watches, the first, and the program."""
_ROOM = "/tmp"
_WORK, _LIB = "/tmp/work", "/tmp/lib"


def main() -> None:
    sys.path.pop(0)  # this file's folder
    asked = json.loads(sys.stdin.buffer.readline())
    report = asked["report"]
    os.set_inheritable(report, False)
    work = asked["work"]
    if os.geteuid() == 0:
        os.chown(work, _NOBODY, _NOBODY)
    os.chdir(os.path.dirname(os.path.dirname(os.__file__)))
    drop_root()
    if asked["isolate"]:
        try:
            isolate(asked["hide"], asked["bytes"])
        except OSError as error:
            os.write(report, (json.dumps({"started": False, "why": str(error)}) + "\n").encode())
            return
        work = _WORK
    first = os.fork()
    with contextlib.suppress(OSError):  # whichever of the two comes first
        os.setpgid(first, first)
    if first:
        watch(first)
    end_with_parent()
    program = os.fork()
    if program:
        lie_low(asked["keep"])
        _, status = os.waitpid(program, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)  # and with it goes all that it left behind
    end_with_parent()
    confine(asked, work)
    os.write(report, (json.dumps({"started": True, "why": ""}) + "\n").encode())
    run(asked, report)


def drop_root() -> None:
    """Nobody, in place of root: root's processes are not counted, and it may write anywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which that took away: /proc/self is to be written to


def isolate(hide: Sequence[str], size: int) -> None:
    """Namespaces of its own. The standard library is where this process is: it may have been put there as root.

    Raises:
        OSError: the system doesn't permit it.
    """
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | _NEWPID | _NEWNET | _NEWIPC | _NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount(None, "/", None, _REC | _PRIVATE)
    stdlib = os.path.dirname(os.__file__)
    _mount("tmpfs", _ROOM, "tmpfs", _NOSUID | _NODEV, "size=64k,mode=755")
    for folder in (_WORK, _LIB):
        os.mkdir(folder)
    _mount("tmpfs", _WORK, "tmpfs", _NOSUID | _NODEV, f"size={size},nr_inodes=4096,mode=700")
    _mount(".", _LIB, None, _BIND | _REC)  # wherever it is, it can be imported from here
    for folder in (*hide, "/proc"):
        if os.path.isdir(folder) and folder not in ("/", _ROOM) and not os.path.samefile(folder, _ROOM):
            _mount("tmpfs", folder, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k")
    _set_attributes("/", _RDONLY, 0, _RECURSIVE)
    _set_attributes(_WORK, 0, _RDONLY, 0)
    inside = os.path.join(_LIB, os.path.basename(stdlib))
    packages = [module.__path__ for module in sys.modules.values() if isinstance(getattr(module, "__path__", 0), list)]
    for paths in (sys.path, *packages):  # those that are imported already look for their modules there, too
        paths[:] = [inside + path[len(stdlib) :] if path.startswith(stdlib) else path for path in paths]
    sys.path_importer_cache.clear()


def end_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def watch(first: int) -> None:
    """Until the program has ended, or the one that wants to know; then end all that it left."""
    os.close(1)
    with contextlib.suppress(AttributeError, OSError):
        _call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: whose parent ends becomes this one's
    # No thread: the system gives none to a process whose children have a namespace of their own.
    ends = [0]
    with contextlib.suppress(AttributeError, OSError):  # Linux has them
        ends.append(os.pidfd_open(first))
    while True:
        ready, _, _ = select.select(ends, [], [], None if len(ends) > 1 else 0.01)
        ended, status = os.waitpid(first, os.WNOHANG)
        if not ended and 0 in ready and not os.read(0, 4096):
            os.kill(first, signal.SIGKILL)
            ended, status = os.waitpid(first, 0)
        if ended:
            sweep(first)
            os._exit(os.waitstatus_to_exitcode(status) % 256)


def sweep(group: int) -> None:
    """End what a program without a namespace left: its group at once, since a fork bomb is faster than one by one, then
    whatever has left it, until there is none."""
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(OSError):  # /proc is hidden where there is a namespace, or there is nobody left
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def lie_low(keep: Sequence[int]) -> None:
    """The first of its namespace has nothing that the program could want."""
    for descriptor in (0, 1, *keep):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def confine(asked: dict[str, Any], work: str) -> None:
    """The program's own limits."""
    os.dup2(asked["input"], 0)
    os.close(asked["input"])
    if not asked["prints"]:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(work)
    if asked["isolate"]:
        _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        _call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limits = asked["limits"]
    limits["NPROC"] += _OURS if asked["isolate"] else asked["others"]  # of this user, which are counted along
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            soft = limit
            hard = limit + 1 if name == "CPU" else limit
            most = resource.getrlimit(kind)[1]
            if most != resource.RLIM_INFINITY:
                soft, hard = min(soft, most), min(hard, most)
            resource.setrlimit(kind, (soft, hard))


def run(asked: dict[str, Any], report: int) -> None:
    """The program, then the test where it is one of Python."""
    sys.argv[:] = ["program"]
    name = "__main__" if asked["prints"] else "program"
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = module
    text = partial(open, encoding="utf-8", errors="replace", closefd=False)
    sys.stdin, sys.stdout, sys.stderr = text(0), text(1, "w"), text(2, "w")
    if asked["prints"]:
        os.close(report)
        exec(compile(asked["program"], "<program>", "exec"), module.__dict__)
        return
    tell = _teller(report, asked["secret"])
    try:
        own = dict(vars(sys.modules["builtins"]))
        exec(compile(asked["program"], "<program>", "exec"), module.__dict__)
        vars(sys.modules["builtins"]).update(own)  # what the program did to them doesn't hold for its test
        if asked["statement"]:
            for known in [known for known in own if not known.startswith("__") and known in module.__dict__]:
                del module.__dict__[known]  # one of these names in the test is Python's own
        exec(compile(asked["setup"], "<setup>", "exec"), module.__dict__)
        value = eval(compile(asked["expression"], "<test>", "eval"), module.__dict__) if asked["expression"] else None
    except BaseException as error:
        tell("failed", type(error).__name__)
    else:
        tell("value", value)
    os._exit(0)


def _teller(report: int, secret: str) -> Callable[[str, Any], None]:
    """Tells what became of it, in names that the program can't have changed."""
    dumps, write, make = json.dumps, os.write, plain

    def tell(what: str, value: Any) -> None:
        try:
            text = dumps({"secret": secret, what: make(value)})
        except BaseException as error:
            text = dumps({"secret": secret, "failed": type(error).__name__})
        data = (text + "\n").encode()
        while data:
            data = data[write(report, data) :]

    return tell


def plain(value: Any, depth: int = 0) -> Any:
    """Plain data as JSON has it, other types marked (`cases.decode`); a subclass counts as what it derives from, and of
    anything else it is told whether it is true."""
    if depth > 40:
        raise ValueError
    if value is None or isinstance(value, (bool, str, float)):
        return value  # JSON has a subclass's content, whatever it says of itself
    if isinstance(value, int):
        number = int.__add__(value, 0)
        return number if abs(number) < 1 << 53 else ["i", hex(number)]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, dict):
        return ["d", [[plain(key, depth + 1), plain(item, depth + 1)] for key, item in dict.items(value)]]
    kinds: tuple[tuple[Any, str], ...] = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f"))
    for kind, mark in kinds:
        if isinstance(value, kind):
            return [mark, [plain(item, depth + 1) for item in kind.__iter__(value)]]
    return ["o", bool(value)]


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    if _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def _set_attributes(path: str, on: int, off: int, flags: int) -> None:
    attributes = struct.pack("4Q", on, off, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    if (
        _libc.syscall(
            ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(-100), path.encode(), ctypes.c_uint(flags), attributes, size
        )
        != 0
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"read-only {path}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
