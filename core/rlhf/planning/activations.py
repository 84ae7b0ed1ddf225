"""What a transformer's forward keeps for its backward, and what it needs while it computes.

Of a layer of D wide stream, heads x head size Q, key heads x head size K, MLP width I, for each token:

    norms       D x 4 bytes each (they compute in float32); trained, the normalised input too. Where they are computed
                in one pass, D in the stream's precision and a number
    attention   Q + 2 K in the precision of products: queries, keys, values; the output Q where the kernel or the
                matrix behind it asks for it
    MLP         gated 3 I (gate, its activation, up; in one pass 2 I), else I; their product where the last matrix asks
                for it
    inputs      D where a matrix that is trained, or has adapters, reads the stream. Where products are autocast, each
                such matrix keeps a copy of its own in the lower precision
    adapters    the rank of each; with a magnitude a row (DoRA), what comes out of both, its matrix and the adapter
    weights     autocast ones are kept in the lower precision too, once; where layers are computed again in the
                backward, by the autocast of the forward alone, till its end

Checked against the tensors that autograd really saves (tests/plugins/memory/test_memory_footprint.py).
"""

from __future__ import annotations

from rlhf.planning.footprint import Activations, ForwardBatch, ModuleMemory

FLOAT32 = 4.0


def transformer(
    module: ModuleMemory,
    batch: ForwardBatch,
    *,
    chunk: int | None = None,
    shares: bool = False,
    flat: bool = False,
    products: bool = False,
    fused: bool = False,
    most_scores: int | None = None,
) -> Activations:
    """Bytes of one forward of a decoder, and of its backward.

    Args:
        chunk: response tokens whose logits are held at once; None: all.
        shares: where it is less, a prompt's responses stand behind it in one row.
        flat: all sequences stand in one row, each prompt once.
        products: attention by matrix products, which holds its scores, and no output for the backward.
        fused: RMS norms and gated activations in one pass.
        most_scores: that it holds at once; None: all.
    """
    a = module.architecture
    tokens = batch.tokens
    if flat:
        tokens = batch.rows // batch.group * batch.prompt + batch.rows * batch.response
    elif shares:
        tokens = row_tokens(batch, a.hidden)
    width = batch.prompt + batch.response
    scores = float(batch.rows * a.heads * width * width) if products else 0.0
    scores = min(scores, most_scores or scores) * module.compute
    layer = layer_bytes(module, products, fused) * tokens
    states = batch.rows * batch.response * a.hidden * module.stream if batch.scored else 0.0
    passing = tokens * (3 * a.hidden * module.stream + 4 * a.inner * module.compute) + unpacked(module)
    head = head_bytes(module, batch, chunk)
    if not batch.gradient:
        cast = lowered(module)  # autocast keeps them till the forward's end, the head's among them
        working = passing + 2 * scores + 2 * states + cast
        return Activations(kept=0.0, working=working, head=head and head + states + cast)
    norm = norm_bytes(module, fused)
    ends = tokens * (norm + 2 * a.head_size * module.stream) + states  # the last norm, rotary positions
    if not any(w.trained for w in module.weights if w.kind == "embedding"):
        ends -= tokens * norm  # the first norm's input asks for no gradient
    away = "activations" in module.host
    if module.recomputes:
        layers, rest = a.layers * tokens * a.hidden * module.stream, ends
        passing += layer + lowered(module) / a.layers  # of the backward
        head += lowered(module)  # of the forward
    else:
        layers, rest = a.layers * layer, ends + lowered(module)
    kept, host = (rest, layers) if away else (layers + rest, 0.0)
    return Activations(kept=kept, working=passing + 4 * scores, head=head, host=host)


def row_tokens(batch: ForwardBatch, hidden: int) -> int:
    """Padded tokens where a group's responses share their prompt's row if that costs less, attention included: a pair
    of tokens is 0.4 / D of a token's products, and a row with a mask skips none of them."""
    apart = batch.prompt + batch.response
    row = batch.prompt + batch.group * batch.response
    pair = 0.4 / hidden
    if row + pair * row * row < batch.group * (apart + 0.75 * pair * apart * apart):
        return batch.rows // batch.group * row
    return batch.tokens


