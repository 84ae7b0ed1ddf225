"""Devices by name, sizes as they are typed and written, what several processes share."""

from __future__ import annotations

import attrs
import pytest
from fake_plans import GIB

from rlhf.errors import Problem
from rlhf.facts import Gpu, Machine
from rlhf.planning.devices import device_named, memory_size, nominal_peaks, planned_machine
from rlhf.planning.prediction import device_of
from rlhf.planning.text import size


@pytest.mark.parametrize(
    ("text", "bytes"), [("80GiB", 80 * GIB), ("24 GB", 24e9), ("1.5g", 1.5 * GIB), ("512mib", GIB / 2), ("100", 100)]
)
def test_sizes_are_read(text: str, bytes: float) -> None:
    assert memory_size(text) == bytes


@pytest.mark.parametrize("text", ["lots", "", "-1GiB", "0", "3 parsecs"])
def test_what_is_no_size_is_told(text: str) -> None:
    assert isinstance(memory_size(text), Problem)


def test_sizes_are_written_short() -> None:
    assert [size(x) for x in (0, 10, 2048, 3.5 * (1 << 20), 80 * GIB)] == [
        "-",
        "10 B",
        "2.00 KiB",
        "3.50 MiB",
        "80.0 GiB",
    ]


def test_devices_by_name(machine: Machine) -> None:
    made = planned_machine(machine, "H100", None, 2)
    assert isinstance(made, Machine)
    assert [gpu.memory_bytes for gpu in made.gpus] == [80 * GIB] * 2
    assert {"cuda", "bf16"} <= made.provides
    old = planned_machine(machine, "v100", 16 * GIB, 1)
    assert isinstance(old, Machine)
    assert "bf16" not in old.provides
    assert old.gpus[0].memory_bytes == 16 * GIB
    cpu = planned_machine(attrs.evolve(machine, gpus=old.gpus), "cpu", 4 * GIB, 1)
    assert isinstance(cpu, Machine)
    assert (cpu.gpus, cpu.memory_bytes) == ((), 4 * GIB)
    wrong = device_named("a10")
    assert isinstance(wrong, Problem)
    assert "did you mean a100" in wrong.fix or "a10g" in wrong.fix
    assert planned_machine(machine, None, None, 4) is machine


@pytest.mark.parametrize(
    ("given", "meant"), [("4090", "rtx4090"), ("RTX 3090", "rtx3090"), ("40S", "l40s"), ("CPU", "cpu")]
)
def test_a_device_by_the_end_of_its_name(machine: Machine, given: str, meant: str) -> None:
    assert device_named(given) == meant
    made = planned_machine(machine, given, None, 1)
    assert isinstance(made, Machine)
    assert [gpu.name for gpu in made.gpus] == ([] if meant == "cpu" else [meant])


@pytest.mark.parametrize("given", ["100", "90", "l40", "s", "", "5090"])
def test_an_end_that_several_have_or_none_is_no_device(given: str) -> None:
    wrong = device_named(given)
    assert isinstance(wrong, Problem) and "known: v100, " in wrong.fix


def test_nominal_peaks_say_where_they_are_from(machine: Machine) -> None:
    peaks, why = nominal_peaks(attrs.evolve(machine, gpus=(Gpu("NVIDIA H100 80GB HBM3", 1, (9, 0)),)))
    assert (peaks.flops["bfloat16"], peaks.bandwidth, why) == (989e12, 3.35e12, "nominal peaks of h100")
    assert "taken for" in nominal_peaks(attrs.evolve(machine, gpus=(Gpu("NVIDIA X1", 1, (9, 0)),)))[1]


def test_processes_on_cpus_share_the_machine(machine: Machine) -> None:
    """What each takes must fit in its part: two that take 6 GiB each don't fit in 10."""
    cpu = attrs.evolve(machine, gpus=(), memory_bytes=10 * GIB)
    assert device_of(cpu, 1) == ("this machine's memory", 10 * GIB)
    assert device_of(cpu, 2) == ("this machine's memory, shared by 2 processes", 5 * GIB)
    own = planned_machine(machine, "H100", None, 2)
    assert isinstance(own, Machine)
    assert device_of(own, 2)[1] == 80 * GIB
