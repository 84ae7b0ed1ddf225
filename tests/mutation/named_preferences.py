"""Named errors in the losses and algorithms of preferences. Rows as in `named_algorithms`."""

from __future__ import annotations

F = "plugins/rlhf_plugins/functional"
A = "plugins/rlhf_plugins/algorithms"
TF = "tests/plugins/functional"
TA = "tests/plugins/algorithms"
CUT = "tests/core/test_core_loop.py::test_how_a_batch_is_cut_changes_nothing"

PREFERENCE = (
    ("DPO loss: sign", "the rejected is preferred", "logits = beta * (c - r)\n    return -(1.0",
     "logits = beta * (r - c)\n    return -(1.0"),
    ("DPO loss: beta forgotten", "beta is 1", "logits = beta * (c - r)\n    return -(1.0",
     "logits = c - r\n    return -(1.0"),
    ("DPO loss: label smoothing on the wrong side", "the label is wrong nine times in ten",
     "-(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing *",
     "-label_smoothing * F.logsigmoid(logits) - (1.0 - label_smoothing) *"),
    ("IPO: sums", "not a token's mean", "return (c / n_chosen - r / n_rejected -", "return (c - r -"),
    ("IPO: lengths swapped", "each divided by the other's length",
     "return (c / n_chosen - r / n_rejected", "return (c / n_rejected - r / n_chosen"),
    ("IPO: target", "1 / beta", "n_rejected - 1.0 / (2.0 * beta)", "n_rejected - 1.0 / beta"),
    ("IPO: square forgotten", "no minimum", "n_rejected - 1.0 / (2.0 * beta)).square()",
     "n_rejected - 1.0 / (2.0 * beta))"),
    ("hinge: sign", "the rejected is preferred", "torch.relu(1.0 - beta * (c - r))",
     "torch.relu(1.0 + beta * (c - r))"),
    ("hinge: no margin", "enough where the order is right", "torch.relu(1.0 - beta *", "torch.relu(-beta *"),
    ("exo_pair: which of the two labels", "the rejected is preferred",
     "log_q.exp() * (log_q - log_p) + log_q_other.exp() * (log_q_other - log_p_other)",
     "log_q.exp() * (log_q - log_p_other) + log_q_other.exp() * (log_q_other - log_p)"),
    ("exo_pair: the KL the other way round", "cross entropy of the policy's own", "log_q.exp() * (log_q - log_p) +",
     "math.exp(log_p) * (log_p - log_q) +"),
    ("nca_pair: the sign of the chosen's", "the chosen falls", "return -F.logsigmoid(beta * c) - 0.5 *",
     "return -F.logsigmoid(-beta * c) - 0.5 *"),
    ("nca_pair: the halves forgotten", "the rejected weighs twice", "- 0.5 * F.logsigmoid(-beta * r)",
     "- F.logsigmoid(-beta * r)"),
    ("robust: the noise is added", "label smoothing", "* clean - label_smoothing * swapped",
     "* clean + label_smoothing * swapped"),
    ("robust: not scaled back", "smaller, the more noise", " / (1.0 - 2.0 * label_smoothing)", ""),
    ("bco_pair: sign of the rejected", "the rejected rises",
     "return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)",
     "return -F.logsigmoid(beta * c) - F.logsigmoid(beta * r)"),
    ("sppo_hard: both to the same target", "the rejected rises", "(r + 1.0 / (2.0 * beta)).square()",
     "(r - 1.0 / (2.0 * beta)).square()"),
    ("apo_zero: the rejected up", "both rise", "torch.sigmoid(beta * c) + torch.sigmoid(beta * r)",
     "torch.sigmoid(beta * c) - torch.sigmoid(beta * r)"),
    ("apo_down: the chosen up", "apo_zero's half",
     "torch.sigmoid(beta * c) + 1.0 -", "1.0 - torch.sigmoid(beta * c) -"),
    ("discopop: the blend upside down", "the exponential where the logistic is meant",
     "log_m = F.logsigmoid(logits / tau)", "log_m = F.logsigmoid(-logits / tau)"),
    ("discopop: tau multiplies", "hardly a blend", "torch.sigmoid(-logits / tau)", "torch.sigmoid(-logits * tau)"),
    ("sigmoid_norm: lengths swapped", "each by the other's", "F.logsigmoid(beta * (c / n_chosen - r / n_rejected))",
     "F.logsigmoid(beta * (c / n_rejected - r / n_chosen))"),
    ("divergence: js without its constant", "no loss, but scores, differ", "math.log(2.0) + F.logsigmoid(x)",
     "F.logsigmoid(x)"),
    ("divergence: exponent's sign", "alpha below 0", "(-power * x).clamp(max=36.0)", "(power * x).clamp(max=36.0)"),
    ("divergence: not divided by alpha", "a smaller beta", ".clamp(max=36.0)) / power", ".clamp(max=36.0))"),
    ("divergence: unbounded", "infinite where a completion is very unlikely", ".clamp(max=36.0)", ""),
    ("reward loss: sign", "the rejected scores higher",
     "difference = r_chosen - r_rejected", "difference = r_rejected - r_chosen"),
    ("reward loss: the margin helps", "added, not taken off", "difference = difference - margin",
     "difference = difference + margin"),
    ("reward loss: the difference is centred", "equal scores cost nothing, however large",
     "(r_chosen + r_rejected).square()", "(r_chosen - r_rejected).square()"),
    ("reward loss: log of a rounded sigmoid", "infinite where the model is very wrong",
     "-F.logsigmoid(difference)", "-torch.log(torch.sigmoid(difference))"),
)  # fmt: skip

