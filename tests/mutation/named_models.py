"""Named errors in policies, engines, memory strategies, optimiser and backend. Rows as in `named_algorithms`."""

from __future__ import annotations

P = "plugins/rlhf_plugins"
T = "tests/plugins"
SCORES = f"{T}/policies/test_policies_scores.py"
PLAIN = f"{SCORES}::test_logp_entropy_and_their_gradients_are_those_of_a_plain_forward"
SHARED = f"{SCORES}::test_several_responses_stand_behind_one_prompt_where_the_model_allows_it"
SHARED_BASE = f"{T}/memory/test_memory_shared_base.py"
ENGINE = f"{T}/engines/test_engines_hf.py"

HEADS = (
    ("head: temperature forgotten", "log-probs of another distribution than was sampled",
     "return z / temperature if z is logits else z.div_(temperature)", "return z"),
    ("head: temperature multiplies", "hot is cold", "return z / temperature if z is logits else z.div_(temperature)",
     "return z * temperature if z is logits else z.mul_(temperature)"),
    ("head: tempered in place", "the caller's logits are overwritten", "return z / temperature if z is logits",
     "return z.div_(temperature) if z is logits"),
    ("head: temperature forgotten in the gradient", "steps of another size",
     "of_logp, of_entropy = grads[0] / ctx.temperature", "of_logp, of_entropy = grads[0] / 1.0"),
    ("head: temperature forgotten in the gradient's softmax", "the gradient of another distribution",
     "log_p = _tempered(logits, ctx.temperature)", "log_p = _tempered(logits, 1.0)"),
    ("head: not normalised", "logits for log-probs", "targets[:, None]).squeeze(-1) - log_z",
     "targets[:, None]).squeeze(-1)"),
    ("head: entropy's sign", "negative entropy", "spread = log_z - (torch", "spread = -log_z + (torch"),
    ("head: the gradient at the target is forgotten", "every token becomes less likely",
     "grad.scatter_add_(-1, targets[:, None], of_logp[:, None])", "pass"),
    ("head: the gradient's sign", "likelihood falls", "grad = log_p.exp_().mul_(-of_logp",
     "grad = log_p.exp_().mul_(of_logp"),
    ("reward head: 1/(d + 1)", "the paper's missing root",
     "1.0 / math.sqrt(parameter.shape[1] + 1)", "1.0 / (parameter.shape[1] + 1)"),
    ("reward head: its bias is drawn", "scores are off by a constant",
     'init == "normal" and parameter.dim() == 2', 'init == "normal"'),
    ("reward head: always the same", "the seed is ignored", "torch.Generator().manual_seed(seed)",
     "torch.Generator().manual_seed(0)"),
    ("logits: scale upside down", "Cohere's divided, Granite's multiplied",
     "logits = logits * scale", "logits = logits / scale", (SCORES,)),
    ("logits: cap forgotten", "Gemma's logits are not capped",
     "return torch.tanh(logits / cap) * cap if cap else logits", "return logits", (SCORES,)),
)  # fmt: skip

LAYOUT = (
    ("layout: positions off by one", "a response stands one place too far",
     "torch.arange(len(prompt), len(prompt) + size)", "torch.arange(len(prompt) + 1, len(prompt) + size + 1)"),
    ("layout: positions run on behind a shared prompt", "the second response stands behind the first",
     "positions[r, at : at + size] = torch.arange(len(prompt), len(prompt) + size)", "pass"),
    ("layout: responses see each other", "one prompt's completions leak",
     "(part[:, :, None] == part[:, None, :])", "(part[:, :, None] >= part[:, None, :])"),
    ("layout: responses don't see their prompt", "mask too tight", " | (part[:, None, :] == 0)", ""),
    ("layout: not causal", "tokens see what follows them", "mask = (own & causal)[:, None]", "mask = own[:, None]"),
    ("layout: states at the token, not before it", "each token is predicted from itself",
     "before.append(flat[:-1])", "before.append(flat[1:])"),
    ("layout: the first token read behind another response", "its state is the neighbour's last",
     "flat[0] = r * width + end - 1", "pass"),
    ("layout: the score read one token early", "before EOS", "last.append(flat[-1:])", "last.append(flat[-2:-1])"),
    ("layout: the row is forgotten", "states of the first row for all",
     "flat = r * width + torch.arange(at - 1, at + size)", "flat = torch.arange(at - 1, at + size)"),
    ("layout: starts off", "tokens put where the previous response's are",
     "starts = [0, *sequences.lengths.cumsum(0).tolist()]", "starts = sequences.lengths.cumsum(0).tolist()"),
)  # fmt: skip

