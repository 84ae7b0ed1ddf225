"""Named errors in policies, engines, memory strategies, optimiser and backend. Rows as in `named_algorithms`."""

from __future__ import annotations

P = "plugins/rlhf_plugins"
T = "tests/plugins"
SCORES = f"{T}/policies/test_policies_scores.py"
PLAIN = f"{SCORES}::test_logp_entropy_and_their_gradients_are_those_of_a_plain_forward"
SHARED = f"{SCORES}::test_several_responses_stand_behind_one_prompt_where_the_model_allows_it"
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
    ("head: the last chunk is dropped", "as many whole chunks as there are",
     "for i in range(0, len(targets), chunk):", "for i in range(0, len(targets) - len(targets) % chunk, chunk):"),
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
     "flat[0] = r * width + len(prompt) - 1", "pass"),
    ("layout: the score read one token early", "before EOS", "last.append(flat[-1:])", "last.append(flat[-2:-1])"),
    ("layout: the row is forgotten", "states of the first row for all",
     "flat = r * width + torch.arange(at - 1, at + size)", "flat = torch.arange(at - 1, at + size)"),
    ("layout: starts off", "tokens put where the previous response's are",
     "starts[i] = starts[i - 1] + lengths[i - 1]", "starts[i] = starts[i - 1] + lengths[i]"),
)  # fmt: skip

TRUNK = (
    # These two are found at loading too, where a model is tried on a handful of tokens, and rows are no longer shared.
    ("trunk: positions aren't handed over", "the model counts by itself",
     '"position_ids": grid.positions.to(self.device)', '"position_ids": None', (SHARED,)),
    ("trunk: the mask isn't handed over", "completions see each other",
     "None if grid.mask is None else grid.mask.to(self.device)", "None", (SHARED,)),
    ("trunk: windowed models share rows", "a window counts the responses between", "            or windowed\n", "",
     (SCORES,)),
    ("trunk: rows out of order", "sorted by length and left so",
     "return torch.cat(list(parts))[order.to(parts[0].device)]", "return torch.cat(list(parts))", (PLAIN,)),
    ("trunk: rows put in the inverse order", "order for its inverse",
     "order[torch.cat(list(places))] = torch.arange(len(order))", "order[:] = torch.cat(list(places))", (PLAIN,)),
    ("trunk: a model's own logits are not looked for", "its scale is unknown, and ignored",
     "own_forward = lm and not trunk.head_agrees()", "own_forward = False", (SCORES,)),
)  # fmt: skip