TRANSPORT = (
    ("AOT: not sorted", "each meets its own", "found[order] = torch.sort(y, stable=True).values", "found = y"),
    ("AOT: the largest meets the smallest", "descending", "torch.argsort(x, stable=True)",
     "torch.argsort(x, stable=True, descending=True)"),
    ("AOT: counted twice", "the rejected's terms have a value too", "of_c + (of_r - of_r.detach())", "of_c + of_r"),
    ("AOT: the rejected has no gradient", "half the loss", "of_c + (of_r - of_r.detach())", "of_c"),
    ("AOT: sign of the rejected's", "it rises", "sigmoid(met_by_r.detach(), r,", "sigmoid(r, met_by_r.detach(),"),
)  # fmt: skip

LIKELIHOOD = (
    ("sft: sign", "likelihood falls", "return -logp_chosen / n_chosen", "return logp_chosen / n_chosen"),
    ("sft: sums", "long completions weigh more", "return -logp_chosen / n_chosen", "return -logp_chosen"),
    ("SimPO: sums", "lengths count", "beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma",
     "beta * (logp_chosen - logp_rejected) - gamma"),
    ("SimPO: the margin helps", "added",
     "return -F.logsigmoid(beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma)",
     "return -F.logsigmoid(beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) + gamma)"),
    ("SimPO: sign", "the rejected is preferred", "beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma",
     "-beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma"),
    ("CPO: sign", "the rejected is preferred", "beta * (logp_chosen - logp_rejected)",
     "beta * (logp_rejected - logp_chosen)"),
    ("ORPO: log-probs for log odds", "SimPO without a margin", "kept - torch.log(-torch.expm1(kept))", "kept"),
    ("ORPO: odds of being wrong", "a sign in the odds", "kept - torch.log(-torch.expm1(kept))",
     "kept + torch.log(-torch.expm1(kept))"),
    ("ORPO: sign", "the rejected is preferred",
     "log_odds(logp_chosen / n_chosen) - log_odds(logp_rejected / n_rejected)",
     "log_odds(logp_rejected / n_rejected) - log_odds(logp_chosen / n_chosen)"),
    ("ORPO: odds of certainty", "infinite", "mean_logp.clamp(max=-1e-6)", "mean_logp"),
)  # fmt: skip

KTO_LOSS = (
    ("KTO loss: good and bad swapped", "the bad is preferred", "torch.where(desirable, ", "torch.where(~desirable, "),
    ("KTO loss: sign of the baseline", "added", "beta * (x - baseline.detach())", "beta * (x + baseline.detach())"),
    ("KTO loss: gradient through the baseline", "the KL is minimised", "baseline.detach()", "baseline"),
    ("KTO loss: one weight for both", "an option does nothing",
     "weight_undesirable * torch", "weight_desirable * torch"),
)  # fmt: skip

