"""Named errors in the algorithms without a critic and their pieces. Rows as in `named_algorithms`."""

from __future__ import annotations

F = "plugins/rlhf_plugins/functional"
A = "plugins/rlhf_plugins/algorithms"
TF = "tests/plugins/functional"
TA = "tests/plugins/algorithms"

GROUPS = (
    ("groups: the whole batch is one", "a prompt is compared with others", "torch.unique(group, return_inverse=True)",
     "torch.unique(torch.zeros_like(group), return_inverse=True)"),
    ("groups: biased deviation", "divided by the group's size",
     "(summed((wide - mean).square()) / (size - 1).clamp(min=1)).sqrt()",
     "(summed((wide - mean).square()) / size).sqrt()"),
    ("groups: divided by the variance", "no root", "(size - 1).clamp(min=1)).sqrt()", "(size - 1).clamp(min=1))"),
    ("groups: sign", "the worst is the best", "centred = rewards.detach() - stats.mean",
     "centred = stats.mean - rewards.detach()"),
    ("groups: scale upside down", "the option does the other thing", "eps if scale else 1.0)",
     "eps if not scale else 1.0)"),
    ("groups: the batch's biased deviation", "divided by count",
     "batch.var * batch.count / (batch.count - 1).clamp(min=1.0)", "batch.var"),
    ("groups: the batch's deviation is ignored", "scale batch is scale group", "return centred / (std + eps)",
     "return centred / (stats.std + eps)"),
    ("RLOO: the mean of all", "a response is in its own baseline", "* stats.size / others)", "* 1.0)"),
    ("RLOO: n - 1 over n", "upside down", "* stats.size / others)", "* others / stats.size)"),
    ("groups: flat is spread", "what has no gradient is kept", "highest == lowest)", "highest != lowest)"),
    ("GDPO: weights forgotten", "every reward counts alike", "weights[name] * group_advantages(part",
     "group_advantages(part"),
    ("GDPO: not scaled", "the widest reward drowns the rest", "group_advantages(part, group, eps=eps)",
     "group_advantages(part, group, scale=False, eps=eps)"),
    ("best of groups: the smallest", "the worst are kept", "descending=True, stable=True",
     "descending=False, stable=True"),
    ("baseline: added", "the greedy response's reward helps", "return rewards.detach() - (same",
     "return rewards.detach() + (same"),
    ("best of groups: one too many", "off by one", "rank < keep)", "rank <= keep)"),
)  # fmt: skip

