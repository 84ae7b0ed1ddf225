"""Named errors in the contributed packages. A row: name, what it is, the text, what replaces it, tests."""

from __future__ import annotations

OPMD = (
    ("opmd: sign of the log-ratio", "pushed on where it should be held", 'batch["target"] - tau * log_ratio',
     'batch["target"] + tau * log_ratio'),
    ("opmd: Z summed, not averaged", "a baseline of tau log G too much", " - math.log(rewards.shape[-1])", ""),
    ("opmd: tau outside is forgotten", "nats, not reward units", "return tau * (torch.logsumexp(",
     "return (torch.logsumexp("),
    ("opmd: rewards times tau", "hotter is colder", "torch.logsumexp(rewards / tau,", "torch.logsumexp(rewards * tau,"),
    ("opmd: baseline of the whole batch", "prompts are compared with each other", "rewards.mean(-1, keepdim=True)",
     "rewards.mean()"),
    ("opmd: log-ratio upside down", "pi_old / pi", 'logp.detach() - batch["logp_old"]',
     'batch["logp_old"] - logp.detach()'),
    ("opmd: importance in the loss's value", "a weighted log-ratio is no log-ratio",
     'logp.detach() - batch["logp_old"] + batch.importance * (logp - logp.detach())',
     'batch.importance * (logp - batch["logp_old"])'),
    ("opmd: importance is dropped", "the engine's distribution is learnt from",
     "batch.importance * (logp - logp.detach())", "(logp - logp.detach())"),
    ("opmd: not by 2 tau", "the rate depends on tau", " / (2 * tau), batch)", ", batch)"),
    ("opmd: one response a prompt", "nothing to compare", "count=self.config.group_size", "count=1"),
)  # fmt: skip

MUON = (
    ("muon: embeddings too", "a table of words made orthogonal",
     "trained.parameter.ndim == 2 and _LAYER.search(trained.name) is not None", "trained.parameter.ndim == 2"),
    ("muon: scales swapped", "steps of another size", '{"match-rms": "match_rms_adamw", "original": "original"}',
     '{"match-rms": "original", "original": "match_rms_adamw"}'),
    ("muon: Nesterov is forgotten", "an option without effect", "nesterov=config.nesterov,", "nesterov=True,"),
    ("muon: five iterations, whatever is asked", "an option without effect", "ns_steps=config.iterations,", ""),
    ("muon: momentum is the default", "an option without effect", "momentum=config.momentum,", ""),
    ("muon: AdamW at Muon's rate", "adamw_ratio without effect", "(ratio * rate, decay)", "(rate, decay)"),
    ("muon: vectors decay", "norms and biases too", "self.config.weight_decay if trained.parameter.ndim > 1 else 0.0",
     "self.config.weight_decay"),
    ("muon: a role's own rate is ignored", "the critic learns at the policy's",
     "trained.learning_rate if trained.learning_rate is not None else self.config.learning_rate",
     "self.config.learning_rate"),
    ("muon: a restored state isn't seen", "it starts anew", "part.state, part.param_groups = self.state, ",
     "part.param_groups = "),
    ("muon: groups of both parts alike", "AdamW's never step", "at += count", "pass"),
)  # fmt: skip

FOOTPRINT = (
    ("muon: counted as AdamW", "a plan of twice the bytes", "return 4.0 * weight.numel if hidden(weight) else",
     "return 8.0 * weight.numel if hidden(weight) else"),
    ("muon: the head counted as a layer's", "a plan of half the bytes", '("embedding", "head", "score")',
     '("embedding", "score")'),
)  # fmt: skip

INSTRUCTIONS = (
    ("ifeval: at least is more than", "off by one", "else count >= bound", "else count > bound"),
    ("ifeval: less than holds at the bound", "off by one", "return count < bound if", "return count <= bound if"),
    ("ifeval: one keyword is enough", "any for all", "return all(word.lower() in", "return any(word.lower() in"),
    ("ifeval: an empty response follows", "silence is paid", "return bool(text.strip()) and", "return True and"),
    ("ifeval: bold text is a bullet", "** at a line's begin", r"(?:\*(?!\*)|-)", r"(?:\*|-)"),
    ("ifeval: a yes where it is told no", "forbidden words are wanted", "return not any(re.search(",
     "return any(re.search("),
    ("ifeval: two the same are two", "the second is a copy", "and len(set(filter(None, parts))) == 2", ""),
)  # fmt: skip

SCORES = (
    ("ifeval: partial is always", "an option without effect", "if self.config.partial else float(all(did))", ""),
    ("ifeval: one is enough", "any for all", "float(all(did))", "float(any(did))"),
    ("ifeval: nulls are arguments", "a data set in columns is refused", "if value is not None}", "}"),
)  # fmt: skip

FREEZE = (
    ("freeze: the first layers are trained", "the wrong end", ">= count - self.config.layers)",
     "< self.config.layers)"),
    ("freeze: a tied head is an embedding", "the option has no effect", "if id(parameter) in heads:", "if False:"),
    ("freeze: one layer too many", "off by one", ">= count - self.config.layers)", "> count - self.config.layers)"),
)  # fmt: skip

FREEZE_PLAN = (
    ("freeze: the last norm isn't counted", "a plan of fewer numbers", "* each + beside", "* each"),
    ("freeze: frozen weights vanish", "a plan of a smaller model", "if part < weight.count:", "if False:"),
    ("freeze: an untied embedding is the head", "a plan of more moments",
     'if weight.kind == "embedding" and not architecture.tied:', "if False:"),
)  # fmt: skip

C = "contrib"
TABLES = (
    (f"{C}/rlhf-freeze/rlhf_freeze/strategy.py", (f"{C}/rlhf-freeze/tests/test_freeze.py",), FREEZE),
    (f"{C}/rlhf-freeze/rlhf_freeze/__init__.py", (f"{C}/rlhf-freeze/tests/test_freeze.py",), FREEZE_PLAN),
    (f"{C}/rlhf-opmd/rlhf_opmd/algorithm.py", (f"{C}/rlhf-opmd/tests/test_opmd.py",), OPMD),
    (f"{C}/rlhf-muon/rlhf_muon/optimizer.py", (f"{C}/rlhf-muon/tests/test_muon.py",), MUON),
    (f"{C}/rlhf-muon/rlhf_muon/__init__.py", (f"{C}/rlhf-muon/tests/test_muon.py",), FOOTPRINT),
    (f"{C}/rlhf-ifeval/rlhf_ifeval/instructions.py", (f"{C}/rlhf-ifeval/tests/test_ifeval.py",), INSTRUCTIONS),
    (f"{C}/rlhf-ifeval/rlhf_ifeval/reward.py", (f"{C}/rlhf-ifeval/tests/test_ifeval.py",), SCORES),
)