DPO = (
    ("DPO: the reference is the policy", "every log-ratio is 0",
     'score(rollouts, "reference").logp', 'score(rollouts, "policy").logp'),
    ("DPO: weights of losses forgotten", "a plain sum", "losses + weight * _losses", "losses + _losses"),
    ("DPO: divergence forgotten", "reverse KL, whatever was asked",
     "divergence_score(x, config.divergence, config.alpha)", 'divergence_score(x, "reverse_kl", config.alpha)'),
    ("DPO: aot of the reference's own order", "pairs, not distributions",
     "counterparts(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1])",
     "reference[:, 0] - reference[:, 1]"),
    ("DPO: aot_unpaired meets its own rejected", "pairs, not distributions",
     "torch.stack([counterparts(c, r), counterparts(r, c)], 1)", "torch.stack([r, c], 1)"),
    ("DPO: aot takes another rank's pairs", "the first of all, not its own",
     "here = torch.searchsorted(pairs, own)", "here = torch.arange(len(own))"),
    ("DPO: exo_pair without its smoothing", "log 0", "smoothing = 1e-3", "smoothing = 1e-2"),
    ("DPO: sft of the rejected", "the wrong one is learnt", "sft(chosen, n_chosen)", "sft(rejected, n_rejected)"),
    ("DPO: means instead of sums", "length normalised",
     'logp = sequence_sum(score(batch, "policy").logp, batch)',
     'logp = sequence_sum(score(batch, "policy").logp, batch) / batch.lengths'),
    ("DPO: chosen and rejected swapped in the data", "the rejected comes first",
     "for text in (row.chosen, row.rejected):", "for text in (row.rejected, row.chosen):"),
    ("DPO: chosen and rejected swapped in the loss", "the rejected is preferred", "c, r = (logp -", "r, c = (logp -"),
    ("DPO: pairs of other rows", "the batch's first half against its second",
     'c, r = (logp - batch["logp_ref"]).view(-1, 2).unbind(1)',
     'c, r = (logp - batch["logp_ref"]).view(2, -1).unbind(0)'),
    ("DPO: the reference is forgotten", "likelihoods, not ratios",
     'c, r = (logp - batch["logp_ref"])', 'c, r = (logp - 0 * batch["logp_ref"])'),
    ("DPO: the micro-batch's mean", "how a batch is cut changes the loss",
     "return group_mean(losses, batch)", "return losses.mean()", (f"{CUT}[dpo]",)),
    ("DPO: pairs can be cut in two", "the unit is a sequence", 'unit = "group"', 'unit = "sequence"'),
    ("DPO: EOS lost", "completions never end",
     "codec.response(text, row.prompt)", "codec.response(text, row.prompt, end=False)"),
    ("DPO: the margin without beta", "implicit rewards are beta times the ratio",
     'batch.log("reward/margin", group_mean(config.beta * (c - r), batch))',
     'batch.log("reward/margin", group_mean(c - r, batch))'),
)  # fmt: skip

KTO = (
    ("KTO: completions meet their own prompts", "no mismatched pair", "[*order[1:], *order[:1]]", "order"),
    ("KTO: neighbours of this rank alone", "ranks change the baseline",
     "self.context.world.gather([own.group.tolist(), list(responses)])", "[[own.group.tolist(), list(responses)]]"),
    ("KTO: the mean of this rank alone", "ranks change the baseline",
     "self.context.world.sum(sums).tolist()", "sums.tolist()"),
    ("KTO: negative KL", "not clamped", "max(total / count, 0.0)", "total / count"),
    ("KTO: the reference is forgotten", "likelihoods, not ratios",
     'score(others, "policy").logp - score(others, "reference").logp', 'score(others, "policy").logp'),
    ("KTO: a mismatched completion is whole", "past the model's context", "[: longest - len(p)]", ""),
    ("KTO: a row alone meets itself", "not mismatched", "if len(order) > 1 else []", "if len(order) > 0 else []"),
    ("KTO: the micro-batch's mean", "how a batch is cut changes the loss",
     "return sequence_mean(losses, batch)", "return losses.mean()"),
    ("KTO: EOS lost", "completions never end", "codec.response(row.completion, row.prompt)",
     "codec.response(row.completion, row.prompt, end=False)"),
)  # fmt: skip