PIECES = (
    ("response mean: one divisor for all", "a token weighs the same",
     "sequence_sum(x, batch) / own.clamp(min=1), batch)", "sequence_sum(x, batch) / own.mean(), batch)"),
    ("response mean: masked tokens are counted", "a tool's length counts",
     "own = sequence_sum(torch.ones_like(x), batch)", "own = batch.lengths.to(x)"),
    ("constant mean: by the batch's longest", "the length matters again", "return response_sum(x, batch) / length",
     "return response_sum(x, batch) / int(batch.lengths.max())"),
    ("KL in the reward: sign", "distance from the reference pays", "return rewards - config.kl_coef *",
     "return rewards + config.kl_coef *"),
    ("KL in the reward: and in the loss", "counted twice", 'if config.kl_coef > 0 and config.kl_in == "loss":',
     "if config.kl_coef > 0:"),
    ("KL in the loss: sign", "distance from the reference pays", "loss = loss + config.kl_coef * mean",
     "loss = loss - config.kl_coef * mean"),
    ("KL in the loss: another estimator", "k3 whatever is asked for",
     "kl = ESTIMATORS[config.kl_estimator](logp, logp_ref)", "kl = k3(logp, logp_ref)"),
    ("KL in the loss: the ratio is forgotten", "kl_correction does nothing", "    if config.kl_correction:\n",
     "    if False:\n"),
    ("KL in the loss: the ratio upside down", "pi_old / pi",
     'torch.exp(logp - torch.where(own, batch["logp_old"], 0.0))',
     'torch.exp(torch.where(own, batch["logp_old"], 0.0) - logp)'),
    ("KL in the loss: mask dropped", "0 x inf is NaN",
     'logp, logp_ref = torch.where(own, logp, 0.0), torch.where(own, batch["logp_ref"], 0.0)',
     'logp, logp_ref = logp, batch["logp_ref"]'),
    ("policy loss without importance", "the engine's samples are taken for the policy's",
     "policy_loss = mean(losses * batch.importance, batch)", "policy_loss = mean(losses, batch)"),
    ("KL loss without importance", "the engine's samples are taken for the policy's",
     "kl_losses(policy.logp, batch, config) * batch.importance", "kl_losses(policy.logp, batch, config)"),
    ("entropy's sign", "certainty pays", "loss = loss - config.entropy_coef", "loss = loss + config.entropy_coef"),
    ("GDPO: not whitened", "the sum's scale is by how many rewards there are",
     "return whiten_with(summed, over_ranks(summed, context))", "return summed"),
    ("each rank by itself", "ranks learn other things", "Moments.unstack(context.world.sum(moments(x, mask).stack()))",
     "moments(x, mask)"),
    ("flat groups are what is kept", "nothing is learnt",
     "return ~flat(rollouts.rewards, rollouts, config)", "return flat(rollouts.rewards, rollouts, config)"),
    ("GDPO: a group is flat where one reward is", "what another reward says is left out", "found &= group_stats(",
     "found |= group_stats("),
    ("GDPO: a group is flat by the sum", "rewards that cancel are left out", 'if config.several == "sum":', "if True:"),
    ("overlong: from the limit on", "a response is told when it is too late", "limit - buffer, worst / buffer",
     "limit, worst / buffer"),
    ("overlong: any penalty is 1", "its option does nothing", "worst = config.overlong_penalty",
     "worst = 1.0"),
    ("overlong: a buffer that is left out is none", "a fifth is what was published", "max(1, limit // 5)",
     "max(1, limit // 500)"),
    ("the reference is the policy", "there is no KL", 'score(rollouts, "reference").logp',
     'score(rollouts, "policy").logp'),
    ("scale is ignored", "always by the group's deviation", 'scale=config.scale != "none"', "scale=True"),
    ("clipped objective: clip ranges swapped", "clip-higher becomes clip-lower",
     "else (config.clip_low, config.clip_high)", "else (config.clip_high, config.clip_low)"),
    ("clipped objective: KL-Cov clips, too", "the authors' doesn't",
     '(1.0, math.inf) if config.covariance == "kl"', '(1.0, math.inf) if config.covariance == "both"'),
    ("clipped objective: one mean for all", "mean does nothing", "mean_of(config.mean, length))",
     'mean_of("token", length))'),
    ("clipped objective: old log-probs of the policy as it is", "the ratio is always 1",
     'clipped_policy_loss(policy.logp, batch["logp_old"],', "clipped_policy_loss(policy.logp, policy.logp.detach(),"),
    ("clipped objective: nothing is held", "covariance does nothing",
     "losses = restrained(actor.losses, policy.logp, batch, config)", "losses = actor.losses"),
)  # fmt: skip

GROUPED = (
    ("grouped: one response a prompt", "nothing to compare with", "pieces.groups(prompts, self.config.group_size)",
     "pieces.groups(prompts, 1)"),
    ("grouped: flat groups stay", "drop_flat does nothing", "return pieces.with_spread(rollouts, self.config)",
     "return None"),
)  # fmt: skip

GFPO = (
    ("GFPO: the longest", "the worst are retained", "worth = -lengths", "worth = lengths"),
    ("GFPO: the best, whatever their length", "a long answer is as good", "lengths.clamp(min=1)\n", "1\n"),
    ("GFPO: the options swapped", "prefer does the other thing", 'prefer == "short"', 'prefer == "efficient"'),
    ("GFPO: all are retained", "GRPO", "self.config.retain)", "self.config.group_size)"),
    ("GFPO: spread of all, not of those retained", "a flat group is learnt from",
     "pieces.with_spread(rollouts.select(rows), self.config)", "pieces.with_spread(rollouts, self.config)"),
)  # fmt: skip

