"""The whole prediction of a plan: bytes and seconds, against a device; as JSON for `--json` and `plan.json`."""

from __future__ import annotations

from typing import Any

import attrs

from rlhf.facts import Machine
from rlhf.floor import Peaks
from rlhf.plan import Plan
from rlhf.planning.architecture import Uncountable
from rlhf.planning.devices import nominal_peaks
from rlhf.planning.duration import Duration, duration
from rlhf.planning.memory import Lengths, Memory, assumed_lengths
from rlhf.planning.phases import predict


@attrs.frozen(kw_only=True)
class Prediction:
    """What a plan takes, and what there is."""

    memory: Memory
    duration: Duration | None
    device: str
    """Which the plan is compared with."""
    device_bytes: int

    @property
    def fits(self) -> bool:
        """With what the process takes besides; False where not every role could be counted."""
        return not self.memory.missing and self.memory.needed <= self.device_bytes

    def to_json(self) -> dict[str, Any]:
        """Bytes and seconds as numbers."""
        memory = self.memory
        return {
            "lengths": attrs.asdict(memory.lengths),
            "devices": memory.ranks,
            "device": self.device,
            "device_bytes": self.device_bytes,
            "fits": self.fits,
            "peak_bytes": round(memory.peak_bytes),
            "needed_bytes": round(memory.needed),
            "peak_phase": memory.peak.phase,
            "roles": [
                {name: round(value) if isinstance(value, float) else value
                 for name, value in attrs.asdict(role).items()}
                for role in memory.roles
            ],
            "phases": [
                {
                    "phase": phase.phase,
                    "device": {part: round(size) for part, size in phase.device.items()},
                    "host": {part: round(size) for part, size in phase.host.items()},
                }
                for phase in memory.phases
            ],
            "seconds": None if self.duration is None else {
                "phases": {name: round(value, 6) for name, value in self.duration.phases.items()},
                "floor": round(self.duration.floor, 6),
                "assumed": self.duration.assumed,
            },
            "missing": list(memory.missing),
            "notes": list(memory.notes),
        }  # fmt: skip


def prediction(plan: Plan, lengths: Lengths | None = None, peaks: tuple[Peaks, str] | None = None) -> Prediction:
    """Predict what a plan takes on the machine it was made for.

    Args:
        lengths: of sequences; left out, `assumed_lengths`.
        peaks: of one device, with where they are from; left out, nominal ones.

    Raises:
        Uncountable: a component's footprint failed.
    """
    lengths = lengths or assumed_lengths(plan)
    memory = predict(plan, lengths)
    device, size = device_of(plan.machine, memory.ranks)
    known, source = peaks or nominal_peaks(plan.machine)
    return Prediction(
        memory=memory,
        duration=duration(plan, lengths, known, source),
        device=device,
        device_bytes=size,
    )


def device_of(machine: Machine, ranks: int) -> tuple[str, int]:
    """(name, bytes) of the smallest device of a process. On CPUs the processes share what the machine has; those that
    run on other machines are counted among them, which promises too little rather than too much."""
    if machine.gpus:
        gpu = min(machine.gpus, key=lambda gpu: gpu.memory_bytes)
        return gpu.name, gpu.memory_bytes
    shared = f", shared by {ranks} processes" if ranks > 1 else ""
    return f"this machine's memory{shared}", machine.memory_bytes // ranks


def written(plan: Plan) -> dict[str, Any]:
    """For `plan.json` of a run, which a planner's fault must not keep from starting."""
    try:
        return prediction(plan).to_json()
    except Uncountable as error:
        return {"notes": [str(error)]}