TRUNK = (
    # These two are found at loading too, where a model is tried on a handful of tokens, and rows are no longer shared.
    ("trunk: positions aren't handed over", "the model counts by itself",
     '"position_ids": grid.positions.to(self.device)', '"position_ids": None', (SHARED,)),
    ("trunk: the mask isn't handed over", "completions see each other",
     "None if mask is None else mask.to(self.device)", "None", (SHARED,)),
    ("trunk: windowed models share rows", "a window counts the responses between", " or windowed:", ":",
     (SCORES,)),
    ("trunk: rows out of order", "sorted by length and left so",
     "return torch.cat(list(parts))[order.to(parts[0].device)]", "return torch.cat(list(parts))", (PLAIN,)),
    ("trunk: rows put in the inverse order", "order for its inverse",
     "order[torch.cat(list(places))] = torch.arange(len(order))", "order[:] = torch.cat(list(places))", (PLAIN,)),
    ("trunk: a model's own logits are not looked for", "its scale is unknown, and ignored",
     "own_forward = lm and not trunk.head_agrees()", "own_forward = False", (SCORES,)),
)  # fmt: skip

CHUNKS = (
    ("head: the last chunk is dropped", "as many whole chunks as there are",
     "for i in range(0, len(states), chunk):", "for i in range(0, len(states) - len(states) % chunk, chunk):"),
    ("head: targets of the first chunk", "other tokens", "[x[i : i + chunk] for x in (states, *beside)]",
     "[states[i : i + chunk], *(x[: len(states[i : i + chunk])] for x in beside)]"),
    ("head: all at once", "logits of every token are held", "for i in range(0, len(states), chunk):",
     "chunk = max(len(states), 1)\n    for i in range(0, len(states), chunk):"),
    ("head: kept for the backward", "logits of every chunk are held", "if torch.is_grad_enabled():", "if False:"),
)  # fmt: skip

POLICY = (
    ("policy: temperature isn't handed to the head", "ratios of another distribution",
     "temperature=request.temperature,", "temperature=1.0,", (PLAIN,)),
    ("policy: dropout stays on", "the ratio is never 1", "trunk.model.eval()  #", "pass  #"),
    ("policy: scalars of the last layer's wrong part", "the value reads its own token",
     "values, score = read.split([len(states), len(last)])",
     "score, values = read.split([len(last), len(states)])"),
    ("policy: autocast forgotten", "fp32 products where bf16 was asked for",
     "with trunk.autocast():\n            wants_last", "if True:\n            wants_last"),
)  # fmt: skip

