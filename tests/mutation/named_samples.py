"""Named errors in the algorithms that learn from their own samples as from data, in distillation, in process reward
models and in offline Q-learning. Rows as in `named_algorithms`."""

from __future__ import annotations

F = "plugins/rlhf_plugins/functional"
A = "plugins/rlhf_plugins/algorithms"
TF = "tests/plugins/functional"
TA = "tests/plugins/algorithms"

PAIRED = (
    ("best and worst: swapped", "the worse is chosen", "for way in (x, -x)]", "for way in (-x, x)]"),
    ("best and worst: flat groups too", "a response against itself",
     "(best_of_groups(way, group, 1) & spread)", "best_of_groups(way, group, 1)"),
    ("best and worst: in order of place", "pairs of two prompts",
     "[rows[torch.sort(group[rows]).indices] for rows in ends]", "ends"),
    ("tied: flat groups too", "counted twice", "& ~group_stats(x, group).flat", ""),
    ("tied: whoever is first", "no tie is seen", "group_stats(x[two], group[two]).flat",
     "~group_stats(x[two], group[two]).flat"),
)  # fmt: skip

BEST_OF_N = (
    ("best-of-n: all are learnt", "no selection", "rollouts.select(kept.nonzero().flatten())", "rollouts"),
    ("best-of-n: flat groups are learnt", "wrong throughout", "best if config.keep_flat else best & ~flat", "best"),
    ("best-of-n: one is kept, whatever keep", "an option does nothing", "best_of_groups(rewards, group, config.keep)",
     "best_of_groups(rewards, group, 1)"),
    ("best-of-n: threshold upside down", "the good are dropped", "rewards >= config.threshold",
     "rewards <= config.threshold"),
    ("best-of-n: above the threshold", "a right answer of 1 isn't 1", "rewards >= config.threshold",
     "rewards > config.threshold"),
    ("best-of-n: sign", "the best are unlearnt", "token_mean(-logp, batch)", "token_mean(logp, batch)"),
    ("best-of-n: the threshold is counted over all", "not over what would be kept",
     "(~enough).double(), kept)", "(~enough).double())"),
)  # fmt: skip

ONLINE_DPO = (
    ("online-dpo: the reference is the policy", "every log-ratio is 0", 'score(pairs, "reference")',
     'score(pairs, "policy")'),
    ("online-dpo: pairs can be cut in two", "the unit is a sequence", 'unit = "group"', 'unit = "sequence"'),
    ("online-dpo: aot looks at nothing", "a field lacks",
     "return with_counterparts(minibatch, score, self.config, self.context.world)", "return minibatch"),
    ("online-dpo: every response", "the reference of other rows", "pairs = rollouts.select(rows.flatten())",
     "pairs = rollouts"),
    ("online-dpo: the gap's sign", "the worse is ahead", "rewards[rows[:, 0]] - rewards[rows[:, 1]]",
     "rewards[rows[:, 1]] - rewards[rows[:, 0]]"),
)  # fmt: skip

DIVERGENCE = (
    ("divergence of models: forward is reverse", "kinds swapped", "(q * (log_q - log_p)).sum(-1), p - q",
     "(p * (log_p - log_q)).sum(-1), p - q"),
    ("divergence of models: forward's slope", "away from the teacher", "sum(-1), p - q", "sum(-1), q - p"),
    ("divergence of models: reverse's slope isn't centred", "softmax's own part is forgotten",
     "return found, ratio.sub_(found[:, None]).mul_(p)", "return found, ratio.mul_(p)"),
    ("divergence of models: m is the other mixture", "beta and 1 - beta swapped",
     "torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))",
     "torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))"),
    ("divergence of models: weights of js", "swapped", "beta * of_q + (1.0 - beta) * of_p",
     "(1.0 - beta) * of_q + beta * of_p"),
    ("divergence of models: js' slope", "its weight forgotten", ".mul_(p).mul_(1.0 - beta)", ".mul_(p)"),
)  # fmt: skip

COMPARED = (
    ("compared: the temperature of the value alone", "the gradient is too large",
     "slope.div_(compare.temperature).to", "slope.to"),
    ("compared: the teacher at temperature 1", "another distribution", "_log_probs(others, compare.temperature)",
     "_log_probs(others, 1.0)"),
    ("compared: rows of one head alone count", "what is no token", "rows = min(ours", "rows = max(ours"),
    ("compared: the gradient of each alike", "weights of tokens are forgotten", "(slope * grads[0][:, None])",
     "(slope * torch.ones_like(grads[0])[:, None])"),
)  # fmt: skip