VESPO = (
    ("VESPO: signs swapped", "good and bad are weighed as each other",
     "powers=(config.power_pos, config.power_neg)", "powers=(config.power_neg, config.power_pos)"),
    ("VESPO: rates swapped", "good and bad are weighed as each other",
     "rates=(config.rate_pos, config.rate_neg)", "rates=(config.rate_neg, config.rate_pos)"),
    ("VESPO: a mean over responses", "a long response's token weighs less", "config, token_mean)",
     "config, pieces.response_mean)"),
)  # fmt: skip

DPPO = (
    ("DPPO: thresholds swapped", "the other side is held", "(config.delta_low, config.delta_high)",
     "(config.delta_high, config.delta_low)"),
    ("DPPO: one threshold for both", "KL's is far too wide", 'usual = 0.15 if config.divergence == "tv" else 0.05',
     "usual = 0.15"),
    ("DPPO: a mean over responses", "a long response's token weighs less", "config, token_mean)",
     "config, pieces.response_mean)"),
)  # fmt: skip

COVARIANCE = (
    ("covariance: raw log-probs", "no covariance", "logp.detach().double() - logp_mean", "logp.detach().double()"),
    ("covariance: raw advantages", "no covariance", "advantages.detach().double() - advantage_mean",
     "advantages.detach().double()"),
    ("covariance: a tool's tokens are held", "they are nobody's", "torch.where(own, centred, -torch.inf)", "centred"),
    ("Clip-Cov: the others", "what doesn't matter is held", "torch.where(held, 0.0, losses)",
     "torch.where(held, losses, 0.0)"),
    ("KL-Cov: pushed on", "the policy narrows faster", "losses + coef * torch.where", "losses - coef * torch.where"),
    ("KL-Cov: every token", "a KL of all", "torch.where(held, logp - logp_old, 0.0).abs()", "(logp - logp_old).abs()"),
    ("KL-Cov: rounding pulls", "by chance", "away > _ROUNDING", "away >= 0"),
)  # fmt: skip

HELD = (
    ("held: the lowest", "what keeps entropy is held", "descending=True, stable=True", "descending=False, stable=True"),
    ("held: of each rank", "two ranks hold others", "sorted(tuple(row) for part in world.gather(own) for row",
     "sorted(tuple(row) for part in [own] for row"),
    ("held: drawn by each rank", "two ranks hold others", "torch.cat(world.gather(places[inside]))",
     "places[inside]"),
    ("held: the first ones", "nothing is drawn", "np.random.default_rng(seed).permutation(len(everybody))[:count]",
     "np.arange(len(everybody))[:count]"),
    ("held: the same in each pass", "some tokens are never learnt", "[context.seed, *update]",
     "[context.seed, update[0]]"),
    ("held: outside the bounds", "the highest are drawn", "cov < config.covariance_high", "cov < 1e9"),
    ("held: perhaps none", "a small step is never held", "count = max(1, int(", "count = max(0, int("),
    ("held: share is ignored", "one token", "config.covariance_share * float(of_logp.count)", "0.0"),
    ("held: always the one", "both do the same", 'if config.covariance == "clip":\n        return without_held',
     'if config.covariance == "kl":\n        return without_held'),
)  # fmt: skip

