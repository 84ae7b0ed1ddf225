"""`rlhf matrix` says what composing says; illegal mixes are refused at once, with every reason, and never by a
traceback."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from rlhf import facts
from rlhf.cli import main
from rlhf.compose import compose
from rlhf.entries import AlgorithmEntry, BackendEntry, MemoryEntry, OptimizerEntry, PolicyEntry
from rlhf.errors import Problem, RequestError
from rlhf.legality_table import Cell, Wanted, base_recipe, table
from rlhf.recipe import Recipe
from rlhf.registry import Registry

ALGORITHMS = ("sft", "dpo", "ppo", "grpo")


@pytest.fixture(scope="module")
def cells(installed: Registry) -> list[Cell]:
    return list(table(installed, facts.machine(), Wanted(only={"algo": ALGORITHMS})))


def test_every_combination_is_there_once(cells: list[Cell], installed: Registry) -> None:
    keys = [(c.algo, c.engine, c.mem, c.optim, c.backend) for c in cells]
    assert len(set(keys)) == len(keys)
    memories = len(installed.entries("mem"))
    sets = 1 + memories + memories * (memories - 1) // 2
    others = len(installed.entries("optim")) * len(installed.entries("backend"))
    assert len(cells) == sets * others * (2 * len(installed.entries("engine")) + 2)


def test_table_and_run_agree(cells: list[Cell], installed: Registry, typed: Callable[..., Recipe]) -> None:
    """A run typed with the same names is legal where the table says so, and refused for the same reasons where not."""
    for cell in random.Random(1).sample(cells, 60):
        words = ["--algo", cell.algo, "--optim", cell.optim, "--backend", cell.backend, "--nproc", str(cell.nproc)]
        words += [word for name in cell.mem for word in ("--mem", name)]
        words += ["--engine", cell.engine] if cell.engine else []
        entry = installed.find("algo", cell.algo)
        assert isinstance(entry, AlgorithmEntry)
        given = base_recipe(entry, installed, facts.machine()).roles.items()  # models that the user must give
        words += [word for role, its in given for word in ("--model", f"{role}={its.model}")]
        try:
            compose(typed(*words), installed, facts.machine())
            reasons: tuple[str, ...] = ()
        except RequestError as error:
            reasons = tuple(problem.what for problem in error.problems)
        assert (reasons == ()) == cell.legal, words
        assert cell.legal or set(reasons) == set(cell.reasons), words


@pytest.mark.whole
def test_known_cells(cells: list[Cell]) -> None:
    by_mem = {c.mem: c for c in cells if (c.algo, c.optim, c.backend) == ("sft", "adamw", "single")}
    assert by_mem["4bit", "lora"].legal
    assert by_mem["4bit",].reasons == (
        "--mem 4bit: the role policy is trained, and quantised weights take no gradient",
    )
    assert by_mem["bf16", "fp32"].reasons == ("--mem bf16 and fp32: a role has one precision (role policy)",)


def test_an_algorithm_without_an_example_is_judged_too(make_registry: Callable[..., Registry]) -> None:
    """Strangers' algorithms have no built-in model or data; what they are combined with is judged all the same."""
    installed = make_registry(
        AlgorithmEntry(name="fake-offline", summary="", impl="m:C", data=int),
        PolicyEntry(name="fake-policy", summary="", impl="m:C", rank=1),
        OptimizerEntry(name="fake-optim", summary="", impl="m:C", rank=1),
        BackendEntry(name="fake-one", summary="", impl="m:C", constraints=(_one_process,)),
        BackendEntry(name="fake-two", summary="", impl="m:C", constraints=(_two_processes,)),
        MemoryEntry(name="fake-mem", summary="", impl="m:C", phase="load", requires={"fake-capability"}),
    )
    found = list(table(installed, facts.machine(), Wanted()))
    assert all(not cell.legal for cell in found)  # no launcher is installed, and that is the reason given
    assert found[0].reasons


def _one_process(plan, component):  # type: ignore[no-untyped-def]
    return [Problem("fake-one has one process")] if plan.run.nproc > 1 else []


def _two_processes(plan, component):  # type: ignore[no-untyped-def]
    return [Problem("fake-two has two processes")] if plan.run.nproc < 2 else []