CODEC = (
    ("codec: EOS not appended", "completions never end", "tokens = [*tokens, self.eos]", "tokens = [*tokens]"),
    ("codec: the turn cut before its end token", "EOS lost", "return tokens[: ends[-1] + 1] if ends",
     "return tokens[: ends[-1]] if ends"),
    ("codec: the end token of a turn isn't learnt", "EOS masked with the padding",
     "said = (ends[-1] + 1 if ends", "said = (ends[-1] if ends"),
    ("codec: what follows a turn is learnt", "the template's newline is never sampled",
     "said = (ends[-1] + 1 if ends else len(part)) if spoken", "said = len(part) if spoken"),
    ("codec: prompts cut on the other side", "left is right",
     'self._config.prompt_overflow == "left"', 'self._config.prompt_overflow == "right"'),
    ("codec: responses lose their beginning", "cut on the left", "tokens = tokens[:room]", "tokens = tokens[-room:]"),
    ("codec: no room for an answer", "a prompt may fill the context", "(context - 1 if context", "(context if context"),
    ("codec: two tokens that begin text", "a template's own and the tokenizer's", "special=messages is None)",
     "special=True)"),
    ("codec: completions tokenized alone", "a space of the tokenizer's own before each",
     "if before and whole[: len(prompt)] == prompt:", "if False:"),
    ("codec: a response's tokens begin in the prompt", "off by one", "return whole[len(prompt) :]",
     "return whole[len(prompt) - 1 :]"),
    ("codec: another prompt's tokens", "the last prompt's are kept for the next one",
     "if self._last is not None and self._last[0] == prompt:", "if self._last is not None:"),
)  # fmt: skip

ATTENTION = (
    ("attention: the scale forgotten in the query's gradient", "eight times too large", ".mul_(ctx.scale)", ""),
    ("attention: the mask forgotten", "the future is seen", ".masked_fill_(hidden, lowest)", ".mul_(1)"),
    ("attention: the mask turned round", "only the future is seen", "else ~attention_mask", "else attention_mask"),
    ("attention: causal without the token itself", "off by one", ".triu_(1)", ".triu_(0)"),
    ("attention: one row's mask for all", "other prompts' rows decide", "hidden = hidden[:, :, None]",
     "hidden = hidden[:1, :, None]"),
    ("attention: -inf where nothing is seen", "NaN in padding", "lowest = torch.finfo(scores.dtype).min",
     'lowest = float("-inf")'),
    ("attention: values' gradient untransposed weights", "weights of keys for weights of queries",
     "torch.bmm(weights.transpose(1, 2), grad)", "torch.bmm(weights[:, :width].contiguous(), grad[:, :width])"),
    ("attention: softmax's gradient forgotten", "of weights for of scores",
     "torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)", "of_weights"),
    ("attention: no limit on what is held", "a long row takes all memory", " and n * heads * count * width <= MOST",
     ""),
)  # fmt: skip

RAGGED = (
    ("flat: a query doesn't see itself", "off by one",
     "torch.arange(k) - free > torch", "torch.arange(k) - free >= torch"),
    ("flat: the next token is seen", "off by one",
     "torch.arange(k) - free > torch", "torch.arange(k) - free - 1 > torch"),
    ("flat: a response doesn't see its prompt", "only the first one does", "_pieces(response, (prompt,), costs)",
     "_pieces(response, (), costs)"),
    ("flat: a piece forgets what is before it", "a long text begins anew",
     "(*before, (start, a)) if a > start else before", "before"),
    ("flat: keys' gradients overwritten", "of the last stretch alone",
     "total[start:end] += part", "total[start:end] = part"),
    ("flat: gradients of what fills up", "places at the row's begin are pulled",
     "i, :, :, stretch.queries :\n                ] = 0",
     "i, :, :, stretch.queries :\n                ] += 0"),
    ("flat: the scale forgotten in the query's gradient", "too large", "of_q.mul_(ctx.scale)", "pass"),
    ("flat: keys' gradient of unscaled queries", "too large", "_gather(q, block.query, shared).mul_(ctx.scale)",
     "_gather(q, block.query, shared)"),
    ("flat: softmax's gradient forgotten", "of weights for of scores",
     "torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)", "of_weights"),
    ("flat: no limit on what is held", "a long row takes all memory", "-(-length * keys // costs.most)", "1"),
)  # fmt: skip

