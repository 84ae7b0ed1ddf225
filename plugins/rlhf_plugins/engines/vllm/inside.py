"""vLLM in this process: the trainer's own, one engine a rank beside whatever shards the model there, or a server's. A
server's may have a model that is spread over several workers, which are processes of their own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor

from rlhf.api import Problem, RequestError, here
from rlhf_plugins.engines.vllm import group, ipc
from rlhf_plugins.engines.vllm.buckets import buckets
from rlhf_plugins.engines.vllm.entry import HINT
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, Gone, Settings, Stream
from rlhf_plugins.engines.vllm.worker import EXTENSION


class InProcess:
    """A `Sampler` over `vllm.LLM`."""

    version = -1

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            RequestError: vLLM can't be imported, or can't serve this model.
        """
        self._own_group = not torch.distributed.is_initialized()
        workers = int(settings.arguments.get("tensor_parallel_size", 1))
        vllm = _vllm()
        with _as_it_was():
            try:
                self._llm: Any = vllm.LLM(
                    model=settings.model,
                    distributed_executor_backend=_executor(workers),
                    worker_extension_cls=EXTENSION,
                    **settings.arguments,
                )
            # how vLLM says that it doesn't serve a model, or not with these arguments
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                what = f"--engine vllm can't be started for {settings.model}: {' '.join(str(error).split())[:600]}"
                raise RequestError(Problem(what, "another engine: --engine hf; or other --engine options")) from error
        # Its own end, which comes with garbage collection too, would end the trainer's process group: see `close`.
        self._llm.llm_engine.engine_core._finalizer.detach()
        self.workers: int = self._llm.llm_engine.vllm_config.parallel_config.world_size
        self._vllm = vllm
        self._adapter: Any = None
        self._folder: Path | None = None

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        parameters = [
            self._vllm.SamplingParams(
                seed=ask.seed,
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                top_p=ask.top_p,
                top_k=ask.top_k or -1,
                stop=list(ask.stop),
                include_stop_str_in_output=True,
                stop_token_ids=list(ask.stop_tokens),
                ignore_eos=True,  # what ends a response is in `stop_tokens`
                logprobs=0,
                detokenize=bool(ask.stop),
            )
            for ask in asks
        ]
        found = self._generate([ask.prompt for ask in asks], parameters)
        return [_answer(output.outputs[0]) for output in found]

    def load(self, weights: Stream, version: int) -> None:
        with self._loading(version):
            if self.workers == 1:  # in this process
                self._rpc("take_weights", weights())
            else:
                for bucket in buckets(weights()):
                    self._rpc("take_weights", list(bucket.items()))

    def fetch(self, found: Iterator[group.Coming | ipc.Laid], version: int) -> None:
        with self._loading(version):
            for bucket in found:
                if isinstance(bucket, group.Coming):
                    self._rpc("take_broadcast", bucket.places)
                else:
                    self._rpc("take_from_gpu", bucket.handle, bucket.places)

    def sees(self, probe: ipc.Probe) -> bool:
        return all(self._rpc("sees_memory", probe))

    def join(self, at: group.Address) -> list[str]:
        return self._rpc("join_trainer", at)

    def leave(self) -> None:
        self._rpc("leave_trainer")

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        from vllm.lora.request import LoRARequest

        folder = Path(tempfile.mkdtemp(prefix="rlhf-adapter-", dir=_memory()))
        try:
            save_file(
                {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors"
            )
            (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
            # under another name each time: keys and values are known by it
            fresh = LoRARequest(f"version-{number}", number, str(folder))
            if self._adapter is not None:
                self._rpc("remove_lora", self._adapter.lora_int_id)
            self._rpc("add_lora", fresh)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # it is in memory now
        self._adapter = fresh
        self._forget()
        self.version = version

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        asked = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        found = self._generate(sequences, [asked] * len(sequences))
        return [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
            for output, tokens in zip(found, sequences, strict=True)
        ]

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        found: list[Mapping[str, list[float]]] = self._rpc("fingerprints", dict(shapes))
        # what each worker holds whole, as a norm, may be wrong in any: the mean tells of that too
        return {name: np.mean([own[name] for own in found], axis=0).tolist() for name in found[0]}

    def sleep(self) -> None:
        self._llm.sleep(level=1)

    def wake(self) -> None:
        self._llm.wake_up()

    def close(self) -> None:
        """Leaves the process so that another may be started in it. A process group that was there before stays: it is
        the trainer's."""
        from vllm.distributed import parallel_state

        with contextlib.suppress(Exception):  # a run that ends anyway
            self._llm.llm_engine.model_executor.shutdown()  # not the engine: it would end the group
        del self._llm
        parallel_state.destroy_model_parallel()
        if self._own_group:
            parallel_state.destroy_distributed_environment()
        elif parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.collect()  # it is full of circles, and its weights and cache are large

    def _generate(self, prompts: Sequence[tuple[int, ...]], parameters: list[Any]) -> list[Any]:
        if not prompts:
            return []
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _as_it_was():
            found: list[Any] = self._llm.generate(asked, parameters, use_tqdm=False, lora_request=self._adapter)
        return found

    @contextlib.contextmanager
    def _loading(self, version: int) -> Iterator[None]:
        """Around all weights of a version."""
        self.version = -1
        with _as_it_was():
            self._rpc("begin_weights")
            yield
            self._rpc("end_weights")
        self._forget()
        self.version = version

    def _forget(self) -> None:
        """Keys and values that other weights computed."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it still works on something")

    def _rpc(self, method: str, *arguments: Any) -> list[Any]:
        """What each worker returns.

        Raises:
            ConnectionError: the trainer was lost to several, and nothing else is wrong.
            Gone: one of several is gone.
            RuntimeError: what went wrong in one of several; of a single worker, in this process, it is raised as it is.
        """
        if self.workers == 1:
            found: list[Any] = self._llm.collective_rpc(method, args=arguments)
            return found
        try:
            told = self._llm.collective_rpc("told", args=(method, *arguments))
        except Exception as error:  # which nothing that a worker raised is
            raise Gone(f"a worker of the vLLM is gone: {type(error).__name__}: {error}") from error
        if errors := sorted((lost, wrong) for wrong, lost, _ in told if wrong):  # others are lost where one is wrong
            lost, wrong = errors[0]
            raise ConnectionError(wrong) if lost else RuntimeError(wrong)
        return [value for _, _, value in told]


def _answer(output: Any) -> Answer:
    tokens = tuple(output.token_ids)
    logps = tuple(place[token].logprob for place, token in zip(output.logprobs, tokens, strict=True))
    return Answer(tokens, logps, "stop" if output.finish_reason == "stop" else "length")


def _vllm() -> Any:
    """The module, told to stay in this process and to keep quiet.

    Raises:
        RequestError: it can't be imported.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers of each start
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it takes fewer
    try:
        with _as_it_was(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its own ways with torch
            import vllm
    except Exception as error:  # a library of another build fails in any way
        what = f"--engine vllm: importing vllm failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RequestError(Problem(what, HINT)) from error
    return vllm


def _executor(workers: int) -> str:
    """vLLM's: in this process, where several ranks are found by the environment of torchrun; or a process for each
    worker."""
    if workers > 1:
        # it would bind each worker's threads to a memory node of its own, and most machines have one
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        return "mp"
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        return "uni"
    place = here()
    known = {
        "RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": place.address, "MASTER_PORT": place.port,
    }  # fmt: skip
    for name, value in known.items():
        os.environ.setdefault(name, str(value))
    return "external_launcher"


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """vLLM seeds the generators of its process, sets the number of threads, takes away the means to set it, and tells
    its environment that a rank is alone on its machine; they are the trainer's."""
    environment = dict(os.environ)
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            os.environ.update(environment)  # what is new in it is vLLM's own
            random.setstate(python)
            np.random.set_state(numbers)
            torch.set_num_threads = setter
            torch.set_num_threads(threads)


def _memory() -> str | None:
    """A folder in memory, where the system has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