def test_a_parallel_backend_is_tried_with_two_processes(installed: Registry) -> None:
    both = Registry()
    both.offers, both.starters, both._by_name = list(installed.offers), installed.starters, dict(installed._by_name)
    entry = BackendEntry(name="fake-two", summary="", impl="m:C", provides={"whole-gradients", "whole-weights"},
                         constraints=(_two_processes,))  # fmt: skip
    both.offers.append(attrs.evolve(installed.offers_of("backend")[0], name="fake-two", entry=entry))
    both._by_name["backend", "fake-two"] = both.offers[-1]
    wanted = Wanted(only={"algo": ("sft",), "mem": ("lora",), "backend": ("fake-two", "single")})
    found = {cell.backend: cell for cell in table(both, facts.machine(), wanted) if cell.optim == "adamw"}
    assert (found["fake-two"].legal, found["fake-two"].nproc) == (True, 2)
    assert (found["single"].legal, found["single"].nproc) == (True, 1)


# The command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.whole
def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "matrix", "--json", "--algo", "sft", "--mem", "lora,4bit", "--optim", "adamw")
    found = json.loads(out)
    assert code == 0
    assert {(cell["algo"], tuple(cell["mem"]), cell["optim"]) for cell in found} == {("sft", ("lora", "4bit"), "adamw")}
    assert run(capsys, "matrix", "--kind", "backend", "--json", "--algo", "dpo")[0] == 0
    assert run(capsys, "matrix", "--algo", "pop")[2].startswith("error: there is no --algo 'pop'")
    assert run(capsys, "matrix", "--algo", "pop")[0] == 2


def test_the_text_numbers_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "matrix", "--algo", "sft", "--optim", "adamw", "--illegal", "--backend", "single")
    lines = out.splitlines()
    assert lines[0] == "sft"
    assert "yes" not in out
    numbers = {line.split()[0] for line in lines[lines.index("why the others are not:") + 1 :]}
    assert numbers == {str(i + 1) for i in range(len(numbers))}