SAMPLING = (
    ("sampling: temperature forgotten", "always 1", "logits = logits.float() / temperature", "logits = logits.float()"),
    ("sampling: log-probs at another temperature", "the ratio isn't 1",
     "return tokens, logp.gather(", "return tokens, torch.log_softmax(logits * temperature, -1).gather("),
    ("sampling: off by one", "a token too few", "right=True", "right=False"),
    ("sampling: greedy draws", "evaluation is random", "torch.where(greedy, logits.argmax(-1)",
     "torch.where(~greedy, logits.argmax(-1)"),
    ("sampling: top-k one more", "off by one", "ordered[:, top_k:]", "ordered[:, top_k + 1 :]"),
    ("sampling: top-p without the one that reaches it", "less than top_p is kept",
     "before >= top_p", "(before + ordered.softmax(-1)) >= top_p"),
)  # fmt: skip

SLOTS = (
    ("cache: a freed slot keeps what it held", "a response goes on from another's keys",
     "buffer[row, :, : self.end] = buffer[self.rows, :, : self.end]", "pass"),
    ("cache: entered one column early", "keys of other positions",
     "layer.keys[self.rows, :, self.end - length : self.end]",
     "layer.keys[self.rows, :, self.end - length - 1 : self.end - 1]"),
    ("cache: values of another row", "row 0 for all", "= source.values[row, :", "= source.values[0, :"),
    ("cache: moved by one too many", "a column is lost", "self.start, self.end = end - width, end",
     "self.start, self.end = end - width + 1, end"),
    ("cache: moved onto itself", "the copy is a view", "self.start : self.end].clone()", "self.start : self.end]"),
)  # fmt: skip

HF_ENGINE = (
    ("engine: EOS lost", "the response is cut before it",
     'x.finish = "stop"', 'x.finish = "stop"; x.tokens.pop(); x.logps.pop()'),
    ("engine: cut off counts as ended", "no penalty where EOS is missing", 'x.finish = "length"', 'x.finish = "stop"'),
    ("engine: positions off by one", "decoding from other states",
     "place[:, -ids.shape[1] :].clamp(min=0)", "place[:, -ids.shape[1] :].clamp(min=0) + (ids.shape[1] == 1)"),
    ("engine: padding is seen", "a short prompt beside a long one changes",
     "attention_mask=(place >= 0).long()", "attention_mask=torch.ones_like(place)"),
    ("engine: one uniform for all tokens", "tokens are not independent", "x.uniform[len(x.tokens)]", "x.uniform[0]"),
    ("engine: a group's completions are the same", "the number in the group is forgotten",
     "seed = (request.seed, j)", "seed = (request.seed, 0)"),
    ("engine: every step samples alike", "calls are not counted", "self._calls += 1", "self._calls += 0"),
    ("engine: calls aren't restored", "a resumed run samples again what it had",
     'self._calls, self._version = state["calls"], state["version"]',
     'self._calls, self._version = 0, state["version"]'),
    ("engine: log-probs claimed exact though truncated", "ratios of two distributions",
     "not in spec.arguments and not truncated",
     "not in spec.arguments"),
    ("engine: log-probs claimed exact in bfloat16", "ratios of rounding",
     "full = spec.weights == torch.float32 and spec.compute in (None, torch.float32)",
     "full = spec.weights == torch.float32"),
    ("engine: the freed row's neighbour is forgotten", "a response decoded from another's slot",
     "active[row] = active[-1]", "pass"),
    ("engine: logits of the wrong prompt", "in the order of lengths",
     "torch.cat(logits)[[places[x.of] for x in entering]]",
     "torch.cat(logits)[[i % len(prompts) for i in range(len(entering))]]"),
    ("engine: only the tokenizer's end token stops", "a chat model runs on past its turn",
     "*([ends] if isinstance(ends, int) else ends or ())", ""),
    ("engine: temperature 0 is 1", "evaluation is random", "greedy=heat == 0)", "greedy=False)"),
    ("engine: dropout stays on", "samples of another policy", "self._module.eval()", "pass"),
    ("engine: the last length isn't reached", "off by one", "elif len(x.tokens) == x.limit:",
     "elif len(x.tokens) == x.limit - 1:"),
)  # fmt: skip

