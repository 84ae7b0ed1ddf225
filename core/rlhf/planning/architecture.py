"""The weights of a model, counted from its `config.json`.

A decoder is embeddings, layers of attention and an MLP with norms between, and a head. What differs between families
(which matrices have a bias, how many norms, what is fused) stands in `FAMILIES`, by `model_type`; sizes come from the
config. Each count is checked against transformers' own model on the meta device. A type that isn't here can't be
counted, and is told so: a guess that is off by a bias is no harm, one that is off by a layer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs

from rlhf.facts import ModelFacts

Kind = Literal["linear", "embedding", "head", "vector", "adapter", "score"]
"""`linear`: a matrix in a layer, which is what is adapted and quantised. `vector`: norms, biases. `score`: a scalar
head."""
Place = Literal["", "qkv", "out", "up", "down"]
"""Of a linear weight in its layer: those that read the attention's input, its output, the MLP's input, its inside."""
Switch = bool | str
"""A fact of the family, or the config key that tells it."""


@attrs.frozen(kw_only=True)
class Weight:
    """Tensors alike: one in each layer, or one alone."""

    name: str
    """The last part of the module's name, such as q_proj."""
    shape: tuple[int, ...]
    """Of one, as torch keeps a linear weight: [out, in]."""
    kind: Kind
    count: int = 1
    bytes_each: float = 4.0
    """Of a number."""
    beside: float = 0.0
    """Bytes kept with each tensor, such as the scales of quantised weights."""
    trained: bool = False
    place: Place = ""
    """What a linear weight reads or writes."""
    borrowed: bool = False
    """It is another role's module's: read here, held and counted there."""
    share: float = 1.0
    """Of its numbers that one token is multiplied by: less than 1 for experts."""

    @property
    def numel(self) -> int:
        """Of one tensor."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def numbers(self) -> int:
        return self.count * self.numel

    @property
    def bytes(self) -> float:
        return self.count * (self.numel * self.bytes_each + self.beside)


@attrs.frozen(kw_only=True)
class Architecture:
    """A causal language model's sizes and weights. Numbers, not bytes: precision is a strategy's business."""

    model_type: str
    hidden: int
    """D, the width of the residual stream."""
    layers: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    """Width of the MLP; of experts the width that one token goes through."""
    gated: bool
    vocabulary: int
    tied: bool
    """The vocabulary head is the embedding."""
    windows: tuple[int | None, ...]
    """Of each layer: the most tokens that a query sees, None is all."""
    norms: int
    """Norms of a layer that are as wide as the stream."""
    plain_norms: bool
    """They are RMS norms, times a weight."""
    plain_gates: bool
    """Its MLP is silu(gate) x up, of two matrices."""
    weights: tuple[Weight, ...]

    @property
    def parameters(self) -> int:
        return sum(weight.numbers for weight in self.weights)

    @property
    def head_numbers(self) -> int:
        """Of the vocabulary head."""
        return self.vocabulary * self.hidden


@attrs.frozen(kw_only=True)
class Family:
    """How a `model_type` differs from Llama."""

    tied: bool = False
    """Where the config doesn't say."""
    qkv_bias: Switch = False
    out_bias: Switch = False
    gated: bool = True
    mlp_bias: Switch = False
    norms: int = 2
    norm_bias: bool = False
    norm_weight: bool = True
    norm_offset: bool = False
    """Norms multiply by 1 + weight."""
    qk_norm: Literal["", "head", "width"] = ""
    """Norms of queries and keys: over a head, or over all heads."""
    fused_qkv: bool = False
    fused_mlp: bool = False
    head_size: int | None = None
    """Where the config doesn't say; None is hidden / heads."""
    positions: int | None = None
    """Learnt positions, so many beside the config's; None: there are none."""
    head_bias: bool = False
    final_norm: bool = True
    inner_default: int | None = None
    """MLP width in units of hidden, where the config says nothing."""
    experts: bool = False
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """query, key, value, out, gate, up, down; fused ones under their own name at the first's place."""


_PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "", "up_proj", "down_proj")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "smollm3": Family(tied=True, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "granite": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head", head_size=128),
    "gemma": Family(tied=True, qkv_bias="attention_bias", out_bias="attention_bias", norm_offset=True, head_size=256),
    "gemma2": Family(
        tied=True, qkv_bias="attention_bias", out_bias="attention_bias", norms=4, norm_offset=True, head_size=256
    ),
    "gemma3_text": Family(
        tied=True, qkv_bias="attention_bias", out_bias="attention_bias", norms=4, qk_norm="head",
        norm_offset=True, head_size=256,
    ),
    "olmo": Family(qkv_bias="attention_bias", out_bias="attention_bias", norm_weight=False),
    "olmo2": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="width"),
    "phi3": Family(
        fused_qkv=True, fused_mlp=True, names=("qkv_proj", "", "", "o_proj", "gate_up_proj", "", "down_proj")
    ),
    "starcoder2": Family(
        tied=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", gated=False, norm_bias=True,
        names=("q_proj", "k_proj", "v_proj", "o_proj", "", "c_fc", "c_proj"),
    ),
    "phi": Family(
        qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norms=1, norm_bias=True, head_bias=True,
        names=("q_proj", "k_proj", "v_proj", "dense", "", "fc1", "fc2"),
    ),
    "gpt2": Family(
        tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True, fused_qkv=True,
        positions=0, inner_default=4, names=("c_attn", "", "", "c_proj", "", "c_fc", "c_proj"),
    ),
    "gpt_neox": Family(
        qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True, gated=False, norm_bias=True,
        fused_qkv=True, names=("query_key_value", "", "", "dense", "", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Family(
        tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True, positions=2,
        names=("q_proj", "k_proj", "v_proj", "out_proj", "", "fc1", "fc2"),
    ),
    "mixtral": Family(experts=True),
    "qwen3_moe": Family(
        experts=True, qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head"
    ),
}  # fmt: skip
"""By `model_type`."""


class Uncountable(ValueError):  # noqa: N818 - no fault: it is told, and the rest is counted
    """A model whose sizes the planner can't tell; says why."""


def architecture(model: ModelFacts) -> Architecture:
    """Sizes and weights of a causal language model.

    Raises:
        Uncountable: its `config.json` isn't known, is of another type, or lacks a size.
    """
    if not model.known:
        raise Uncountable(f"{model.path}: its config.json is not here yet")
    model_type = str(model.get("model_type") or "")
    family = FAMILIES.get(model_type)
    nested = (model.config or {}).get("text_config")
    if family is None and isinstance(nested, dict):
        family = FAMILIES.get(str(nested.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise Uncountable(f"{model.path}: models of type {model_type!r} can't be counted; known: {known}")

    def size(*names: str, default: int | None = None) -> int:
        value = model.get(*names)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is None and default is not None:
            return default
        raise Uncountable(f"{model.path}: config.json has no usable {names[0]}")

    hidden = size("hidden_size", "n_embd", "d_model")
    layers = size("num_hidden_layers", "n_layer")
    heads = size("num_attention_heads", "n_head")
    head_size = size("head_dim", default=family.head_size or hidden // heads)
    scale = family.inner_default
    inner = size("intermediate_size", "n_inner", "ffn_dim", default=scale * hidden if scale else None)
    tied = model.get("tie_word_embeddings")
    sizes = _Sizes(
        family=family,
        model=model,
        hidden=hidden,
        layers=layers,
        query=heads * head_size,
        key=size("num_key_value_heads", default=heads) * head_size,
        head=head_size,
        inner=inner,
        vocabulary=size("vocab_size"),
        tied=family.tied if tied is None else bool(tied),
    )
    experts = _experts(sizes, size) if family.experts else ()
    per_token = sum(round(w.share * w.shape[0]) * w.shape[-1] for w in experts if w.name == "down_proj")
    return Architecture(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_heads=sizes.key // head_size,
        head_size=head_size,
        inner=per_token if experts else inner,
        gated=family.gated,
        vocabulary=sizes.vocabulary,
        tied=sizes.tied,
        windows=_windows(model, layers),
        norms=family.norms,
        plain_norms=family.norm_weight and not (family.norm_bias or family.norm_offset),
        plain_gates=family.gated and not (family.fused_mlp or experts) and model.get("hidden_act") == "silu",
        weights=tuple(_weights(sizes, experts)),
    )


@attrs.frozen(kw_only=True)
class _Sizes:
    family: Family
    model: ModelFacts
    hidden: int
    layers: int
    query: int
    key: int
    head: int
    inner: int
    vocabulary: int
    tied: bool

    def on(self, switch: Switch) -> bool:
        return bool(self.model.get(switch)) if isinstance(switch, str) else switch


def _weights(s: _Sizes, experts: tuple[Weight, ...]) -> Iterator[Weight]:
    f, d = s.family, s.hidden
    query, key, value, out, gate, up, down = f.names
    yield Weight(name="embed_tokens", shape=(s.vocabulary, d), kind="embedding")
    if f.positions is not None:
        places = int(s.model.get("n_positions", "max_position_embeddings") or 0) + f.positions
        yield Weight(name="positions", shape=(places, d), kind="embedding")
    if f.fused_qkv:
        yield from _linear(s, "qkv", query, s.query + 2 * s.key, d, f.qkv_bias)
    else:
        yield from _linear(s, "qkv", query, s.query, d, f.qkv_bias)
        yield from _linear(s, "qkv", key, s.key, d, f.qkv_bias)
        yield from _linear(s, "qkv", value, s.key, d, f.qkv_bias)
    yield from _linear(s, "out", out, d, s.query, f.out_bias)
    if experts:
        yield from experts
    elif f.fused_mlp:
        yield from _linear(s, "up", gate, 2 * s.inner, d, f.mlp_bias)
        yield from _linear(s, "down", down, d, s.inner, f.mlp_bias)
    else:
        if f.gated:
            yield from _linear(s, "up", gate, s.inner, d, f.mlp_bias)
        yield from _linear(s, "up", up, s.inner, d, f.mlp_bias)
        yield from _linear(s, "down", down, d, s.inner, f.mlp_bias)
    vectors = int(f.norm_weight) + int(f.norm_bias)
    if vectors:
        yield Weight(name="norm", shape=(d,), kind="vector", count=vectors * (f.norms * s.layers + int(f.final_norm)))
    if f.qk_norm == "head":
        yield Weight(name="qk_norm", shape=(s.head,), kind="vector", count=2 * s.layers)
    if f.qk_norm == "width":
        yield Weight(name="q_norm", shape=(s.query,), kind="vector", count=s.layers)
        yield Weight(name="k_norm", shape=(s.key,), kind="vector", count=s.layers)
    if not s.tied:
        yield Weight(name="lm_head", shape=(s.vocabulary, d), kind="head")
    if f.head_bias:
        yield Weight(name="lm_head.bias", shape=(s.vocabulary,), kind="head")


def _linear(s: _Sizes, place: Place, name: str, rows: int, columns: int, bias: Switch) -> Iterator[Weight]:
    yield Weight(name=name, shape=(rows, columns), kind="linear", count=s.layers, place=place)
    if s.on(bias):
        yield Weight(name=f"{name}.bias", shape=(rows,), kind="vector", count=s.layers)


def _experts(s: _Sizes, size: Any) -> tuple[Weight, ...]:
    """Their matrices are one tensor a layer, [experts, out, in]; a router picks some for each token."""
    count = size("num_local_experts", "num_experts")
    share = size("num_experts_per_tok") / count
    inner = size("moe_intermediate_size", default=s.inner)
    d = s.hidden
    return (
        Weight(name="gate", shape=(count, d), kind="vector", count=s.layers),  # the router: no linear module
        Weight(name="gate_up_proj", shape=(count, 2 * inner, d), kind="vector", count=s.layers, share=share),
        Weight(name="down_proj", shape=(count, d, inner), kind="vector", count=s.layers, share=share),
    )


def _windows(model: ModelFacts, layers: int) -> tuple[int | None, ...]:
    window = model.get("sliding_window")
    if not window or model.get("use_sliding_window") is False:
        return (None,) * layers
    if not isinstance(window, int):
        raise Uncountable(f"{model.path}: config.json has no usable sliding_window")
    kinds = model.get("layer_types")
    if not kinds:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
