"""What programs can't do: to the machine, to the others, and to their tests. All of it with real processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_plugins.rewards.code.cases import Output, read
from rlhf_plugins.rewards.code.sandbox import Limits, Sandbox, Verdict

QUICK = Limits(seconds=1, wall_seconds=4.0, memory=256 << 20, output=64 << 10, disk=1 << 20)
RIGHT = "def f(x):\n    return x + 1\n"
TEST = "assert f(1) == 2"
DATACLASS = """
from dataclasses import dataclass
@dataclass
class A:
    x: int
def f(x): return A(x) == A(x)
"""
Judge = Callable[..., str]


def readable_python() -> str | None:
    """Of a system where tests run as root, from an interpreter in root's home: one that nobody can read, too."""
    return shutil.which("python3", path="/usr/bin:/usr/local/bin") if os.geteuid() == 0 else None


@pytest.fixture(scope="module", params=["isolated", pytest.param("plain", marks=pytest.mark.matrix_full)])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """With namespaces, where this machine permits them, and without: where it doesn't, both are without."""
    found = Sandbox(QUICK, isolate=request.param == "isolated", python=readable_python())
    try:
        found.isolated()
    except OSError as error:
        pytest.skip(f"programs can't be run so here: {error}")
    return found


@pytest.fixture
def judge(sandbox: Sandbox) -> Judge:
    def what(program: str, tests: Any = TEST) -> str:
        (case,) = read(tests)
        verdict = sandbox.verdict(program, case)
        assert verdict.what != "none", verdict
        return verdict.what

    return what


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No child, no file, and no process that works in the program's folder."""
    tmp_path_factory.getbasetemp()  # elsewhere, before the place for temporary files is another
    folder = Path(tempfile.mkdtemp(prefix="rlhf-test-"))
    folder.chmod(0o755)  # nobody must come into those below
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    # torch 2.7 keeps compilers ready
    assert not [x for x in psutil.Process().children(recursive=True) if "_inductor" not in " ".join(x.cmdline())]
    assert not list(folder.iterdir())
    found = [process.info["cwd"] or "" for process in psutil.process_iter(["cwd"])]
    assert not [cwd for cwd in found if cwd.startswith(str(folder))]
    folder.rmdir()


def output(printed: str, given: str = "") -> list[dict[str, str]]:
    return [{"input": given, "output": printed}]


# Right and wrong


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        (RIGHT, TEST, "passed"),
        (RIGHT, "assert f(1) == 3", "failed"),
        (RIGHT, "x = 4\nassert f(x) == 5", "passed"),
        (RIGHT, "def check(g):\n    assert g(1) == 2\ncheck(f)", "passed"),
        (RIGHT, "def check(g):\n    assert g(1) == 3\ncheck(f)", "failed"),
        ("def f(x) return 2", TEST, "failed"),
        ("", TEST, "failed"),
        ("import json.tool, encodings.idna, dataclasses\n" + RIGHT, TEST, "passed"),
        (DATACLASS, "assert f(1)", "passed"),
        ("if __name__ == '__main__': raise SystemExit(1)\n" + RIGHT, TEST, "passed"),
        ("a, b = map(int, input().split())\nprint(a + b)", output("5\n", "2 3\n"), "passed"),
        ("a, b = map(int, input().split())\nprint(a * b)", output("5\n", "2 3\n"), "failed"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", output("ba\ndc", "ab\ncd\n"), "passed"),
        ("print(5)\nraise SystemExit(0)", output("5"), "passed"),
        ("print(5)\nraise SystemExit(1)", output("5"), "failed"),
        ("print(5)\n1 / 0", output("5"), "failed"),
        ("if __name__ == '__main__': print('é \\u2713')", output("é ✓"), "passed"),
        ("import atexit\natexit.register(print, 5)", output("5"), "passed"),
        ("print(input())", output("x" * 60_000, "x" * 60_000), "passed"),
    ],
)  # fmt: skip
def test_programs(judge: Judge, program: str, tests: Any, expected: str) -> None:
    assert judge(program, tests) == expected


def test_the_order_of_a_set_is_the_same_each_time(sandbox: Sandbox) -> None:
    """Or a program that prints one would pass today and fail tomorrow."""
    runs = {sandbox._run("print({'a', 'b', 'c', 'd', 'e'})", Output("", ""))[0].printed for _ in range(4)}
    assert len(runs) == 1 and b"a" in next(iter(runs))


# Too much of anything


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("while True: pass", "late"),
        ("def f(x):\n    while True: pass", "late"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "late"),
        ("x = 'a' * (1 << 40)", "failed"),
        ("x = []\nwhile True: x.append('a' * 1000000)", "failed"),
        ("def f(x): return f(x)", "failed"),
        ("def f(x): return 'a' * 1000000", "failed"),
        ("f = lambda x: [2] * 100000", "failed"),
        ("import os\nwhile True: os.write(1, b'a' * 10000); os.write(2, b'a' * 10000)", "late"),
        ("open('big', 'w').write('a' * (2 << 20))", "failed"),
        ("kept = [open('a', 'w') for _ in range(100)]", "failed"),
    ],
)
def test_too_much_of_anything_fails(judge: Judge, program: str, expected: str) -> None:
    begun = time.monotonic()
    assert judge(program) == expected
    assert time.monotonic() - begun < 7.0