SCHEDULE = (
    ("schedule: the first step of warm-up is 0", "off by one, and lost", "return (step + 1) / rising",
     "return step / rising"),
    ("schedule: warm-up ends late", "off by one", "if step < rising:", "if step <= rising:"),
    ("schedule: falls a step early", "off by one", "done = (step - rising)", "done = (step + 1 - rising)"),
    ("schedule: warm-up counted as fall", "the peak is never reached",
     "done = (step - rising) / max(steps - rising, 1)", "done = step / steps"),
    ("schedule: floor forgotten", "falls to 0", "return min_ratio + (1 - min_ratio) * fall", "return fall"),
)  # fmt: skip

ADAMW = (
    ("AdamW: biases decay", "and norms", "config.weight_decay if trained.parameter.ndim > 1 else 0.0",
     "config.weight_decay"),
    ("AdamW: betas swapped", "moments of the wrong length", "(config.beta1, config.beta2)",
     "(config.beta2, config.beta1)"),
    ("AdamW: a role's own rate is ignored", "the critic learns at the policy's",
     "rate = trained.learning_rate if trained.learning_rate is not None else config.learning_rate",
     "rate = config.learning_rate"),
    ("AdamW: L2 in the gradient", "not decoupled", "return torch.optim.AdamW(", "return torch.optim.Adam("),
)  # fmt: skip

STEPS = (
    ("step: gradients aren't cleared", "each step has all before it", "self.optimizer.zero_grad(set_to_none=True)",
     "pass"),
    ("step: gradients aren't clipped", "max_norm is ignored",
     'self._max_norm if self._max_norm is not None else float("inf")', 'float("inf")'),
    ("step: the norm of one role", "the critic's gradient isn't counted",
     "parameters = list(self.parameters.values())", "parameters = list(self.parameters.values())[:1]"),
    ("step: the rate compounds", "factor upon factor", 'group["base_lr"] * factor', 'group["lr"] * factor'),
    ("step: the factor is forgotten", "no schedule", 'group["base_lr"] * factor', 'group["base_lr"]'),
    ("step: NaN is applied", "the model is lost", "if not skipped:", "if True:"),
    ("resume: moments aren't restored", "the optimiser starts anew",
     'state["optimizer"].get(names[parameter])', '{}.get(names[parameter])'),
    ("resume: moments shared with later steps", "old moments of after the checkpoint", "self.optimizer.state.clear()",
     "pass"),
    ("resume: weights aren't restored", "the first weights",
     'parameter.copy_(_whole(state["parameters"][name]))', "pass"),
    ("loss scale: clipped before it is taken out", "max_norm of something else",
     "self._scaler.unscale(parameters)", "pass"),
    ("loss scale: stays where it began", "each step overflows", "self._scaler.update(skipped)", "pass"),
    ("loss scale: isn't restored", "the first one", 'self._scaler.load_state(state["scaler"])', "pass"),
)  # fmt: skip

SINGLE = (
    ("gradient accumulation: not summed", "only the last micro-batch counts",
     "self._steps.backward(loss)", "self._steps.optimizer.zero_grad(); self._steps.backward(loss)"),
)  # fmt: skip

SHARDING = (
    ("sharding: padding is saved", "a checkpoint that another number of ranks can't read",
     "min(flat.numel(), math.prod(shape) - start)", "flat.numel()"),
    ("sharding: a part is read from the start", "every rank goes on with the first one's weights",
     "saved.read(start, start + size)", "saved.read(0, size)"),
    ("sharding: a part of a whole from the start", "the same, of what one process saved",
     "saved.reshape(-1)[start : start + size]", "saved.reshape(-1)[:size]"),
    ("sharding: hooks stay away", "after the first rollouts nothing is gathered",
     "part._forward_pre_hooks, part._forward_hooks = before, after", "pass"),
    ("sharding: blocks by class", "those that recompute are left out",
     "type(part).__name__ in names", "type(part).__qualname__ in names and len(type(part).__mro__) == 3"),
)  # fmt: skip