POLICY = (
    ("policy: temperature isn't handed to the head", "ratios of another distribution",
     "temperature=request.temperature,", "temperature=1.0,", (PLAIN,)),
    ("policy: dropout stays on", "the ratio is never 1", "trunk.model.eval()  #", "pass  #"),
    ("policy: scalars of the last layer's wrong part", "the value reads its own token",
     "values, score = read.split([len(states), len(last)])",
     "score, values = read.split([len(last), len(states)])"),
    ("policy: autocast forgotten", "fp32 products where bf16 was asked for", "with trunk.autocast():", "if True:"),
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
    ("attention: no limit on what is held", "a long row takes all memory", " and n * heads * count * width <= _MOST",
     ""),
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

ADAMW = (
    ("schedule: the first step of warm-up is 0", "off by one, and lost", "return (step + 1) / rising",
     "return step / rising"),
    ("schedule: warm-up ends late", "off by one", "if step < rising:", "if step <= rising:"),
    ("schedule: falls a step early", "off by one", "done = (step - rising)", "done = (step + 1 - rising)"),
    ("schedule: warm-up counted as fall", "the peak is never reached",
     "done = (step - rising) / max(steps - rising, 1)", "done = step / steps"),
    ("schedule: floor forgotten", "falls to 0", "return min_ratio + (1 - min_ratio) * fall", "return fall"),
    ("AdamW: biases decay", "and norms", "config.weight_decay if trained.parameter.ndim > 1 else 0.0",
     "config.weight_decay"),
    ("AdamW: betas swapped", "moments of the wrong length", "(config.beta1, config.beta2)",
     "(config.beta2, config.beta1)"),
    ("AdamW: a role's own rate is ignored", "the critic learns at the policy's",
     "rate = trained.learning_rate if trained.learning_rate is not None else config.learning_rate",
     "rate = config.learning_rate"),
    ("AdamW: L2 in the gradient", "not decoupled", "return torch.optim.AdamW(", "return torch.optim.Adam("),
)  # fmt: skip

SINGLE = (
    ("step: gradients aren't cleared", "each step has all before it", "self._optimizer.zero_grad(set_to_none=True)",
     "pass"),
    ("step: gradients aren't clipped", "max_norm is ignored",
     'self._max_norm if self._max_norm is not None else float("inf")', 'float("inf")'),
    ("step: the norm of one role", "the critic's gradient isn't counted",
     "parameters = list(self._parameters.values())", "parameters = list(self._parameters.values())[:1]"),
    ("step: the rate compounds", "factor upon factor", 'group["base_lr"] * factor', 'group["lr"] * factor'),
    ("step: the factor is forgotten", "no schedule", 'group["base_lr"] * factor', 'group["base_lr"]'),
    ("step: NaN is applied", "the model is lost", "if not skipped:", "if True:"),
    ("gradient accumulation: not summed", "only the last micro-batch counts",
     "loss.backward()", "self._optimizer.zero_grad(); loss.backward()"),
    ("resume: moments aren't restored", "the optimiser starts anew",
     'state["optimizer"].get(names[parameter])', '{}.get(names[parameter])'),
    ("resume: moments shared with later steps", "old moments of after the checkpoint", "self._optimizer.state.clear()",
     "pass"),
    ("resume: weights aren't restored", "the first weights", 'parameter.copy_(state["parameters"][name])', "pass"),
)  # fmt: skip

LORA = (
    ("LoRA: scaled by 1", "alpha / rank forgotten", "lora_alpha=self.config.alpha", "lora_alpha=self.config.rank"),
    ("LoRA: rsLoRA ignored", "alpha / rank for alpha / sqrt(rank)", "use_rslora=self.config.rslora",
     "use_rslora=False"),
    ("LoRA: the reference keeps its adapters", "reference and policy are one",
     "= module.disable_adapter()", "= contextlib.nullcontext()"),
    ("LoRA: dropout never acts", "modules are in evaluation mode", "training=torch.is_grad_enabled()",
     "training=self.training"),
    ("LoRA: dropout acts in scores", "old log-probs are random", "training=torch.is_grad_enabled()", "training=True"),
    ("LoRA: adapters not from the seed", "every run starts elsewhere", "torch.manual_seed(spec.seed)", "torch.seed()"),
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
    ("reward model: another's prompt", "the first prompt for all", "prompt_of=[place[id(prompt)] for",
     "prompt_of=[0 * place[id(prompt)] for"),
)  # fmt: skip

TABLES = (
    (f"{P}/policies/heads.py", (f"{T}/policies/test_policies_heads.py",), HEADS),
    (f"{P}/policies/layout.py", (f"{T}/policies/test_policies_layout.py",), LAYOUT),
    (f"{P}/policies/trunk.py", (SCORES,), TRUNK),
    (f"{P}/policies/attention.py", (f"{T}/policies/test_policies_attention.py",), ATTENTION),
    (f"{P}/policies/hf.py", (SCORES,), POLICY),
    (f"{P}/policies/codec.py", (f"{T}/policies/test_policies_codec.py",), CODEC),
    (f"{P}/engines/sampling.py", (f"{T}/engines/test_engines_sampling.py",), SAMPLING),
    (f"{P}/engines/slots.py", (f"{T}/engines/test_engines_slots.py", ENGINE), SLOTS),
    (f"{P}/engines/hf.py", (ENGINE,), HF_ENGINE),
    (f"{P}/optimizers/adamw.py", (f"{T}/test_optimizers.py",), ADAMW),
    (f"{P}/backends/single.py", (f"{T}/test_backends.py",), SINGLE),
    (f"{P}/memory/lora.py", (f"{T}/memory/test_memory_lora.py",), LORA),
    (f"{P}/memory/precision.py", (f"{T}/memory/test_memory_precision.py",), PRECISION),
    (f"{P}/memory/checkpointing.py", (f"{T}/memory/test_memory_checkpointing.py",), CHECKPOINTING),
    (f"{P}/rewards/model.py", (f"{T}/rewards/test_rewards_model.py",), REWARD_MODEL),
)