SHAPES = (
    ("sapo: unbounded", "no number where the policy has gone far", ".clamp(max=20.0))\n    tau", ")\n    tau"),
    ("response ratio: divided by all tokens", "a tool's tokens count", "total / segment_sum(own, lengths).clamp(min=1)",
     "total / lengths.clamp(min=1)"),
    ("response ratio: the sum", "mean does nothing", "    if mean:\n", "    if False:\n"),
    ("response ratio: upside down", "pi_old / pi", "difference = torch.where(own, logp - logp_old, 0.0)",
     "difference = torch.where(own, logp_old - logp, 0.0)"),
    ("response ratio: no gradient", "nothing is learnt", "+ difference - difference.detach()", "+ 0.0 * difference"),
    ("CISPO: sign", "the policy is pushed away from what paid", "losses = -ratio.clamp(max=cap)",
     "losses = ratio.clamp(max=cap)"),
    ("CISPO: not capped", "one token has any weight", "-ratio.clamp(max=cap) *", "-ratio *"),
    ("CISPO: the cap is a distance from 1", "1 + cap", "-ratio.clamp(max=cap) *", "-ratio.clamp(max=1 + cap) *"),
    ("CISPO: the ratio's gradient is kept", "twice the gradient", "kept.detach() - torch.where", "kept - torch.where"),
    ("SAPO: sign", "the policy is pushed away from what paid", "losses = -(4.0 / tau)", "losses = (4.0 / tau)"),
    ("SAPO: a clip's scale", "a quarter of the gradient", "losses = -(4.0 / tau)", "losses = -(1.0 / tau)"),
    ("SAPO: temperatures swapped", "the other sign fades",
     "torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)",
     "torch.full_like(advantages, tau_pos).masked_fill(advantages > 0, tau_neg)"),
    ("SAPO: centred at 0", "faded already at ratio 1", "tau * (ratio - 1.0)", "tau * ratio"),
    ("VESPO: sign", "the policy is pushed away from what paid", "losses = -weight * advantages",
     "losses = weight * advantages"),
    ("VESPO: the mean of log-ratios", "long responses are favoured", "logp_old, lengths, mask, mean=False)",
     "logp_old, lengths, mask, mean=True)"),
    ("VESPO: powers swapped", "good and bad are weighed as each other",
     "torch.full_like(log_w, powers[1]).masked_fill(good, powers[0])",
     "torch.full_like(log_w, powers[0]).masked_fill(good, powers[1])"),
    ("VESPO: the weight isn't 1 at ratio 1", "another learning rate", "rate * (1.0 - log_w.exp())",
     "rate * -log_w.exp()"),
    ("VESPO: the weight has a gradient", "another objective", "response_log_ratio(logp.detach(), logp_old",
     "response_log_ratio(logp, logp_old"),
    ("DPPO: sign", "the policy is pushed away from what paid", "-weight * advantages * kept)",
     "weight * advantages * kept)"),
    ("DPPO: not capped", "one token has any weight", "weight = ratio.clamp(max=cap)", "weight = ratio"),
    ("DPPO: held on its way back", "a step back is wanted", "(advantages > 0) & (p > q) &", "(advantages > 0) &"),
    ("DPPO: bad ones held on their way back", "a step back is wanted", "(advantages <= 0) & (p < q) &",
     "(advantages <= 0) &"),
    ("DPPO: one threshold for both sides", "the other side is held", "(distance > delta_high)",
     "(distance > delta_low)"),
    ("DPPO: half a KL", "the rest of the vocabulary is forgotten", " + rest_q * (rest_q.log() - rest_p.log())", ""),
    ("DPPO: the other KL", "from the new policy", "distance = q * (before - now)", "distance = p * (before - now)"),
)  # fmt: skip

RLOO = (
    ("RLOO: raw rewards", "the KL is forgotten", "leave_one_out(rewards, rollouts",
     "leave_one_out(rollouts.rewards, rollouts"),
    ("RLOO: means over a response", "a response isn't one action", "config, pieces.response_sum)",
     "config, pieces.response_mean)"),
    ("RLOO: clip ranges swapped", "clip-higher becomes clip-lower", "config.clip_low, config.clip_high",
     "config.clip_high, config.clip_low"),
)  # fmt: skip

