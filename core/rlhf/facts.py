"""What the machine and the model are, found without importing torch or transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import attrs
import psutil

from rlhf import hub
from rlhf.errors import Problem


@attrs.frozen
class Gpu:
    """One CUDA device, as NVML tells it."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]


@attrs.frozen
class Machine:
    """The machine this process runs on."""

    cpus: int
    cpu_flags: frozenset[str]
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    world_size: int
    vendor: str = ""
    """Of the CPU, as Linux tells it: "GenuineIntel", "AuthenticAMD"."""
    unused: str = ""
    """GPUs that are here and aren't among `gpus`, and why."""

    @property
    def provides(self) -> frozenset[str]:
        """Capabilities of the machine: "cuda"; "bf16", it computes in bfloat16; "fast-bf16", faster than in float32."""
        if self.gpus:
            whole = all(gpu.compute_capability >= (8, 0) for gpu in self.gpus)
            return frozenset({"cuda", "bf16", "fast-bf16"} if whole else {"cuda"})
        return frozenset({"bf16", "fast-bf16"} if self.cpu_bf16_rate > 1 else {"bf16"})

    @property
    def cpu_bf16_rate(self) -> float:
        """The CPU's rate of bfloat16 matrix products, over float32's.

        Any CPU computes in bfloat16: without instructions of its own it converts to float32 and back, at a fifth of
        the rate (measured with AVX-512: a quarter to a sixth). Intel's vector units take half float32's rate
        (measured); its tiles four times, AMD's and ARM's vector units twice.
        """
        if "amx_bf16" in self.cpu_flags:
            return 4
        if {"avx512_bf16", "bf16"} & self.cpu_flags:
            return 0.5 if self.vendor == "GenuineIntel" else 2
        return 0.2


def machine(world_size: int = 1) -> Machine:
    """Look at this machine."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    about, gpus, unused = _cpu(), _gpus(), ""
    if gpus and (version := _without_cuda()):
        unused = f"{gpus[0].name}: not used, since torch {version} is built without CUDA; install one that has it"
        gpus = ()
    return Machine(
        cpus=cpus,
        cpu_flags=frozenset(_told(about, "flags|Features").split()),
        vendor=_told(about, "vendor_id"),
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        world_size=world_size,
        unused=unused,
    )


def _cpu() -> str:
    """What Linux tells of the first CPU; elsewhere, nothing."""
    try:
        with open("/proc/cpuinfo") as lines:
            return "".join(itertools.takewhile(str.strip, lines))
    except OSError:
        return ""


def _told(about: str, what: str) -> str:
    found = re.search(rf"^(?:{what})\s*:\s*(.*)$", about, re.MULTILINE)
    return found.group(1) if found else ""


def _without_cuda() -> str:
    """The version of an installed torch that is built without CUDA; empty where it has it, or none is installed."""
    found = importlib.util.find_spec("torch")
    for place in found.submodule_search_locations or () if found else ():
        with contextlib.suppress(OSError):
            said = (Path(place) / "version.py").read_text(encoding="utf-8")
            if re.search(r"^cuda\b.*= None$", said, re.MULTILINE):
                version = re.search(r"^__version__ = '(.*)'$", said, re.MULTILINE)
                return version.group(1) if version else "here"
    return ""


def _gpus() -> tuple[Gpu, ...]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    try:
        import pynvml  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        try:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            if visible and all(part.strip().isdigit() for part in visible.split(",")):
                handles = [handles[int(part)] for part in visible.split(",") if int(part) < len(handles)]
            return tuple(
                Gpu(
                    name=str(pynvml.nvmlDeviceGetName(handle)),
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                )
                for handle in handles
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver, no device, or one that can't be asked: nothing is known to plan for
        return ()


@attrs.frozen
class ModelFacts:
    """A model's `config.json`, read as JSON. Where the model is on the hub and not yet here, only `path` is known."""

    path: str
    config: dict[str, Any] | None = None
    adapter_of: str | None = None
    """The base, where the model is a PEFT folder: `config` is the base's."""
    task: str = ""
    """What a PEFT folder's adapters were trained for, in PEFT's words: "CAUSAL_LM", "SEQ_CLS"."""

    @property
    def known(self) -> bool:
        return self.config is not None

    @property
    def classifier(self) -> bool:
        """A sequence classifier's checkpoint, as a reward model's is; False where that isn't known."""
        return self.task == "SEQ_CLS" if self.adapter_of else self.architecture.endswith("ForSequenceClassification")

    def get(self, *names: str) -> Any:
        """The first of these config keys that is there, looked up in a nested text config too."""
        nested = (self.config or {}).get("text_config")
        for source in (self.config or {}, nested if isinstance(nested, dict) else {}):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return None

    @property
    def architecture(self) -> str:
        names = (self.config or {}).get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens, prompt and response together."""
        value = self.get("max_position_embeddings", "n_positions", "max_seq_len")
        return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


_CONFIGS = ("config.json", "adapter_config.json")
"""What makes a folder a model's: a whole one, or an adapter."""