def layer_bytes(module: ModuleMemory, products: bool, fused: bool) -> float:
    """Kept of one token and layer."""
    a, e, s = module.architecture, module.compute, module.stream
    query, key = a.heads * a.head_size, a.key_heads * a.head_size
    saved = [w for w in module.weights if w.name in module.saved_inputs and w.kind == "linear"]
    at = {place: [w for w in saved if w.place == place] for place in ("qkv", "out", "up", "down")}
    apart = s > e  # each product makes a copy of its own
    total = a.norms * norm_bytes(module, fused)
    total += e * a.hidden * (len(at["qkv"]) + len(at["up"]) if apart else bool(at["qkv"]) + bool(at["up"]))
    total += e * (query + 2 * key) + (0.0 if products else FLOAT32 * a.heads)
    total += e * query if at["out"] or not products else 0.0
    gates = 2 if fused and a.plain_gates else 3
    total += e * a.inner * ((gates if a.gated else 1) + bool(at["down"]))
    if any(w.name in ("qk_norm", "q_norm") for w in module.weights):
        total += (query + key) * (e if fused and a.plain_norms else FLOAT32)
    adapters = [w for w in module.weights if w.kind == "adapter"]
    total += e * sum(w.shape[0] for w in adapters if w.name.endswith(".A"))
    return total + 2 * e * sum(w.shape[0] for w in adapters if w.name.endswith(".magnitude"))


def norm_bytes(module: ModuleMemory, fused: bool) -> float:
    """Kept of one token by one norm."""
    if fused and module.architecture.plain_norms:
        return module.architecture.hidden * module.stream + FLOAT32
    trained = any(w.trained and w.name == "norm" for w in module.weights)
    return module.architecture.hidden * (FLOAT32 + (module.stream if trained else 0.0)) + FLOAT32


def lowered(module: ModuleMemory) -> float:
    """Of weights of more bytes than products take, the copies that autocast makes and the backward reads."""
    kinds = ("linear", "adapter")
    return sum(w.numbers * module.compute for w in module.weights if w.kind in kinds and w.bytes_each > module.compute)


def unpacked(module: ModuleMemory) -> float:
    """The largest of the packed weights, unpacked."""
    if not module.unpacks:
        return 0.0
    return max((w.numel * module.compute for w in module.weights if w.kind == "linear"), default=0.0)


def head_bytes(module: ModuleMemory, batch: ForwardBatch, chunk: int | None) -> float:
    """The most that a chunk takes. Of V logits a token: in the precision of products, in float32 for their softmax, and
    once more while it adds up their exponentials; where they are compared with another model's, that one's too, and the
    slope. In the backward, when logits and their gradient have gone, the
    head's own where it is trained: in the precision of products, from which it is cast, beside that of the chunks
    before. Of a head that is the embedding, that of the other end, which it is added to."""
    if module.scalar or not batch.scored:
        return 0.0
    a, e = module.architecture, module.compute
    count = min(batch.rows * batch.response, chunk or batch.rows * batch.response)
    lower = e < FLOAT32
    more = (FLOAT32 if batch.entropy else 0.0) + ((e if lower else 0.0) + 3 * FLOAT32 if batch.compared else 0.0)
    logits = count * a.vocabulary * ((e if lower else 0.0) + 2 * FLOAT32 + more)
    if not batch.gradient:
        return logits
    head = [w for w in module.weights if w.kind == ("embedding" if a.tied else "head")]
    copy = a.head_numbers * e if lower and head and head[0].bytes_each > e else 0.0
    if not (head and head[0].trained):
        return copy + logits
    several = count < batch.rows * batch.response
    own = a.head_numbers * ((e if lower else 0.0) + (FLOAT32 if several else 0.0))
    return max(copy + logits, copy + own, a.head_numbers * FLOAT32 if a.tied else 0.0)