def test_it_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from rlhf.cli import main\ntry: main(['matrix'])\nfinally: print('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    assert time.perf_counter() - start < 60  # some ten seconds where nothing else runs


# Refusals

ILLEGAL = [
    (("--algo", "sft", "--mem", "4bit"), ("takes no gradient", "quantised weights take no gradient"), "--mem lora"),
    (("--algo", "ppo", "--mem", "bf16,fp32,8bit"), ("one precision", "quantised weights"), ""),
    (("--algo", "ppo", "--mem", "reference=lora"), ("reference isn't trained",), "rlhf run --algo ppo"),
    (
        ("--algo", "sft", "--engine", "hf", "--reward", "length"),
        ("samples nothing", "leave --reward out"),
        "--algo sft",
    ),
    (("--algo", "dpo", "--nproc", "2", "--backend", "single"), ("one process, the run has 2",), ""),
    (("--algo", "sft", "--mem", "policy=checkpointing,checkpointing,4bit,8bit"), ("one quantisation",), ""),
]


@pytest.mark.parametrize(("words", "reasons", "neighbour"), ILLEGAL)
@pytest.mark.whole
def test_illegal_mixes_are_refused_with_reasons_and_a_neighbour(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reasons: tuple[str, ...], neighbour: str
) -> None:
    code, out, err = run(capsys, "plan", *words)
    assert (code, out) == (2, "")
    assert any(reason in err for reason in reasons[:1]) or reasons[-1] in err
    assert neighbour in err


@pytest.mark.whole
def test_a_refusal_takes_less_than_a_second_of_work() -> None:
    """Of processor time, cold: the wall clock of a shared machine proves nothing."""
    code = "import time; from rlhf.cli import main\ntry: main(['plan', '--algo', 'ppo', '--mem', '4bit'])\n" \
           "except SystemExit as end: print(end.code, time.process_time())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    exit_code, seconds = done.stdout.split()
    assert exit_code == "2"
    assert float(seconds) < 1.0
    assert "the nearest combination that works: rlhf run" in done.stderr


def test_no_random_mix_ends_in_a_traceback(installed: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """200 command lines of names and options that exist, and some that don't: each is planned, or refused in words."""
    drawn = random.Random(20261126)
    codes = []
    for _ in range(200):
        words = _mix(drawn, installed)
        code, out, err = run(capsys, "plan", *words)
        assert code in (0, 2), (words, err)
        assert "Traceback" not in err, words
        assert out if code == 0 else err.startswith(("error: ", "warning: ", "Usage")), words
        codes.append(code)
    # Both happen. Of these 200 drawn ones 20 were legal once strategies for several processes had come: each further
    # one makes a random mix less likely to be, so the lower bound says only that some are.
    assert 10 < codes.count(0) < 180


def _mix(drawn: random.Random, installed: Registry) -> list[str]:
    words: list[str] = []
    for kind in ("algo", "engine", "optim", "backend", "policy", "launch"):
        names = [entry.name for entry in installed.entries(kind)]
        if drawn.random() < (0.95 if kind == "algo" else 0.3):
            words += [f"--{kind}", drawn.choice(names) if drawn.random() < 0.97 else "nothing-of-that-name"]
    for _ in range(drawn.choice((0, 0, 1, 1, 2, 3))):
        name = drawn.choice([entry.name for entry in installed.entries("mem")])
        role = drawn.choice(("", "", "", "policy=", "reference=", "value=", "reward=", "critic="))
        words += ["--mem", role + name]
    if drawn.random() < 0.2:
        words += ["--reward", drawn.choice([entry.name for entry in installed.entries("reward")])]
    if drawn.random() < 0.2:
        words += ["--nproc", drawn.choice(("1", "2", "0", "many"))]
    if drawn.random() < 0.3:
        words += ["--device-memory", drawn.choice(("80GiB", "1GiB", "100MB", "lots"))]
    if drawn.random() < 0.3:
        entry = drawn.choice([e for e in installed.entries("mem") if e.config is not None])
        name = drawn.choice([f.name for f in attrs.fields(entry.config)])
        words.append(f"--mem.{entry.name}.{name}={drawn.choice(('1', '0', '-3', 'true', 'text', ''))}")
    return words


# The recipes that ship


@pytest.mark.whole
def test_the_7b_recipe_fits_one_gpu_of_80_gb_and_says_what_would_fit_40(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    words = ("plan", "ppo-7b-one-80gb", "--prompt-tokens", "1024", "--json", "--device-memory")
    code, out, _ = run(capsys, *words, "80GiB")
    found = json.loads(out)["prediction"]
    assert (code, found["fits"]) == (0, True)
    # Qwen2.5-7B has 7,615,616,512 parameters; the adapters of rank 32 on all seven matrices of 28 layers come to it
    adapters = 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    policy = next(role for role in found["roles"] if role["role"] == "policy")
    assert policy["parameters"] - policy["trained"] == 7_615_616_512
    assert policy["trained"] == adapters
    assert {phase["phase"] for phase in found["phases"]} == {
        "load", "rollout", "reward", "experience", "update", "save",
    }  # fmt: skip
    code, out, err = run(capsys, *words, "40GiB")
    found = json.loads(out)["prediction"]
    assert (code, found["fits"]) == (2, False)
    assert found["nearest"]["needed_bytes"] < 40 << 30 < found["needed_bytes"]
    assert f"add {found['nearest']['change']}" in err


@pytest.mark.parametrize(
    ("recipe", "device"),
    [
        ("ppo-7b-one-80gb", ("--device-memory", "80GiB")),
        ("ppo-7b-two-32gb", ("--device", "v100", "--device-memory", "32GiB")),
        ("ppo-7b-eight-80gb", ("--device-memory", "80GiB")),
    ],
)
@pytest.mark.whole
def test_each_7b_recipe_fits_what_it_is_for_and_not_half_of_that(
    capsys: pytest.CaptureFixture[str], recipe: str, device: tuple[str, ...]
) -> None:
    assert run(capsys, "plan", recipe, *device)[0] == 0
    half = str(int(device[-1].removesuffix("GiB")) // 2) + "GiB"
    code, _, err = run(capsys, "plan", recipe, *device[:-1], half)
    assert code == 2 and "does not fit" in err


@pytest.mark.whole
def test_two_gpus_without_bfloat16_share_one_base(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "ppo-7b-two-32gb", "--device", "v100", "--json")
    roles = {role["role"]: role for role in json.loads(out)["prediction"]["roles"]}
    assert code == 0 and roles["policy"]["parameters"] > 7.6e9
    assert roles["value"]["parameters"] < 0.09e9 and "reference" in roles
    assert run(capsys, "plan", "ppo-7b-two-32gb", "--device", "v100", "--mem", "bf16")[0] == 2