REINFORCE = (
    ("REINFORCE++: no discount", "gamma does nothing", "lengths, config.gamma, 1.0, mask", "lengths, 1.0, 1.0, mask"),
    ("REINFORCE++: one step", "a token sees its own reward alone", "lengths, config.gamma, 1.0, mask",
     "lengths, config.gamma, 0.0, mask"),
    ("REINFORCE++: the KL on both sides", "counted twice", 'config.kl_coef if config.kl_in == "reward" else 0.0',
     "config.kl_coef"),
    ("REINFORCE++: whitened with what is masked", "a mean over the wrong count",
     "self.context, mask), mask)", "self.context), mask)"),
    ("REINFORCE++: the group's mean stays", "group_size is more samples, no baseline",
     "scores = group_advantages(scores, rollouts.sequences.group, scale=False)", "pass"),
    ("REINFORCE++: whitened in each group", "divided by the group's deviation", "group, scale=False)", "group)"),
)  # fmt: skip

REMAX = (
    ("ReMax: the greedy response is learnt from", "off-policy", "rollouts.select((~greedy).nonzero().flatten())",
     "rollouts.select(greedy.nonzero().flatten())"),
    ("ReMax: a sampled baseline", "no greedy decoding", 'Sample(prompt, greedy=True, tag="baseline")',
     'Sample(prompt, tag="baseline")'),
    ("ReMax: raw rewards", "the KL is forgotten", "less_baseline(rewards,", "less_baseline(sampled.rewards,"),
)  # fmt: skip

GSPO = (
    ("GSPO: a token's ratio", "GRPO with a narrow clip",
     'response_log_ratio(policy.logp, batch["logp_old"], lengths, batch.mask)', 'policy.logp - batch["logp_old"]'),
    ("GSPO: clip ranges swapped", "clip-higher becomes clip-lower", "config.clip_low, config.clip_high",
     "config.clip_high, config.clip_low"),
    ("GSPO: LUSPO is GSPO", "mean does nothing", "pieces.mean_of(config.mean)", 'pieces.mean_of("response")'),
)  # fmt: skip

CISPO = (
    ("CISPO: a mean over responses", "a long response's token weighs less", "config, token_mean)",
     "config, pieces.response_mean)"),
)  # fmt: skip

SAPO = (
    ("SAPO: a mean over tokens", "a long response weighs more", "config, pieces.response_mean)",
     "config, pieces.mean_of('token'))"),
    ("SAPO: options swapped", "the other sign fades", "config.tau_pos, config.tau_neg",
     "config.tau_neg, config.tau_pos"),
)  # fmt: skip

TABLES = (
    (f"{F}/groups.py", (f"{TF}/test_functional_groups.py",), GROUPS),
    (
        f"{A}/pieces.py",
        (
            f"{TA}/test_algorithms_grpo.py",
            f"{TA}/test_algorithms_without_critic.py",
            f"{TA}/test_algorithms_covariance.py",
        ),
        PIECES,
    ),
    (f"{A}/grouped.py", (f"{TA}/test_algorithms_grpo.py", f"{TA}/test_algorithms_filtered.py"), GROUPED),
    (f"{A}/gfpo.py", (f"{TA}/test_algorithms_filtered.py",), GFPO),
    (f"{A}/vespo.py", (f"{TA}/test_algorithms_filtered.py",), VESPO),
    (f"{A}/dppo.py", (f"{TA}/test_algorithms_filtered.py",), DPPO),
    (f"{F}/covariance.py", (f"{TF}/test_functional_covariance.py",), COVARIANCE),
    (f"{A}/covariance.py", (f"{TA}/test_algorithms_covariance.py",), HELD),
    (f"{F}/shapes.py", (f"{TF}/test_functional_shapes.py",), SHAPES),
    (f"{A}/rloo.py", (f"{TA}/test_algorithms_rloo.py",), RLOO),
    (f"{A}/reinforce.py", (f"{TA}/test_algorithms_reinforce.py",), REINFORCE),
    (f"{A}/remax.py", (f"{TA}/test_algorithms_remax.py",), REMAX),
    (f"{A}/gspo.py", (f"{TA}/test_algorithms_gspo.py",), GSPO),
    (f"{A}/cispo.py", (f"{TA}/test_algorithms_gspo.py",), CISPO),
    (f"{A}/sapo.py", (f"{TA}/test_algorithms_gspo.py",), SAPO),
)
"""(file, the tests that should notice, rows)"""