DDP_TABLE = (
    ("ddp: a gradient that nobody has is 0", "the optimiser decays what a loss left out",
     "            if not has:\n                parameter.grad = None", "            pass"),
    ("ddp: gradients of this rank", "never added up",
     "torch.distributed.all_reduce(bucket.flat, async_op=True)",
     "torch.distributed.all_reduce(bucket.flat.clone(), async_op=True)"),
    ("ddp: buckets start as their gradients come", "ranks add up different parameters",
     "while self._next < len(self._buckets) and not self._buckets[self._next].missing:\n"
     "            self._start(self._buckets[self._next])",
     "if not self._of[id(parameter)].missing:\n            self._start(self._of[id(parameter)])"),
    ("ddp: added up at every micro-batch", "the first parts are counted again", "if not self.begun:", "if False:"),
    ("ddp: a bucket of several dtypes", "cut to the first one's", "or kind != before", "or before is None"),
)  # fmt: skip

LORA = (
    ("LoRA: scaled by 1", "alpha / rank forgotten", "lora_alpha=self.config.alpha", "lora_alpha=self.config.rank"),
    ("LoRA: rsLoRA ignored", "alpha / rank for alpha / sqrt(rank)", "use_rslora=self.config.rslora",
     "use_rslora=False"),
    ("LoRA: the reference keeps its adapters", "reference and policy are one",
     "return active(module, ())", "return contextlib.nullcontext()"),
    ("LoRA: dropout never acts", "modules are in evaluation mode", "training=torch.is_grad_enabled()",
     "training=self.training"),
    ("LoRA: dropout acts in scores", "old log-probs are random", "training=torch.is_grad_enabled()", "training=True"),
    ("LoRA: adapters not from the seed", "every run starts elsewhere", "torch.manual_seed(seed)", "torch.seed()"),
    ("shared base: everyone is the policy", "its adapters for each role", "(role if role in names[1:] else names[0],)",
     "(names[0],)", (SHARED_BASE,)),
)  # fmt: skip

ADAPTERS = (
    ("adapters: off leaves them on", "the reference is the policy", "(part, not names, list(names)",
     "(part, False, list(names)"),
    ("adapters: computed again under another role's", "a gradient of what was never computed", "_choose(choice)",
     "pass"),
)  # fmt: skip

EMA = (
    ("ema: keeps what it should take", "decay the wrong way round", "1 - self.config.decay", "self.config.decay"),
    ("ema: starts at zero", "an average of nothing", "p.detach().to(torch.float32, copy=True)",
     "torch.zeros(p.shape)"),
    ("ema: stays in place", "the optimiser goes on from the average", "parameter.data = weights[name]", "pass"),
    ("ema: isn't restored", "it starts anew", 'average.copy_(state["average"][name])', "pass"),
    ("ema: saved where evaluation is asked for", "options mixed up", '"save": self.config.save', '"save": True'),
)  # fmt: skip

OFFLOAD = (
    ("offload: nothing leaves", "weights are there twice", "weight.data = weight.data.new_empty(0)", "pass"),
    ("offload: a visit within a visit ends it", "weights gone before the score ends",
     "if not self._visits:\n                _let_go(weights)", "_let_go(weights)"),
    ("offload: the file keeps its name", "a killed run leaves it behind",
     "self._path.unlink()\n            self._path = opened", "pass"),
)  # fmt: skip

SCALING = (
    ("loss scale: not taken out", "gradients 65536 times too large", "1.0 / self.scale)", "1.0)"),
    ("loss scale: grows with each overflow", "no step is ever taken", "self.scale / 2.0, 0", "self.scale * 2.0, 0"),
    ("loss scale: overflows don't interrupt the count", "doubled too soon", "self.scale / 2.0, 0",
     "self.scale / 2.0, self.clean"),
    ("loss scale: nothing ends it", "a run that never steps", "if self.scale <= 1.0:", "if False:"),
)  # fmt: skip