DISTILL = (
    ("distill: any teacher", "ids that mean other tokens", "if not same_vocabulary(",
     "if False and not same_vocabulary("),
    ("distill: beta forgotten", "an option does nothing", "beta=config.beta", "beta=0.5"),
    ("distill: temperature forgotten", "an option does nothing", "temperature=config.temperature", "temperature=1.0"),
    ("distill: the teacher is taught", "roles swapped", '"policy", "teacher", kind', '"teacher", "policy", kind'),
    ("distill: sign", "away from the teacher", "token_mean(found, batch)", "token_mean(-found, batch)"),
)  # fmt: skip

AFTER = (
    ("after tokens: before them", "a step is read before its end", "torch.cat([values[1:], values[:1]])", "values"),
    ("after tokens: the next response's first", "another sequence's state", ".index_put((ends,), last)", ""),
    ("after tokens: all at the first response's end", "one score for all", "lengths.cumsum(0) - 1",
     "lengths.cumsum(0) * 0"),
)  # fmt: skip

PRM = (
    ("prm: labels turned", "the wrong are right", "label.to(logits.dtype), reduction",
     "1.0 - label.to(logits.dtype), reduction"),
    ("prm: read before the token", "the step's end isn't seen",
     "after_tokens(found.values, found.score, batch.lengths)", "found.values"),
    ("prm: every token is judged", "tokens inside a step are wrong", "Example(prompt, response, ends, token",
     "Example(prompt, response, None, token"),
    ("prm: shares are rounded", "a quarter right is wrong", "torch.tensor(row.labels))",
     "torch.tensor(row.labels).round())"),
    ("prm: accuracy upside down", "the share that is wrong", "((logits > 0) == (label > 0.5))",
     "((logits > 0) == (label < 0.5))"),
)  # fmt: skip

PROCESS = (
    ("process reward: the first step's score", "last is first", '"last": wide[-1]', '"last": wide[0]'),
    ("process reward: the best step", "max", "wide.min()", "wide.max()"),
    ("process reward: log odds", "not from 0 to 1", "torch.sigmoid(after_tokens(", "(after_tokens("),
    ("process reward: every token", "steps' insides count", "aggregate(own[end]", "aggregate(own"),
)  # fmt: skip

STEPS = (
    ("steps: no separator", "a step's end isn't known", "codec.response(step + separator,", "codec.response(step,"),
    ("steps: each ends the response", "EOS in the middle", "prompt, end=False) for", "prompt, end=True) for"),
    ("steps: read at their first token", "before they are said", ".cumsum(0) - 1] = True",
     ".cumsum(0) - len(parts[0])] = True"),
    ("steps: blank ones count", "an empty step", "if step.strip()]", "]"),
)  # fmt: skip

ILQL_LOSS = (
    ("ilql: the next response's value", "what comes after the end", "after_tokens(values[mask], end, own)",
     "after_tokens(values[mask], values[:len(lengths)], own)"),
    ("ilql: the token's own value", "V(s) for V(s')", "gamma * after_tokens(values[mask], end, own)",
     "gamma * values[mask]"),
    ("ilql: a tool's state is the next", "bootstrapped through what isn't its own",
     "of = torch.arange(len(lengths)", "mask = torch.ones_like(mask); of = torch.arange(len(lengths)"),
    ("ilql: gradient through the goal", "values learn of Q's loss", "own)).detach()", "own))"),
    ("ilql: expectile upside down", "the worst that was done", "(ahead < 0).to",
     "(ahead > 0).to"),
    ("ilql: Q learns of V's loss", "no data", "ahead = q.detach() - values", "ahead = q - values"),
    ("ilql: weights without a bound", "infinite", ".clamp(max=WEIGHT_MAX)", ""),
    ("ilql: the worse weighs more", "sign of the advantage", "beta * (q - values)", "beta * (values - q)"),
)  # fmt: skip

