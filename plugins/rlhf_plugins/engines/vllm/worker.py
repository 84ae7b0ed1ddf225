"""What runs where vLLM has its model: in this process, or in one of its own.

`Extension` is mixed into vLLM's worker, by `worker_extension_cls`, and called by `collective_rpc`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rlhf_plugins.engines.vllm import group, ipc, wire
from rlhf_plugins.engines.vllm.packing import Place, size_of, taken
from rlhf_plugins.engines.vllm.shards import own_input, whole

EXTENSION = "rlhf_plugins.engines.vllm.worker.Extension"


class Extension:
    """Methods of a worker; `self` is the worker."""

    def begin_weights(self: Any) -> None:
        """All weights follow. What a load that broke off has left is done with first: else it would be taken for a
        part of this one."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if getattr(self, "_rlhf_loading", False):
                finalize_layerwise_reload(model, self.model_config)
            self._rlhf_loading = True
            self._rlhf_opened = ipc.Opened()
            initialize_layerwise_reload(model)

    def take_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Some of them, whole, by their Hugging Face names: a worker keeps its part of each. They are in place once
        their layer is complete."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(iter(weights))

    def end_weights(self: Any) -> None:
        """That was all; keys and values of old ones are forgotten apart."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        runner = self.model_runner
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(runner.get_model(), self.model_config)
        self._rlhf_loading = False
        self._rlhf_opened.close()
        for reset in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):  # as its own `reload_weights` does
            getattr(runner, reset, lambda: None)()
        repack_heads(runner.get_model())

    def told(self: Any, method: str, *arguments: Any) -> tuple[str, bool, Any]:
        """(what went wrong, else ""; whether that was the trainer's going; what a method of this class returns). Where
        one worker of several raised, vLLM would leave the answers of the others for the next call."""
        try:
            return "", False, getattr(self, method)(*arguments)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}", isinstance(error, OSError), None

    # Weights that it fetches

    def join_trainer(self: Any, at: group.Address) -> str:
        """Leave whatever group it was in, and join another; the text that the trainer broadcasts first."""
        self.leave_trainer()
        self._rlhf_group = group.Group(at, 1 + self.rank, self.device)
        return self._rlhf_group.text  # type: ignore[no-any-return]

    def leave_trainer(self: Any) -> None:
        """Where it was in a group."""
        old, self._rlhf_group = getattr(self, "_rlhf_group", None), None
        if old is not None:
            old.close()

    def take_broadcast(self: Any, places: Sequence[Place]) -> None:
        """Weights that the trainer broadcasts to all workers."""
        if self._rlhf_group is None:
            raise ConnectionError("the group was left")
        try:
            buffer = torch.empty(size_of(places), dtype=torch.uint8, device=self.device)
        except BaseException:
            self._rlhf_group.end()  # else the others would wait for this one
            raise
        self._rlhf_group.broadcast(buffer)
        self.take_weights(taken(buffer, places).items())

    def sees_memory(self: Any, probe: ipc.Probe) -> bool:
        """Whether it can open memory of the trainer's GPU, which is the first worker's: only that one opens it."""
        return self.rank > 0 or ipc.seen(probe)

    def take_from_gpu(self: Any, handle: ipc.Handle, places: Sequence[Place]) -> None:
        """Weights in the trainer's GPU memory: the first worker copies them, and hands them on."""
        from vllm.distributed import get_tp_group

        workers, wrong = get_tp_group(), ""
        try:
            size = size_of(places)
            if workers.rank_in_group == 0:
                buffer = self._rlhf_opened.copied(handle, size)
            else:
                buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        except (RuntimeError, wire.WireError) as error:
            wrong = f"worker {workers.rank_in_group}: {error}"
        wrongs: list[Any] = [wrong] * workers.world_size
        if workers.world_size > 1:
            torch.distributed.all_gather_object(wrongs, wrong, group=workers.cpu_group)
        if any(wrongs):  # else the others would wait for it in vain
            raise wire.WireError(next(filter(None, wrongs)))
        self.take_weights(taken(workers.broadcast(buffer, 0), places).items())

    def fingerprints(self: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[float]]:
        """See `Sampler.fingerprints`."""
        return dict(_fingerprints(self.model_runner.get_model(), shapes))


def repack_heads(model: nn.Module) -> None:
    """On a CPU vLLM packs a linear weight for its products. A head that is tied to the embedding loads nothing itself,
    so nothing packs it anew, and it goes on with the old weights without a word."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for part in model.modules():
        if isinstance(part, ParallelLMHead) and hasattr(part, "cpu_linear"):
            part.quant_method.process_weights_after_loading(part)


# Which weight is another than it should be

_PROBES = 8


def probe(size: int, seed: int) -> Tensor:
    """float32 [size], the same in any process."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def fingerprint(weight: Tensor) -> list[float]:
    """A few numbers that a weight of another value has others of. Of a matrix W they are a fixed R times W x for a
    fixed x: so they can be had of a layer that has packed it away, by calling it.

    weight: [out, in] or [size].
    """
    w = weight.detach().float().cpu()
    return _read(w @ probe(w.shape[1], 1) if w.ndim == 2 else w.reshape(-1))


def _read(y: Tensor) -> list[float]:
    """y: [n]."""
    y = y.float().cpu()
    rows = torch.randn(_PROBES, len(y), generator=torch.Generator().manual_seed(2))
    return (rows @ y / max(len(y), 1) ** 0.5).tolist()  # type: ignore[no-any-return]


def _fingerprints(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, list[float]]]:
    modules = dict(model.named_modules())
    fused: dict[str, tuple[str, list[str]]] = {
        part: (fusion, parts)
        for fusion, parts in (getattr(model, "packed_modules_mapping", None) or {}).items()
        for part in parts
    }
    for name, shape in shapes.items():
        place, _, kind = name.rpartition(".")
        above, _, last = place.rpartition(".")
        fusion, parts = fused.get(last, (last, [last]))
        layer = _under_adapters(modules.get(f"{above}.{fusion}" if above else fusion))
        if layer is None or kind not in ("weight", "bias"):
            continue
        sizes = [shapes[other][0] for part in parts if (other := f"{above}.{part}.{kind}") in shapes] or [shape[0]]
        start = sum(sizes[: parts.index(last)]) if len(sizes) == len(parts) else 0
        with torch.no_grad():
            found = _output(layer, kind, shape)
        if found is not None and len(found) >= start + shape[0]:
            yield name, _read(found[start : start + shape[0]])


def _output(layer: nn.Module, kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """W x of a layer's whole matrix, or its vector; None where it can't be had. float32 [n]."""
    own = getattr(layer, kind, None)
    if len(shape) == 1:
        return None if own is None else whole(layer, kind, own.reshape(-1))
    if len(shape) != 2:
        return None
    method: Any = getattr(layer, "quant_method", None)
    device, dtype = next(((p.device, p.dtype) for p in layer.parameters()), (torch.device("cpu"), torch.float32))
    x = own_input(layer, probe(shape[1], 1)).to(device, dtype)[None]
    if type(layer).__name__ == "VocabParallelEmbedding":  # only looked up, never multiplied by
        return None if own is None else whole(layer, kind, own.float() @ x[0].float())
    if method is None:
        return None
    try:
        y: Tensor = method.apply(layer, x, None)
    except (RuntimeError, AttributeError, TypeError):  # a matrix that is kept the other way round
        return None
    return whole(layer, kind, y[0].float())


def _under_adapters(layer: nn.Module | None) -> nn.Module | None:
    return getattr(layer, "base_layer", layer)
