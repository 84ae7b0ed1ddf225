"""Sampling by vLLM (Kwon et al. 2023, arXiv:2309.06180): keys and values in pages, sequences that enter and leave at
every step. It has its own copy of the weights, which is brought up to date after every step and checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.api import (
    Engine,
    Generation,
    LoadSpec,
    LogProbs,
    Policy,
    RunError,
    Sample,
    Sequences,
    State,
    Weights,
    here,
)
from rlhf_plugins.engines.vllm import check
from rlhf_plugins.engines.vllm import weights as streams
from rlhf_plugins.engines.vllm.entry import Cache, cache_bytes, longest_sequence
from rlhf_plugins.engines.vllm.places import sampler_at
from rlhf_plugins.engines.vllm.sampler import Ask, Sampler, Settings
from rlhf_plugins.engines.vllm.ways import way_of
from rlhf_plugins.policies.loading import adapter_config

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""


class VLLMEngine(Engine):
    """See the module."""

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self._calls = 0
        self._syncs = 0
        self._due = False
        """The next responses are to be compared with the trainer's forward."""
        self._weights: Weights | None = None
        """The last that it was given."""
        self._sampler: Sampler | None = None
        self._asleep = False
        self._way = way_of(context.plan, config).name

    def attach(self, module: nn.Module, policy: Policy, spec: LoadSpec) -> None:
        """
        Raises:
            RequestError: vLLM can't serve this model, or not in this environment.
        """
        self._module: Any = module
        inner: Any = getattr(module, "get_base_model", lambda: module)()
        codec = policy.codec(spec.model)
        text = inner.config.get_text_config()
        self._context: int | None = getattr(text, "max_position_embeddings", None)
        prompt = getattr(policy.config, "max_prompt_tokens", None)
        self._longest = longest_sequence(self.config, self._context, prompt)
        ends = getattr(inner.generation_config, "eos_token_id", None)
        self._stops = tuple(sorted({codec.eos, *([ends] if isinstance(ends, int) else ends or ())}))
        self._dtype = _dtype(self.config.dtype, spec)
        truncated = self.config.top_p < 1.0 or self.config.top_k > 0
        exact = self._dtype == torch.float32 and spec.compute in (None, torch.float32) and not truncated
        self.logprobs = LogProbs(exact=exact, truncated=truncated)
        self._settings = self._settings_for(spec, text)
        self._sampler = sampler_at(self.config, self._settings, self.context)

    def generate(self, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        """See `rlhf.api.Engine`. Log-probs are those of the distribution that was sampled; of a greedy token those at
        temperature 1, and none where others of the batch have another.

        Raises:
            RunError: a prompt fills the model's context; or the engine doesn't hold the trainer's weights.
        """
        heat = self.config.temperature if temperature is None else temperature
        prompts = {id(request.prompt): request.prompt for request in requests}  # several requests may share one
        place = {key: i for i, key in enumerate(prompts)}
        asks, prompt_of = [], []
        for r, request in enumerate(requests):
            for j in range(request.count):
                asks.append(self._ask(request, r, j, 0.0 if request.greedy else heat))
                prompt_of.append(place[id(request.prompt)])
        sampler = self._ready()
        if sampler.version < 0:
            raise RunError("--engine vllm was asked for responses before it was given weights")
        answers = sampler.sample(asks)
        self._calls += 1
        sequences = Sequences.of(
            [prompt.tokens for prompt in prompts.values()],
            [torch.tensor(answer.tokens, dtype=torch.long) for answer in answers],
            prompt_of=prompt_of,
        )
        logp = torch.tensor([value for answer in answers for value in answer.logps], dtype=torch.float32)
        if self._due:
            self._due = False
            self._check(sampler, sequences, asks, logp)
        mixed = heat not in (0.0, 1.0) and any(request.greedy for request in requests)
        if hasattr(sampler, "restarted"):
            self.context.metrics.mean("perf/engine_restarts", float(sampler.restarted))
        finish = tuple(answer.finish for answer in answers)
        failed = {i: answer.failed for i, answer in enumerate(answers) if answer.failed}
        self._rest()
        return Generation(sequences, None if mixed else logp, finish, sampler.version, failed)

    def sync(self, weights: Weights, version: int) -> None:
        """See `rlhf.api.Engine`; the first brings all weights, whatever the way."""
        sampler = self._ready()
        self._weights = weights
        if self._way == "reload":
            sampler.load(streams.plain(self._module, weights), version)
        else:
            if sampler.version < 0:
                sampler.load(streams.base(self._module, weights), version)
            tensors = streams.adapter(self._module, weights)
            sampler.load_adapter(tensors, streams.adapter_config(self._module), version)
        every = self.config.check_every
        self._due = self._due or self._syncs == 0 or (every > 0 and self._syncs % every == 0)
        self._syncs += 1

    def state(self) -> State:
        """The checks of a run that goes on begin anew, with the first."""
        return {"calls": self._calls}

    def load_state(self, state: State) -> None:
        self._calls = state["calls"]

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    # One request

    def _ask(self, request: Sample, r: int, j: int, temperature: float) -> Ask:
        size = len(request.prompt.tokens)
        limit = min([self.config.max_new_tokens, *([self._longest - size] if self._longest is not None else [])])
        if limit < 1:
            raise RunError(f"a prompt of {size} tokens leaves no room to answer in {self._longest} tokens")
        seed = (request.seed, j) if request.seed is not None else (self.context.seed, self._calls, r, j)
        return Ask(
            prompt=tuple(request.prompt.tokens.tolist()),
            seed=_seed(seed),
            max_tokens=limit,
            temperature=temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            stop=self.config.stop,
            stop_tokens=self._stops,
        )

    # Sleep

    def _ready(self) -> Sampler:
        if self._sampler is None:
            raise RunError("--engine vllm was asked before it met a model, or after it was closed")
        if self._asleep:
            self._sampler.wake()
            self._asleep = False
        return self._sampler

    def _rest(self) -> None:
        if self.config.sleep and self._sampler is not None:
            self._sampler.sleep()
            self._asleep = True

    # The check

    def _check(self, sampler: Sampler, sequences: Sequences, asks: Sequence[Ask], logp: Tensor) -> None:
        """A meeting of all ranks, where there is a trainer to compare with.

        Raises:
            RunError: on every rank, any of them differs; names the weights that do.
        """
        if self.trainer_logp is None:
            return
        rows = check.sample_of(sequences)
        few = sequences.select(rows)
        heats = {asks[row].temperature for row in rows.tolist()} or {1.0}
        mixed = int(self.context.world.max(torch.tensor(len(heats))))  # all ranks ask, or none: one may speak for them
        if self.logprobs.truncated or mixed > 1:
            own, heat = self._scored(sampler, few), 1.0
        else:
            own, heat = logp[sequences.token_index(rows)], heats.pop() or 1.0  # of greedy tokens they are at 1
        found = check.gap(own, self.trainer_logp(few, heat), self.context.world)
        tolerance = check.TOLERANCES[self._dtype]
        if found.tokens and not found.within(tolerance):
            raise RunError(self._difference(sampler, found, tolerance))

    def _scored(self, sampler: Sampler, sequences: Sequences) -> Tensor:
        """Log-probs of response tokens at temperature 1, where those of sampling are of another distribution."""
        prompts = [sequences.prompt(i).tolist() for i in range(len(sequences))]
        whole = [(*prompt, *response.tolist()) for prompt, response in zip(prompts, sequences.responses(), strict=True)]
        found = sampler.score(whole)
        return torch.tensor(
            [value for prompt, scores in zip(prompts, found, strict=True) for value in scores[len(prompt) - 1 :]]
        )

    def _difference(self, sampler: Sampler, found: check.Gap, tolerance: check.Tolerance) -> str:
        assert self._weights is not None
        stream = (streams.plain if self._way == "reload" else streams.base)(self._module, self._weights)
        limit = check.WEIGHT_TOLERANCES[self._dtype]
        own, count = check.differing(stream(), sampler.fingerprints, limit)
        apart: dict[str, float] = {}
        for other in self.context.world.gather(own):
            apart.update(other)
        name = str(self._dtype).removeprefix("torch.")
        most = "" if tolerance.largest is None else f", {tolerance.largest:g} at most"
        what = (
            f"--engine vllm: its log-probs are not those of the policy's own forward after sync {self._syncs} (version "
            f"{sampler.version}): off by {found.mean:.3g} on average, {found.largest:.3g} at most, on {found.tokens} "
            f"tokens, where {name} allows {tolerance.mean:g} on average{most}"
        )
        if apart:
            worst = ", ".join(f"{key} (by {value:.0%})" for key, value in list(apart.items())[:5])
            more = f" and {len(apart) - 5} more" if len(apart) > 5 else ""
            return f"{what}. It holds other weights than it was given: {worst}{more}, of {count} compared"
        under = " under the adapters" if self._way == "adapter" else ""
        where = "the adapters, or how it computes" if under else "how it computes, or keys and values of old weights"
        return f"{what}. The {count} weights{under} that could be compared are as given, so it is {where}"

    # How it is started

    def _settings_for(self, spec: LoadSpec, text: Any) -> Settings:
        config, gpu = self.config, torch.device(spec.device).type == "cuda"
        adapted = adapter_config(spec.model)
        arguments: dict[str, Any] = {
            "tokenizer": spec.model,
            "skip_tokenizer_init": not config.stop,
            "trust_remote_code": spec.trust_remote_code,
            "dtype": str(self._dtype).removeprefix("torch."),
            "load_format": "dummy",  # the trainer's weights come before the first response
            "generation_config": "vllm",  # no defaults of the model's own: an `Ask` says all
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled
            "seed": self.context.seed % (1 << 31),
            "max_num_seqs": config.max_num_seqs,
            "enable_prefix_caching": config.enable_prefix_caching,
            "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not gpu,
            "tensor_parallel_size": config.tensor_parallel_size,
            "disable_log_stats": True,
        }
        if self._longest is not None:
            arguments["max_model_len"] = self._longest
        if gpu:
            arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
            arguments["enable_sleep_mode"] = config.sleep
        else:
            arguments["block_size"] = 32  # the smallest that its attention likes: so shorter prompts are shared
            # A prompt that is cut makes it take back what it drew from a seeded generator, which a CPU's can't (0.32)
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(4096, self._longest or 0)
        cache = self._cache_bytes(text, gpu)
        if cache is not None:
            arguments["kv_cache_memory_bytes"] = cache
        if self._way == "adapter":
            rank = next(iter(self._module.peft_config.values())).r
            arguments.update(enable_lora=True, max_loras=1, max_lora_rank=next(size for size in _RANKS if size >= rank))
        return Settings(spec.model if adapted is None else adapted.base_model_name_or_path, arguments)

    def _cache_bytes(self, text: Any, gpu: bool) -> int | None:
        if gpu or self.config.kv_cache_memory_bytes is not None:
            return self.config.kv_cache_memory_bytes  # type: ignore[no-any-return]
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys, workers = getattr(text, "num_key_value_heads", None) or heads, self.config.tensor_parallel_size
        cache = Cache(text.num_hidden_layers, max(keys // workers, 1), size, self._dtype.itemsize)
        memory = self.context.plan.machine.memory_bytes / here().local_size / workers
        return cache_bytes(self.config, cache, self._longest or 4096, memory)


def _dtype(name: str, spec: LoadSpec) -> torch.dtype:
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    return spec.compute or spec.weights


def _seed(numbers: Sequence[int]) -> int:
    """One number of 63 bits."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))