ILQL = (
    ("ilql: the larger of two targets", "what is overestimated counts", "torch.minimum(t1", "torch.maximum(t1"),
    ("ilql: Q heads for their targets", "a goal that runs away", "torch.minimum(t1.values, t2.values)",
     "torch.minimum(q1.values, q2.values)"),
    ("ilql: one Q head learns", "the other stays as drawn", "+ (q2.values - goal).square()", ""),
    ("ilql: the reward comes first", "at the first token", "rewards[-1] = row.reward", "rewards[0] = row.reward"),
    ("ilql: unseen tokens are raised", "sign of the conservative loss", "token_mean(-q1.logp - q2.logp, batch)",
     "token_mean(q1.logp + q2.logp, batch)"),
    ("ilql: tau forgotten", "an option does nothing", "config.tau)", "0.7)"),
)  # fmt: skip

FOLLOWERS = (
    ("followers: rate upside down", "it is gone at once", "lerp_(step, follows.rate)",
     "lerp_(step, 1.0 - follows.rate)"),
    ("followers: each step", "every does nothing", "if self._steps % follows.every == 0:", "if True:"),
    ("followers: weights as they were first", "a buffer that isn't used any more",
     "{name: (mine[name], theirs[name])", "{name: (mine[name], nn.Parameter(theirs[name].data))"),
    ("followers: the count isn't kept", "renewed at other steps after a resume",
     'self._steps = state.get("steps", 0)', "self._steps = 0"),
)  # fmt: skip

TOKENS = (
    ("folding: factor forgotten", "an option does nothing", "total += factor * next", "total += next"),
    ("folding: the policy's own head", "training goes on from another", "output.weight.detach().clone()",
     "output.weight.detach()"),
    ("folding: tied in the folder", "the embedding is shifted, or the head isn't",
     "tied, config.tie_word_embeddings = config.tie_word_embeddings, False", "tied = config.tie_word_embeddings"),
    ("heads: numbers of the next token", "another action", "taken = numbers.gather(-1, tokens[:, None])",
     "taken = numbers.gather(-1, tokens.roll(1)[:, None])"),
    ("heads: numbers aren't normalised", "the conservative loss has no bound",
     "torch.stack([taken, taken - numbers.logsumexp(-1)])", "torch.stack([taken, taken])"),
)  # fmt: skip

MODELS = (
    ("compared: the policy stands for any role", "a model against itself",
     "self.policy.read(self.frozen.bodies[module], sequences)",
     'self.policy.read(self.trained.bodies["policy"], sequences)'),
    ("compared: away when the backward comes", "offloaded weights are gone",
     "with torch.no_grad(), self.visiting([role]):\n                return",
     "with torch.no_grad():\n                return"),
    ("compared: roles that are trained too", "it has no weights of its own", "if module not in self.frozen.bodies:",
     "if False:"),
)  # fmt: skip

TABLES = (
    (f"{F}/groups.py", (f"{TF}/test_functional_groups.py",), PAIRED),
    (f"{A}/best_of_n.py", (f"{TA}/test_algorithms_best_of_n.py",), BEST_OF_N),
    (f"{A}/online_dpo.py", (f"{TA}/test_algorithms_online_dpo.py",), ONLINE_DPO),
    (f"{F}/divergence.py", (f"{TF}/test_functional_divergence.py",), DIVERGENCE),
    ("plugins/rlhf_plugins/policies/compared.py", ("tests/plugins/policies/test_policies_compared.py",), COMPARED),
    (f"{A}/distill.py", (f"{TA}/test_algorithms_distill.py",), DISTILL),
    (f"{F}/ilql.py", (f"{TF}/test_functional_ilql.py",), ILQL_LOSS),
    (f"{A}/ilql.py", (f"{TA}/test_algorithms_ilql.py",), ILQL),
    ("core/rlhf/followers.py", ("tests/core/test_core_followers.py",), FOLLOWERS),
    ("plugins/rlhf_plugins/policies/token_heads.py", (f"{TA}/test_algorithms_ilql.py",), TOKENS),
    (f"{F}/ragged.py", (f"{TF}/test_functional_ragged.py",), AFTER),
    (f"{A}/prm.py", (f"{TA}/test_algorithms_prm.py",), PRM),
    ("plugins/rlhf_plugins/rewards/process.py", ("tests/plugins/rewards/test_rewards_process.py",), PROCESS),
    ("plugins/rlhf_plugins/steps.py", (f"{TA}/test_algorithms_prm.py",), STEPS),
    ("core/rlhf/models.py", (f"{TA}/test_algorithms_distill.py",), MODELS),
)
"""(file, the tests that should notice, rows)"""