PRECISION = (
    ("bf16: trained weights in bfloat16", "small updates are lost",
     "weights=torch.float32, compute=torch.bfloat16", "weights=torch.bfloat16, compute=torch.bfloat16"),
    ("fp32: products in bfloat16", "exactness is tested in less", "weights=torch.float32, compute=None",
     "weights=torch.float32, compute=torch.bfloat16"),
)  # fmt: skip

CHECKPOINTING = (
    ("checkpointing: caches are written twice", "a second forward writes again",
     "or any(isinstance(x, Cache) for x in (*args, *kwargs.values()))", ""),
)  # fmt: skip

REWARD_MODEL = (
    ("reward model: a cut response is closed", "an EOS that was never sampled",
     'end=rollouts.finish[i] == "stop"', "end=True"),
    ("reward model: nothing readable, nothing asked", "ranks that wait for each other",
     "samples.sequences(rollouts, readable), self._role.name).score.tolist())",
     "samples.sequences(rollouts, readable), self._role.name).score.tolist() if readable else [])"),
)  # fmt: skip
JUDGED = (
    ("judging models: another's prompt", "the first prompt for all", "of = [place[id(prompt)] for",
     "of = [0 * place[id(prompt)] for"),
)  # fmt: skip

TABLES = (
    (f"{P}/policies/heads.py", (f"{T}/policies/test_policies_heads.py",), HEADS),
    (f"{P}/policies/chunks.py", (f"{T}/policies/test_policies_heads.py",), CHUNKS),
    (f"{P}/policies/layout.py", (f"{T}/policies/test_policies_layout.py",), LAYOUT),
    (f"{P}/policies/trunk.py", (SCORES,), TRUNK),
    (f"{P}/policies/ragged.py", (f"{T}/policies/test_policies_ragged.py",), RAGGED),
    (f"{P}/policies/attention.py", (f"{T}/policies/test_policies_attention.py",), ATTENTION),
    (f"{P}/policies/hf.py", (SCORES,), POLICY),
    (f"{P}/policies/codec.py", (f"{T}/policies/test_policies_codec.py",), CODEC),
    (f"{P}/engines/sampling.py", (f"{T}/engines/test_engines_sampling.py",), SAMPLING),
    (f"{P}/engines/slots.py", (f"{T}/engines/test_engines_slots.py", ENGINE), SLOTS),
    (f"{P}/engines/hf.py", (ENGINE,), HF_ENGINE),
    ("core/rlhf/schedules.py", (f"{T}/test_optimizers.py",), SCHEDULE),
    (f"{P}/optimizers/adamw.py", (f"{T}/test_optimizers.py",), ADAMW),
    (f"{P}/backends/steps.py", (f"{T}/test_backends.py", "tests/core/test_core_scaling.py"), STEPS),
    (f"{P}/backends/single.py", (f"{T}/test_backends.py",), SINGLE),
    (f"{P}/backends/sharding.py", (f"{T}/test_backends_sharding.py",), SHARDING),
    (f"{P}/backends/ddp.py", (f"{T}/test_backends_ddp.py",), DDP_TABLE),
    (f"{P}/memory/lora.py", (f"{T}/memory/test_memory_lora.py",), LORA),
    (f"{P}/memory/adapters.py", (SHARED_BASE,), ADAPTERS),
    (f"{P}/memory/ema.py", (f"{T}/memory/test_memory_ema.py",), EMA),
    (f"{P}/memory/offload.py", (f"{T}/memory/test_memory_offload.py",), OFFLOAD),
    ("core/rlhf/scaling.py", ("tests/core/test_core_scaling.py",), SCALING),
    (f"{P}/memory/precision.py", (f"{T}/memory/test_memory_precision.py",), PRECISION),
    (f"{P}/memory/checkpointing.py", (f"{T}/memory/test_memory_checkpointing.py",), CHECKPOINTING),
    (f"{P}/rewards/model.py", (f"{T}/rewards/test_rewards_model.py",), REWARD_MODEL),
    (f"{P}/rewards/samples.py", (f"{T}/rewards/test_rewards_model.py",), JUDGED),
)