def model(path: str, role: str = "") -> ModelFacts | Problem:
    """Read a model's facts from a folder, a run directory (its `model/`), or the hub's local cache; what is in none of
    them must be on the hub.

    A folder that is a run or holds one model per role is resolved to the one for `role`.
    """
    # Absolute: what looks like a hub id must not be asked of the hub, and a resumed run may start elsewhere.
    folder = Path(path).expanduser().absolute()
    if folder.is_dir():
        for place in (
            (folder / role, folder / "model" / role, folder, folder / "model")
            if role
            else (
                folder,
                folder / "model",
            )
        ):
            if any((place / name).is_file() for name in _CONFIGS):
                return _read(place)
        inner = sorted({p.parent for name in _CONFIGS for at in ("*/", "model/*/") for p in folder.glob(at + name)})
        if len(inner) == 1:  # a run that trained a single role of another name
            return _read(inner[0])
        parts = [place.name for place in inner]
        fix = f"it holds these, one a role: {', '.join(parts)}" if parts else "a model folder has a config.json"
        return Problem(f"--model {path}: the folder holds no model", fix)
    if folder.exists():
        return Problem(f"--model {path}: is a file", "give the model's folder, or a hub id such as org/name")
    is_id = hub.is_id(path)
    why = hub.unavailable("model", path) if is_id else ""
    if why or not is_id:
        hint = f"{hub.near(path, Path.is_dir)}give a model's folder, a run's, or a hub id such as org/name"
        return Problem(f"--model {path}: there is no such folder here{', and ' * bool(why)}{why}", hint)
    cached = hub.cached("model", path)
    there = cached is not None and any((cached / name).is_file() for name in _CONFIGS)
    return _read(cached, path) if cached is not None and there else ModelFacts(path)


def _read(folder: Path, path: str = "") -> ModelFacts | Problem:
    """path: what it is called, where that isn't the folder: it is in the hub's cache, and what it lacks can be had."""
    lacks = "" if path else _lacks(folder)
    path = path or str(folder)
    if lacks:
        return Problem(
            f"--model {path}: {lacks}", "give the whole model; one that holds no weights at all is planned for"
        )
    config = folder / "config.json"
    if config.is_file():
        content = _json_object(config, path)
        return content if isinstance(content, Problem) else ModelFacts(path, content)
    adapter = _json_object(folder / "adapter_config.json", path)  # a PEFT folder: the base's facts, the adapter's path
    if isinstance(adapter, Problem):
        return adapter
    named = adapter.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or Path(named).expanduser().absolute() == folder.absolute():
        what = f"--model {path}: is an adapter that names no base model"
        return Problem(what, f"set base_model_name_or_path in {folder / 'adapter_config.json'}")
    base = model(named)
    if isinstance(base, Problem):
        what = f"--model {path}: is an adapter of {named}, which can't be read: {base.what.partition(': ')[2]}"
        return Problem(what, f"set base_model_name_or_path in {folder / 'adapter_config.json'}")
    return ModelFacts(path, base.config, base.path, str(adapter.get("task_type") or ""))


def _lacks(folder: Path) -> str:
    """What a folder lacks of the weights that its index names; empty where that is nothing, or there is no index."""
    index = folder / "model.safetensors.index.json"
    indexed = index.is_file() and not (folder / "model.safetensors").is_file()  # which would be read, and no other
    content = _json_object(index, "") if indexed else {}
    named = content.get("weight_map") if isinstance(content, dict) else None
    files = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    gone = sorted(name for name in files if not (folder / name).is_file())
    more = f" and {len(gone) - 2} more" if len(gone) > 2 else ""
    return f"lacks {', '.join(gone[:2])}{more}, which its {index.name} names" if gone else ""


def _json_object(file: Path, path: str) -> dict[str, Any] | Problem:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Problem(f"--model {path}: {file} cannot be read: {error}")
    return content if isinstance(content, dict) else Problem(f"--model {path}: {file} holds no JSON object")
