"""Weights of which each of several workers holds a part (tensor parallelism, Shoeybi et al. 2019, arXiv:1909.08053):
what a product with the whole matrix is, out of the workers' products with their parts.

A matrix is split by its rows, the outputs, and then the products are put together; or by its columns, the inputs, and
then they are summed. A fused matrix (queries, keys and values) is split in each of what it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def joined(parts: Sequence[Tensor], sizes: Sequence[int], copies: Sequence[int]) -> Tensor:
    """Outputs of a fused matrix, of all workers.

    Args:
        parts: of each worker, [sum(sizes)].
        sizes: rows that a worker holds of each of what the matrix is made of.
        copies: how many workers in a row hold the same ones: of keys and values, where these have fewer heads than
            there are workers.
    """
    split = [part.split(list(sizes)) for part in parts]
    return torch.cat([rows[i] for i, every in enumerate(copies) for rows in split[::every]])


def own_input(layer: nn.Module, x: Tensor) -> Tensor:
    """What this worker's part of a matrix is multiplied by. x: [in]."""
    if not _is(layer, "RowParallelLinear"):
        return x
    size = len(x) // layer.tp_size  # type: ignore[operator]
    return x[layer.tp_rank * size :][:size]  # type: ignore[operator]


def whole(layer: nn.Module, kind: str, y: Tensor) -> Tensor:
    """All workers' outputs of a layer's matrix, or its whole vector. All workers must call it, in the same order.

    Args:
        kind: "weight" or "bias".
        y: [n] of this worker.
    """
    if _is(layer, "RowParallelLinear"):
        if kind == "bias":  # each has it whole
            return y
        from vllm.distributed import tensor_model_parallel_all_reduce

        summed: Tensor = tensor_model_parallel_all_reduce(y.contiguous())
        return summed
    if not _is(layer, "ColumnParallelLinear", "VocabParallelEmbedding"):
        return y
    from vllm.distributed import tensor_model_parallel_all_gather

    count: Any = layer.tp_size
    parts = tensor_model_parallel_all_gather(y.contiguous(), 0).chunk(count)
    sizes: Any = getattr(layer, "output_partition_sizes", None) or [len(y)]
    copies = [1] * len(sizes)
    if _is(layer, "QKVParallelLinear"):
        copies[1:] = [layer.num_kv_head_replicas] * 2  # type: ignore[list-item]
    return joined(parts, sizes, copies)


def _is(layer: nn.Module, *names: str) -> bool:
    """Of one of vLLM's classes, and split."""
    return getattr(layer, "tp_size", 1) > 1 and any(kind.__name__ in names for kind in type(layer).__mro__)