SIMPO = (("SimPO: sft_coef forgotten", "an option does nothing", "losses + config.sft_coef * sft", "losses + 0 * sft"),
         ("SimPO: pairs can be cut in two", "the unit is a sequence", 'unit = "group"',
          'unit = "sequence"'))  # fmt: skip

ORPO = (("ORPO: lambda forgotten", "an option does nothing", "nll + config.odds_coef * ratio", "nll + ratio"),
        ("ORPO: the micro-batch's mean", "how a batch is cut changes the loss",
         "return group_mean(nll + config.odds_coef * ratio, batch)",
         "return (nll + config.odds_coef * ratio).mean()", (f"{CUT}[orpo]",)))  # fmt: skip

CPO = (("CPO: sft_coef forgotten", "an option does nothing", "preference + config.sft_coef * nll", "preference + nll"),
       ("CPO: smoothing forgotten", "an option does nothing", ", config.label_smoothing)", ", 0.0)"))  # fmt: skip

PAIRS = (
    ("pairs: swapped in the data", "the rejected comes first", "for text in (row.chosen, row.rejected):",
     "for text in (row.rejected, row.chosen):"),
    ("pairs: swapped in the loss", "the rejected is preferred", "chosen, rejected = logp", "rejected, chosen = logp"),
    ("pairs: the first half against the second", "of other rows", "logp.view(-1, 2).unbind(1)",
     "logp.view(2, -1).unbind(0)"),
    ("pairs: EOS lost", "completions never end", "codec.response(text, row.prompt)",
     "codec.response(text, row.prompt, end=False)"),
)  # fmt: skip

WITHOUT = (f"{TA}/test_algorithms_without_reference.py",)

REWARD = (
    ("reward: chosen and rejected swapped", "the rejected scores higher", "chosen, rejected = score",
     "rejected, chosen = score"),
    ("reward: chosen and rejected swapped in the data", "the rejected comes first",
     "for text in (row.chosen, row.rejected):", "for text in (row.rejected, row.chosen):"),
    ("reward: the margin is forgotten", "use_margin does nothing", "rejected, margin, self", "rejected, None, self"),
    ("reward: the micro-batch's mean", "how a batch is cut changes the loss",
     "return group_mean(losses, batch)", "return losses.mean()", (f"{CUT}[reward]",)),
    ("reward: EOS lost", "scores are read at another token than in PPO",
     "codec.response(text, row.prompt)", "codec.response(text, row.prompt, end=False)"),
    ("reward: pairs can be cut in two", "the unit is a sequence", 'unit = "group"', 'unit = "sequence"'),
)  # fmt: skip

TABLES = (
    (f"{F}/preference.py", (f"{TF}/test_functional_preference.py",), PREFERENCE),
    (f"{F}/transport.py", (f"{TF}/test_functional_transport.py",), TRANSPORT),
    (f"{F}/likelihood.py", (f"{TF}/test_functional_likelihood.py",), LIKELIHOOD),
    (f"{F}/kto.py", (f"{TF}/test_functional_kto.py",), KTO_LOSS),
    (f"{A}/dpo.py", (f"{TA}/test_algorithms_dpo.py",), DPO),
    (f"{A}/kto.py", (f"{TA}/test_algorithms_kto.py",), KTO),
    (f"{A}/pairs.py", WITHOUT, PAIRS),
    (f"{A}/simpo.py", WITHOUT, SIMPO),
    (f"{A}/orpo.py", WITHOUT, ORPO),
    (f"{A}/cpo.py", WITHOUT, CPO),
    (f"{A}/reward.py", (f"{TA}/test_algorithms_reward.py",), REWARD),
)
"""(file, the tests that should notice, rows)"""