def test_a_flood_of_output_is_cut(judge: Judge) -> None:
    begun = time.monotonic()
    assert judge("while True: print('a' * 10000)", output("a")) == "failed"
    assert judge("print('a' * 70000)", output("a" * 70000)) == "failed"  # more than the limit, if right
    assert time.monotonic() - begun < 3.0


def test_one_that_sleeps_is_ended_by_the_clock(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_limits", Limits(wall_seconds=0.7))
    (case,) = read(TEST)
    begun = time.monotonic()
    assert sandbox.verdict("import time\ntime.sleep(60)", case) == Verdict("late")
    assert time.monotonic() - begun < 3.0


BOMB = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            os.setpgid(0, 0)
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    pass
def f(x):
    return made
"""


def test_a_fork_bomb_comes_to_an_end_and_nothing_of_it_is_left(judge: Judge, sandbox: Sandbox) -> None:
    """Where the system counts by user, others of this user make room for a few more."""
    assert judge(BOMB, "assert 1 <= f(0) < 150") == "passed"
    endless = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert judge(endless) in ("late", "failed")


# Where it mustn't be


def test_it_has_no_environment_and_a_folder_of_its_own(judge: Judge) -> None:
    program = (
        "import os\nopen('mine', 'w').write('x')\nprint(os.listdir('.'), 'PATH' in os.environ, len(os.environ) < 4)"
    )
    assert judge(program, output("['mine'] False True")) == "passed"
    assert judge("import os\nprint(os.listdir('.'))", output("[]")) == "passed"  # nothing of the one before


def test_it_writes_no_file_outside(judge: Judge, sandbox: Sandbox, tmp_path: Path) -> None:
    """Without namespaces it may, where its user may: as root it is nobody."""
    if not sandbox._isolate and os.geteuid() != 0:
        pytest.skip("without namespaces a program may write where its user may, which docs/how-to/rewards.md says")
    outside = [str(tmp_path / "x"), "/x", "/etc/x", os.path.expanduser("~/x"), "/usr/x", "/var/x"]
    program = f"import os\nfor path in {outside!r}:\n    try: open(path, 'w'); print(path)\n    except OSError: pass"
    assert judge(program, output("")) == "passed"
    assert not any(Path(path).exists() for path in outside)


def test_isolated_it_sees_no_network_no_process_and_no_file_of_ours(
    judge: Judge, sandbox: Sandbox, tmp_path: Path
) -> None:
    if not sandbox._isolate:
        pytest.skip("of namespaces")
    secret = tmp_path / "answers.jsonl"
    secret.write_text("42")
    tmp_path.chmod(0o777)
    listening = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listening.getsockname(), 1):  # we can
        pass
    program = f"""
import os, socket
for try_it in (
    lambda: socket.create_connection({listening.getsockname()!r}, 1),
    lambda: open({str(secret)!r}),
    lambda: open("/proc/self/environ"),
    lambda: os.kill({os.getpid()}, 0),
    lambda: os.listdir({str(Path.cwd())!r})[0],
    lambda: os.listdir("/home")[0] if os.path.isdir("/home") else [][0],
):
    try:
        try_it()
        print("could")
    except Exception as error:
        pass
print(os.getpid() < 10)
"""
    with listening:
        assert judge(program, output("True")) == "passed"


def test_a_grandchild_in_a_session_of_its_own_ends_with_it(judge: Judge) -> None:
    mark = f"sleeper-{os.getpid()}"
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        sys.stdout.close()
        import ctypes
        ctypes.CDLL(None).prctl(15, b"{mark[:15]}", 0, 0, 0)
        time.sleep(60)
    os._exit(0)
print(5)
"""
    begun = time.monotonic()
    assert judge(program, output("5")) == "passed"
    assert time.monotonic() - begun < 5.0
    assert not [process for process in psutil.process_iter(["name"]) if process.info["name"] == mark[:15]]


def test_a_child_that_holds_the_output_open_holds_up_nobody(judge: Judge) -> None:
    program = "import os, time\nprint(5, flush=True)\nif os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)"
    begun = time.monotonic()
    assert judge(program, output("5")) == "passed"
    assert time.monotonic() - begun < 5.0


# Cheats

ALWAYS_EQUAL = "class A:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
TO_ALL = "import os\nfor fd in range(3, 4096):\n    try: os.write(fd, {})\n    except OSError: pass\n"
CHEATS = [
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "raise SystemExit",
    "def f(x):\n    raise SystemExit(0)",
    "def f(x):\n    import os\n    os._exit(0)",
    "print('passed')\nprint('{\"value\": 2}')\nf = print",
    ALWAYS_EQUAL + "def f(x): return A()",
    ALWAYS_EQUAL + "f = lambda x: [A()]",
    "class S(int):\n    def __eq__(self, other): return True\nf = lambda x: S(7)",
    "import builtins\nbuiltins.AssertionError = None\nbuiltins.eval = lambda *a: 2\nf = lambda x: 3",
    "import json\njson.dumps = lambda *a, **k: '{\"value\": 2}'\nf = lambda x: 3",
    "import json.encoder\njson.encoder.JSONEncoder.encode = lambda *a: '{\"value\": 2}'\nf = lambda x: 3",
    "import os\nwrite = os.write\nos.write = lambda fd, data: write(fd, b'{\"value\": 2}')\nf = lambda x: 3",
    TO_ALL.format(b'{"value": 2}\n') + "f = lambda x: 2",
    TO_ALL.format(b'{"secret": "", "value": 2}\n') + "os._exit(0)",
    "import os\nfor fd in range(3, 4096):\n    try: os.close(fd)\n    except OSError: pass\nf = lambda x: 2",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nf = lambda x: 3",
    "import sys\nsys.settrace(lambda *a: None)\nsys.modules['builtins'] = None\nf = lambda x: 3",
    "import atexit, os\natexit.register(os._exit, 0)\nf = lambda x: 3",
]  # fmt: skip


@pytest.mark.parametrize("program", CHEATS)
def test_a_cheat_does_not_pass(sandbox: Sandbox, program: str) -> None:
    (case,) = read(TEST)
    assert sandbox.verdict(RIGHT, case) == Verdict("passed")
    assert sandbox.verdict(program, case).what in ("failed", "late")  # not "none": the program is to blame


BESIDE = [
    "import sys\nsys.exit(0)",
    "f = lambda x: exit(0)",
    "f = lambda x: __import__('os')._exit(0)",
    "abs = lambda x: 0\nf = lambda x: 9",
    "import builtins\nbuiltins.abs = lambda x: 0\nf = lambda x: 9",
    "AssertionError = Exception = BaseException = None\nf = lambda x: 9",
    "def check(*a): pass\nf = lambda x: 9",
]


@pytest.mark.parametrize("program", BESIDE)
def test_a_cheat_does_not_pass_a_test_that_is_run_beside_it(sandbox: Sandbox, program: str) -> None:
    (case,) = read("def check(g):\n    for n in (1, 2):\n        assert abs(g(n) - n - 1) < 1e-6\ncheck(f)")
    assert sandbox.verdict(RIGHT, case) == Verdict("passed")
    assert sandbox.verdict(program, case).what == "failed"


def test_what_is_expected_is_not_in_the_process(judge: Judge) -> None:
    program = """
import gc, sys
seen = []
frame = sys._getframe()
while frame is not None:
    seen += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
def f(x):
    return "918273645" in "".join(seen) or "918273645" in repr(gc.get_objects())
"""
    assert judge(program, "assert f(1) == 918273645") == "failed"
    (case,) = read("assert f(1) == 918273645")
    assert "918273645" not in getattr(case, "expression", "") + getattr(case, "setup", "918273645")


# Where it can't be run


def test_where_no_process_can_be_had_there_is_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = read(TEST)
    monkeypatch.setattr(sandbox, "_python", "/nosuch/python")
    assert sandbox.verdict(RIGHT, case).what == "none"
    monkeypatch.setattr(sandbox, "_python", "/bin/false")
    assert sandbox.verdict(RIGHT, case) == Verdict(
        "none", "the process for programs ended before it began: exit code 1"
    )
    with pytest.raises(OSError, match="ended before it began"):
        sandbox.isolated()


def test_it_stops_when_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    found = Sandbox(Limits(), over=over)
    threading.Timer(0.5, over.set).start()
    begun = time.monotonic()
    assert found.verdict("import time\ntime.sleep(60)", read(TEST)[0]) == Verdict("none", "stopped")
    assert time.monotonic() - begun < 3.0


def test_nothing_is_left_when_the_one_that_started_it_is_killed(sandbox: Sandbox, nothing_is_left: Path) -> None:
    script = f"""
import sys
from rlhf_plugins.rewards.code.sandbox import Limits, Sandbox
from rlhf_plugins.rewards.code.cases import read
sandbox = Sandbox(Limits(wall_seconds=60), isolate={sandbox._isolate}, python={sandbox._python!r})
print("ready", flush=True)
sandbox.verdict("import time\\ntime.sleep(50)", read({TEST!r})[0])
"""
    environment = {**os.environ, "TMPDIR": str(nothing_is_left)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    parent, children = psutil.Process(process.pid), list[psutil.Process]()
    while len(children) < 3:
        assert process.poll() is None
        children = parent.children(recursive=True)
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    for folder in nothing_is_left.iterdir():  # the killed one could not
        shutil.rmtree(folder)
