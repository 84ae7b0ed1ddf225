"""What the machine can do, measured: matrix products a second and bytes read a second."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.mkldnn import to_mkldnn

from rlhf.floor import Peaks

_SECONDS = 0.1
"""Of trying, for each number: enough for the clock to rise and for a quiet moment to be met."""


def measure(device: str, dtypes: Iterable[str], bandwidth: bool = True) -> Peaks:
    """Measure in this process, with its threads. The best of several tries: what the machine can do, not what it does
    while something else runs.

    Args:
        device: "cpu" or "cuda".
        dtypes: names of those whose products are to be measured.
        bandwidth: measure it; else it is 0, less than any.
    """
    cpu = device == "cpu"
    with torch.no_grad():
        flops = {name: _matmul(device, getattr(torch, name), 1024 if cpu else 8192) for name in dtypes}
        return Peaks(flops, _bandwidth(device, (128 if cpu else 2048) << 20) if bandwidth else 0.0)


def _matmul(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of two square matrices of n rows."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    least = _least(lambda: a @ b, device)
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN's own product: on some CPUs more than twice as fast as the default
        linear, x = to_mkldnn(torch.nn.Linear(n, n, bias=False)), a.to_mkldnn()
        least = min(least, _least(lambda: linear(x), device))
    return 2.0 * n**3 / least


def _bandwidth(device: str, size: int) -> float:
    """Bytes/s, read by a dot product of two arrays far larger than the caches."""
    x, y = (_ones(size // 8, device) for _ in range(2))
    return size / _least(lambda: torch.dot(x, y), device)


def _ones(count: int, device: str) -> torch.Tensor:
    """Float32. On a CPU in a mapping of their own, which is gone with them: from the heap they would be taken above all
    that is kept there, and leave a hole that few things fill."""
    if device != "cpu":
        return torch.ones(count, device=device)
    mapped = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as large blocks of the heap are
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.float32).fill_(1.0)


def _least(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest try."""
    least, until = float("inf"), time.perf_counter() + _SECONDS
    work()
    while time.perf_counter() < until or least == float("inf"):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - start)
    return least


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
