"""Devices that a plan can be made for without being there: their memory, and what they do on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from rlhf.errors import Problem
from rlhf.facts import Gpu, Machine
from rlhf.floor import Peaks
from rlhf.options import nearest

GIB = 1 << 30


@attrs.frozen
class Nominal:
    """From its maker's data sheet: dense matrix products, without sparsity."""

    memory_gib: int
    float32: float
    """TFLOP/s, of tensor cores in TF32 where they have it."""
    bfloat16: float
    """TFLOP/s; of float16 where there is no bfloat16."""
    bandwidth: float
    """TB/s."""
    capability: tuple[int, int]


DEVICES: Mapping[str, Nominal] = {
    "v100": Nominal(32, 15.7, 125, 0.9, (7, 0)),
    "t4": Nominal(16, 8.1, 65, 0.32, (7, 5)),
    "a10g": Nominal(24, 35, 70, 0.6, (8, 6)),
    "a100": Nominal(80, 156, 312, 2.0, (8, 0)),
    "rtx3090": Nominal(24, 36, 71, 0.94, (8, 6)),
    "rtx4090": Nominal(24, 83, 165, 1.01, (8, 9)),
    "l40s": Nominal(48, 183, 362, 0.86, (8, 9)),
    "h100": Nominal(80, 495, 989, 3.35, (9, 0)),
    "h200": Nominal(141, 495, 989, 4.8, (9, 0)),
    "b200": Nominal(180, 1100, 2250, 8.0, (10, 0)),
}
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "tib": 1 << 40, "kb": 1e3, "mb": 1e6, "gb": 1e9,
          "tb": 1e12, "k": 1 << 10, "m": 1 << 20, "g": GIB}  # fmt: skip


def memory_size(text: str) -> int | Problem:
    """Bytes of "80GiB", "24GB", "512 MiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found.group(2).lower()) if found else None
    size = int(float(found.group(1)) * unit) if found and unit else 0
    if size <= 0:
        return Problem(f"--device-memory {text}: is no size", "a number with a unit, such as 80GiB or 24GB")
    return size


def device_named(name: str) -> str | Problem:
    """The device that a name means, of `DEVICES` or "cpu". Its end does, where no other has that: 4090 is rtx4090."""
    plain = name.lower().replace(" ", "").replace("-", "")
    if plain in DEVICES or plain == "cpu":
        return plain
    ended = [known for known in DEVICES if len(plain) > 2 and known.endswith(plain)]
    if len(ended) == 1:
        return ended[0]
    near = nearest(name, (*DEVICES, "cpu"))
    hint = f"did you mean {near}? " if near else ""
    return Problem(f"--device {name}: isn't known", f"{hint}known: {', '.join(DEVICES)}, cpu; or give --device-memory")


def planned_machine(machine: Machine, device: str | None, memory: int | None, ranks: int) -> Machine | Problem:
    """The machine that a plan is for: this one, or one with so many of a named device."""
    if device is None and memory is None:
        return machine
    if device is not None:
        name = device_named(device)
        if isinstance(name, Problem):
            return name
        if name == "cpu":
            return attrs.evolve(machine, gpus=(), memory_bytes=memory or machine.memory_bytes, unused="")
        nominal = DEVICES[name]
        gpu = Gpu(name, memory or nominal.memory_gib * GIB, nominal.capability)
    else:
        gpu = Gpu("a GPU", memory or 0, (8, 0))
    return attrs.evolve(machine, gpus=(gpu,) * max(1, ranks), unused="")


def nominal_peaks(machine: Machine) -> tuple[Peaks, str]:
    """What the machine does on paper, and where that is from."""
    if machine.gpus:
        name = machine.gpus[0].name
        plain = name.lower().replace(" ", "").replace("-", "")
        found = next((key for key in sorted(DEVICES, key=len, reverse=True) if key in plain), "a100")
        nominal = DEVICES[found]
        flops = {"float32": nominal.float32 * 1e12, "bfloat16": nominal.bfloat16 * 1e12}
        assumed = "" if found in plain else f", taken for {name}"
        peaks = Peaks({**flops, "float16": flops["bfloat16"]}, nominal.bandwidth * 1e12)
        return peaks, f"nominal peaks of {found}{assumed}"
    wide = 64 if any(flag.startswith("avx512") for flag in machine.cpu_flags) else 32  # FLOP a cycle, two FMA units
    single = machine.cpus * 3.5e9 * wide
    half = single * machine.cpu_bf16_rate
    bandwidth = 25e9 * min(machine.cpus, 8)
    why = f"nominal peaks of {machine.cpus} cores: 3.5 GHz, {wide} FLOP a cycle, 25 GB/s each"
    return Peaks({"float32": single, "bfloat16": half, "float16": half}, bandwidth), why
