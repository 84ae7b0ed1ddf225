"""Named errors in the core: what means divide by, what is selected, kept, restored, seeded. Rows as in
`named_algorithms`."""

from __future__ import annotations

C = "core/rlhf"
T = "tests/core"
LOOP = f"{T}/test_core_loop.py"
FAILURES = f"{T}/test_core_loop_failures.py"
STOPS = f"{T}/test_core_loop_stops.py"
IMPORTANCE = (f"{T}/test_core_importance.py", f"{T}/test_core_importance_runs.py")
BY_HAND = f"{T}/test_core_importance.py::test_weights_by_hand"
OF_A_STEP = f"{T}/test_core_importance.py::test_metrics_by_hand"
GAME = f"{T}/test_core_importance.py::test_weighted_by_whole_responses_the_gradient_is_the_policys_own"
CUT = f"{LOOP}::test_how_a_batch_is_cut_changes_nothing"
RESUME = f"{STOPS}::test_sigterm_ends_the_run_after_its_step_with_a_checkpoint"
EVALUATION = f"{STOPS}::test_evaluation_leaves_no_trace"
EPOCHS = f"{STOPS}::test_each_pass_over_a_batch_is_in_an_order_of_its_own"
MICRO = f"{T}/test_core_micro.py"
SHARED_BASE = "tests/plugins/memory/test_memory_shared_base.py"

SEQUENCES = (
    ("selected rollouts take the first ones' places", "weights of others", "places=self.places[rows],",
     "places=self.places[: len(rows)],", IMPORTANCE),
    ("tokens are counted with the masked ones", "the step's total is too large",
     "return int(self.mask.sum())", "return len(self.mask)"),
    ("selected rows keep other groups", "pairs of other rows", "self.group[rows],", "self.group[: len(rows)],"),
    ("selected rows keep other masks", "the first rows' masks", "self.mask[index],", "self.mask[: len(index)],"),
    ("selected rows have other prompts", "prompts in the order of their first use",
     "            new_of,\n", "            new_of.flip(0),\n"),
    ("those cut off count as ended", "the flag upside down", 'reason == "stop" for reason',
     'reason == "length" for reason'),
    ("masks put on the response before", "off by one", "mask[start : start + length] = own",
     "mask[max(start - 1, 0) : max(start - 1, 0) + length] = own"),
)  # fmt: skip

EXPERIENCE = (
    ("policy mean: the weights are left out", "the engine's samples count as the policy's",
     "token_mean(x * batch.importance, batch)", "token_mean(x, batch)", IMPORTANCE),
    ("policy mean: divides by the weights' sum", "another estimator", "token_mean(x * batch.importance, batch)",
     "token_mean(x * batch.importance / batch.importance.mean(), batch)", IMPORTANCE),
    ("selected experience takes the first ones' places", "weights of others",
     "None if self.places is None else self.places[rows]", "self.places", IMPORTANCE),
    ("token mean: over the micro-batch", "parts don't add up to the mean",
     "max(batch.totals.tokens, 1)", "max(int(batch.mask.sum()), 1)"),
    ("token mean: masked tokens are counted", "a mean over the padded count",
     "max(batch.totals.tokens, 1)", "max(batch.totals.tokens + int((~batch.mask).sum()), 1)"),
    ("token mean: over sequences", "long responses weigh more", "max(batch.totals.tokens, 1)",
     "max(batch.totals.sequences, 1)"),
    ("token mean: mask dropped", "a tool's tokens are learnt from",
     "torch.where(batch.mask, x, torch.zeros_like(x)).sum()", "x.sum()"),
    ("token mean: mask multiplied", "NaN times 0 is NaN",
     "torch.where(batch.mask, x, torch.zeros_like(x)).sum()", "(batch.mask * x).sum()"),
    ("sequence mean: over the micro-batch", "parts don't add up", "max(batch.totals.sequences, 1)",
     "max(len(batch), 1)"),
    ("group mean: over sequences", "half the loss of a pair", "max(batch.totals.groups, 1)",
     "max(batch.totals.sequences, 1)"),
    ("group mean: over the micro-batch", "parts don't add up", "max(batch.totals.groups, 1)",
     "max(batch.sequences.group_count, 1)"),
    ("sequence sum: mask dropped", "a user's turns in DPO's log-ratio",
     "masked = torch.where(of.sequences.mask.to(x.device), x, torch.zeros_like(x))", "masked = x"),
    ("a minibatch forgets its temperature", "ratios of another distribution", "part.temperature = self.temperature",
     "pass"),
    ("experience forgets its temperature", "ratios of another distribution",
     "self.temperature: float = 1.0 if isinstance(of, Sequences) else of.temperature", "self.temperature: float = 1.0"),
    ("a logged part keeps its graph", "memory grows", "+ part.detach().float().cpu()", "+ part.float().cpu()"),
    ("a logged part replaces the one before", "metrics of the last call",
     "self.logged.get(name, torch.zeros(())) + part", "part"),
    ("a field per response spread over the wrong tokens", "by place, not by row",
     "torch.repeat_interleave(value, self.lengths.to(value.device))",
     "value.repeat(self.lengths.sum())[: self.lengths.sum()]"),
)  # fmt: skip

SCORES = (
    ("parts of scores joined in the order computed", "old log-probs of other rows",
     "whole[of.token_index(rows)] =", "whole[of.token_index(rows).sort().values] ="),
)  # fmt: skip

MODELS = (
    ("shared base: one forward for two roles", "the value of the policy's states",
     "(plan.module, part_of(plan, self._plans), id(", '(plan.module, "policy", id(', (SHARED_BASE,)),
    ("shared base: an engine is given every role's adapters", "more than it knows", "not in models.joined",
     "is not None", (SHARED_BASE,)),
    ("reference: adapters stay on", "reference and policy are one",
     "with torch.no_grad(), self._adapters_off(role.module):", "with torch.no_grad():"),
    ("reference: has a gradient", "it is trained along",
     "            if not role.role.trainable:\n                module.requires_grad_(False)\n", "",
     (f"{T}/test_core_models.py",)),
    ("roles: one rate for all", "the critic learns at the policy's", "rate = plans[owner].role.learning_rate",
     "rate = None"),
    ("roles: all from one seed", "heads and adapters start alike",
     'derive(plan.run.seed, "init", role.name)', 'derive(plan.run.seed, "init")'),
    ("roles: scores in another order", "values for log-probs",
     "found.update(zip(trained, scores, strict=True))",
     "found.update(zip(sorted(trained, reverse=True), scores, strict=True))"),
)  # fmt: skip

SCORING = (
    ("offload: weights come and go for each micro-batch", "as slow as the disk",
     "with self._models.visiting(roles):", "with contextlib.nullcontext():",
     ("tests/plugins/memory/test_memory_offload.py",)),
    ("scores: temperature forgotten in the ratio", "logits not divided",
     "temperature = 1.0 if isinstance(of, Sequences) else of.temperature", "temperature = 1.0"),
    ("old log-probs: the engine's, exact or not", "ratios of rounding",
     "if usable and said.exact:", "if usable:"),
    ("old log-probs: exact ones are computed all the same", "a forward wasted",
     "if usable and said.exact:", "if False:"),
    ("old log-probs: computed anew each time they are asked for", "a forward wasted",
     "known = self.off_policy.known(rollouts)", "known = None"),
    ("old log-probs: never corrected", "the engine's samples count as the policy's",
     "            self.off_policy.weigh(rollouts, logp)\n", "            self.off_policy.compare(rollouts, logp)\n"),
    ("old log-probs: truncated or not", "a ratio that isn't one", "if said.truncated:", "if False:"),
    ("ahead: at any temperature", "ratios of two distributions", "its_own == temperature and (", "True and ("),
    ("ahead: dropout or not", "values of before depend on how a step is cut",
     "and self._models.noisy.isdisjoint(roles)", "and True"),
    ("ahead: what the first loss doesn't want is kept", "two graphs at once",
     "            self.clear()\n            return {}", "            return {}"),
    ("micro-batches: pairs are cut in two", "chosen without rejected",
     "units = ordered if keep_groups else", "units = ordered if not keep_groups else", (f"{T}/test_core_sequences.py",
     )),
    ("micro-batches: the last is dropped", "gradients of a part",
     "    if taken:\n        yield", "    if taken and len(taken) > 1:\n        yield", (f"{T}/test_core_sequences.py",
     )),
    ("micro-batches: above the budget", "the longest is forgotten",
     "longest_then * (len(taken) + len(unit)) > budget", "longest * (len(taken) + len(unit)) > budget",
     (f"{T}/test_core_sequences.py",)),
)  # fmt: skip

LOOP_TABLE = (
    ("best: no number stays the best", "nothing is better than none", "better = math.isnan(before) or (",
     "better = (", (f"{LOOP}::test_better_is_higher_for_a_reward_and_lower_for_a_loss",)),
    ("best: no number is better", "a step of none is kept", "if math.isnan(value) or not better:", "if not better:",
     (f"{LOOP}::test_better_is_higher_for_a_reward_and_lower_for_a_loss",)),
    ("step: the reported loss is the last micro-batch's", "it isn't summed",
     'logged["loss"] = logged["loss"] + loss.detach()', 'logged["loss"] = loss.detach()', (f"{CUT}[sft]",)),
    ("step: an update a micro-batch", "gradients aren't accumulated",
     "            backend.backward(loss if weight else loss * 0.0, last and not mixed)\n",
     "            backend.backward(loss, last); backend.update(factor)\n", (f"{CUT}[sft]",)),
    ("step: gradients of the first micro-batch only", "the rest is dropped",
     "backend.backward(loss if weight else loss * 0.0, last and not mixed)\n",
     'backend.backward(loss if not float(logged["loss"]) else loss.detach(), last)\n',
     (f"{CUT}[sft]",)),
    ("step: not seeded", "a step depends on what came before it",
     'reseed(derive(run.seed, "step", self.step))', "pass", (EVALUATION,)),
    ("step: seeded with the run's seed alone", "every step draws the same",
     'reseed(derive(run.seed, "step", self.step))', 'reseed(derive(run.seed, "step"))',
     (f"{LOOP}::test_each_step_draws_anew_and_by_its_number_alone",)),
    ("epochs: every pass in one order", "minibatches are not shuffled anew",
     '"minibatch", self.step, epoch)', '"minibatch", self.step)', (EPOCHS,)),
    ("schedule: a step ahead", "off by one",
     "parts.optimizer.factor(self.step, self.steps)", "parts.optimizer.factor(self.step + 1, self.steps)",
     (f"{LOOP}::test_the_schedule_begins_with_the_first_step_and_ends_with_the_last",)),
    ("schedule: of the data's length", "another end", "parts.optimizer.factor(self.step, self.steps)",
     "parts.optimizer.factor(self.step, self.steps + 1)",
     (f"{LOOP}::test_the_schedule_begins_with_the_first_step_and_ends_with_the_last",)),
    ("early stop: ignored", "all epochs are made", "if algorithm.minibatch_done(metrics):", "if False:",
     (f"{LOOP}::test_an_early_stop_leaves_the_batchs_rest_out",)),
    ("metrics: summed up to an early stop", "not their mean", "{**{n: s / updates for n, s", "{**{n: s for n, s",
     (f"{LOOP}::test_an_early_stop_leaves_the_batchs_rest_out",)),
    ("metrics: summed over updates", "not their mean", "{**{name: total / updates for name", "{**{name: total for name",
     (f"{LOOP}::test_metrics_are_means_over_a_steps_updates",)),
    ("resume: nothing is restored", "but for the step's number", "        restore(parts, state)\n", "", (RESUME,)),
    ("resume: what was computed of rows is lost", "the reference is run again",
     'parts.data.load_state(state["data"])', "pass",
     ("tests/core/test_core_loop.py::test_a_resumed_run_keeps_the_references_log_probs",)),
    ("best: the worst", "direction upside down", 'value > before if direction == "max"',
     'value < before if direction == "max"',
     (f"{STOPS}::test_the_best_checkpoint_is_kept_besides_the_newest",
      f"{LOOP}::test_better_is_higher_for_a_reward_and_lower_for_a_loss")),
    ("critic warm-up: the algorithm doesn't know the step", "it warms up for ever",
     "parts.algorithm.step = self.step", "pass", (f"{LOOP}::test_critic_warm_up_moves_the_value_model_alone",)),
    ("sync: the engine isn't told of new weights", "it samples from the old policy",
     'with clock("sync"):\n            self._sync(self.step + 1)', 'with clock("sync"):\n            pass',
     (f"{LOOP}::test_the_engine_is_given_new_weights_after_each_step",)),
    ("sync: the version of the weights before", "a resumed run says another", "self._sync(self.step + 1)",
     "self._sync(self.step)",
     (f"{LOOP}::test_the_engine_is_given_new_weights_after_each_step",)),
    ("sync: before the update", "the engine is a step behind",
     '"update"):\n            learnt = self._learn(experience)\n        with clock("sync"):\n            self._sync('
     "self.step + 1)",
     '"sync"):\n            self._sync(self.step + 1)\n        with clock("update"):\n            learnt = self._learn('
     "experience)",
     (f"{LOOP}::test_the_engine_is_given_new_weights_after_each_step",)),
)  # fmt: skip

MICRO_TABLE = (
    ("step: totals of this rank", "ranks of unequal size weigh alike", "world.sum(counts).tolist()", "counts.tolist()"),
    ("minibatches: drawn by each rank alone", "ranks divide by each other's counts", "parts = world.gather(own)",
     "parts = [own]"),
    ("minibatches: groups are cut", "drawn among the sequences", "torch.zeros_like(group) if unit",
     "_places(group) if unit"),
    ("minibatches: members of a group are one", "drawn among the groups", "else _places(group)",
     "else torch.zeros_like(group)"),
    ("micro-batches: the last is not told", "gradients are added up too late", "i == count - 1", "False"),
    ("micro-batches: what is repeated counts", "a group is learnt twice", "float(i < len(pieces))", "1.0"),
    ("micro-batches: each rank makes its own number", "one waits in a forward for ever",
     "count = int(backend.world.max(torch.tensor(len(pieces))))", "backend.world.max(torch.tensor(len(pieces)))"),
    ("parts of means of this rank", "metrics differ from rank to rank",
     "world.sum(torch.stack([sums.get(name, nothing).double().cpu() for name in names])).tolist()",
     "torch.stack([sums.get(name, nothing).double().cpu() for name in names]).tolist()"),
)  # fmt: skip

SHARES = (
    ("shares: ranks have unequal work", "units dealt in turn",
     "key=lambda rank: (loads[rank], len(taken[rank]), rank)", "key=lambda rank: (len(taken[rank]), rank)"),
    ("shares: a rank without work", "ties go to the first", "(loads[rank], len(taken[rank]), rank)",
     "(loads[rank], rank)"),
)  # fmt: skip

OFFLINE = (
    ("other numbers are the same data", "a run goes on with other labels",
     "found.update(repr(sorted((name, float(x)) for name, x in example.fields.items())).encode())", "pass"),
    ("other masks are the same data", "a run goes on with other tokens to learn",
     "if example.mask is not None:", "if False:"),
    ("reference kept of the wrong row", "in the order computed",
     "kept = [self._kept[row] for _, row in places]", "kept = list(self._kept.values())[: len(places)]"),
    ("reference kept in the order of rows", "sorted", "kept = [self._kept[row] for _, row in places]",
     "kept = [self._kept[row] for row in sorted(row for _, row in places)]"),
    ("a row that comes twice is one group", "four sequences in a pair",
     "[(before + j, row) for j, row in enumerate(rows)]", "[(row, row) for j, row in enumerate(rows)]"),
    ("a row kept by its own rank alone", "the other computes it again", 
     "for part in world.gather([mine, found.of_tokens, found.of_responses]):",
     "for part in [[mine, found.of_tokens, found.of_responses]]:"),
    ("masks of rows are dropped", "context is learnt", "masks=[example.mask for _, example in examples],",
     "masks=None,"),
    ("prompts are matched with the one before", "other prompts than meant",
     "prompt_of.append(same[0] if same else len(prompts) - 1)", "prompt_of.append(0 if same else len(prompts) - 1)"),
    ("what was computed isn't restored", "computed again from a policy that has moved",
     'self._keep(state.get("rows", []), ', "self._keep([], "),
    ("what was computed isn't kept", "computed at every pass", "for row in wanted if row not in self._kept",
     "for row in wanted"),
)  # fmt: skip

ROLLOUTS = (
    ("rewards: weights are ignored", "all weigh 1", "total + source.weight * part", "total + part"),
    ("rewards: what failed counts as 0", "a number nobody gave", "    if not failed:\n", "    if True:\n"),
    ("rollouts: what could not be had is judged", "an empty response, and a bad one",
     "_whole_groups(rollouts, rollouts.failed)", "_whole_groups(rollouts, {})"),
    ("rewards: only the failed one is left out", "its group is compared without it",
     "if group not in lost]", "if i not in failed]"),
    ("rollouts: temperature of training in evaluation", "log-probs of another distribution",
     "self.temperature if temperature is None else temperature", "self.temperature"),
    ("rollouts: two requests of a prompt share a seed", "the same response twice",
     "derive(seed, purpose, place, nth)", "derive(seed, purpose, place)"),
    ("rollouts: every step's seeds are the same", "the step is forgotten", "derive(seed, purpose, place, nth)",
     "derive(seed, place, nth)"),
    ("rollouts: rows of other requests", "by request, not by response",
     "rows=tuple(request.prompt.row for request in of_response)",
     "rows=tuple(requests[i % len(requests)].prompt.row for i in range(len(of_response)))"),
    ("rollouts: every response is a group", "nothing to compare with",
     "of_group = [group for request, group in zip(requests, groups, strict=True) for _ in range(request.count)]",
     "of_group = list(range(len(of_response)))"),
)  # fmt: skip

DATA = (
    ("data: every pass in one order", "the number of the pass is forgotten", "np.random.default_rng([seed, number])",
     "np.random.default_rng([seed])"),
    ("data: held-out rows are learnt", "and the rest held out", "parts[key in out]",
     "parts[key not in out]"),
    ("data: beyond the end", "rows come twice", "stop if last is None else min(stop, last)", "stop"),
    ("data: the last step is dropped", "rounded down", "-(-end_of(count, epochs) // batch_size)",
     "max(1, end_of(count, epochs) // batch_size)"),
    ("data: batches overlap", "off by one", "start = step * self.batch_size", "start = step * (self.batch_size - 1)"),
    ("seeds: the run's is ignored", "every seed gives one run", "[str(seed), *map(str, parts)]", "[*map(str, parts)]"),
)  # fmt: skip

METRICS = (
    ("metrics: a mean of means", "calls weigh alike", "count + values.numel()", "count + 1.0"),
    ("metrics: mask dropped", "a tool's tokens are counted", "        if mask is not None:\n            values",
     "        if False:\n            values"),
    ("metrics: ranks for themselves", "each reports its own", "table = world.sum(table)", "table = table.clone()"),
)  # fmt: skip

HELDOUT = (
    ("held out: sampled at the temperature of training", "evaluation is random",
     '"heldout", run.eval_temperature)', '"heldout")',
     (f"{LOOP}::test_held_out_prompts_are_sampled_at_the_temperature_of_evaluation",)),
    ("held out: a loss per micro-batch", "how rows are cut changes it",
     "totals = totals_of(experience.sequences, world)",
     "totals = totals_of(experience.select(torch.tensor([0])).sequences, world)",
     (f"{EVALUATION}[dpo]",)),
    ("held out: not seeded", "each evaluation is of other samples", 'reseed(derive(run.seed, "heldout"))', "pass",
     (f"{LOOP}::test_every_evaluation_draws_the_same",)),
)  # fmt: skip

IMPORTANCE = (
    ("importance: upside down", "engine by trainer", "ratio = log_ratio.exp()", "ratio = (-log_ratio).exp()"),
    ("importance: a ratio of logs", "not exponentiated", "ratio = log_ratio.exp()", "ratio = 1 + log_ratio"),
    ("importance: a response's tokens each have their own", "level ignored", 'if level == "sequence":',
     'if level == "response":'),
    ("importance: a tool's tokens count", "they are in the product", "torch.where(own, difference.double(), 0.0)",
     "difference.double()"),
    ("importance: a tool's tokens are weighed", "what they hold is no ratio", "torch.where(own, weights, 1.0).float()",
     "weights.float()"),
    ("importance: masked where clipped is meant", "the wrong way round", 'cap if beyond == "clip" else 0.0',
     '0.0 if beyond == "clip" else cap'),
    ("importance: no cap", "unbounded variance", "over = own & (ratio > cap)", "over = own & (ratio > 1e30)"),
    ("importance: the cap from below", "small ones are raised", "over = own & (ratio > cap)",
     "over = own & (ratio < cap)"),
    ("importance: at the cap is beyond it", "1 is masked where the cap is 1", "over = own & (ratio > cap)",
     "over = own & (ratio >= cap)", (f"{T}/test_core_importance.py::test_a_weight_at_the_cap_is_not_beyond_it",)),
    ("importance: the difference upside down", "engine less trainer",
     "logp.double() - rollouts.logp.double(), rollouts.sequences",
     "rollouts.logp.double() - logp.double(), rollouts.sequences", (GAME,)),
    ("importance: off, and yet corrected", "an option that does nothing", 'if self._level != "off":', "if True:",
     (f"{T}/test_core_importance.py::test_uncorrected_the_gradient_is_another",)),
    ("importance: by the order, not the place", "rows left out shift the rest", "row = self._rows.get(place)",
     "row = self._rows.get(len(parts) - 1)",
     (f"{T}/test_core_importance.py::test_rows_keep_their_weights_however_they_are_chosen",)),
    ("importance: the algorithm's own is replaced", "its word goes before",
     ' or "importance" in experience:', ":",
     (f"{T}/test_core_importance.py::test_rows_keep_their_weights_however_they_are_chosen",)),
    ("importance: a step keeps the last one's", "weights of other rollouts",
     "        self._rows: dict[int, _Row] = {}", '        self._rows: dict[int, _Row] = getattr(self, "_rows", {})',
     (f"{T}/test_core_importance.py::test_where_nothing_was_compared_nothing_is_reported",)),
    ("importance: the engine's NaN is let through", "a weight that is no number",
     "if len(wrong):", "if False:",
     (f"{T}/test_core_importance.py::test_a_log_prob_that_is_no_number_is_refused",)),
    ("engine/kl: the other direction", "policy to engine", "(d.expm1() - d).sum()", "((-d).expm1() + d).sum()",
     (OF_A_STEP,)),
    ("engine/logp_difference: signed", "differences cancel", "float(d.abs().sum())", "float(d.sum())", (OF_A_STEP,)),
    ("engine/logp_difference_max: of the first rank", "not of all", "max(furthest)", "furthest[0]",
     (f"{T}/test_core_importance.py::test_metrics_are_of_all_ranks",)),
    ("importance/ess: not by the count", "samples, not a share", "sum(total) ** 2 / (n * sum(squares))",
     "sum(total) ** 2 / sum(squares)", (OF_A_STEP,)),
    ("importance/ess: of weights, not squares", "always 1", "float(weights.square().sum())", "float(weights.sum())",
     (OF_A_STEP,)),
)  # fmt: skip

TIMELINE_TESTS = f"{T}/test_core_timeline.py"
TIMELINE = (
    ("timeline: waiting counts twice", "in its phase and as communication",
     "self._now() - start - (self._world.seconds - met)", "self._now() - start"),
    ("timeline: what is outside is of the step", "a checkpoint in a step's time",
     "            self._begun += self._now() - start\n", ""),
    ("timeline: waiting outside is of the step", "a checkpoint's meetings",
     "            self._met += self._world.seconds - met\n", ""),
    ("timeline: the next step begins with its first phase", "what lies between is lost",
     "        self.start()\n        return", "        return"),
    ("timeline: what is of no phase is lost", "they don't add up", "other = max(0.0, seconds - sum(parts.values()))",
     "other = 0.0"),
    ("timeline: a phase ends before its device is done", "the next one pays", "            self._wait()\n", ""),
)  # fmt: skip

ROUNDS = (
    ("rounds: prompts are numbered anew", "each round has the seeds of the first",
     "self.sampler.prompts(rows, self._prompts)", "self.sampler.prompts(rows)"),
    ("rounds: groups are numbered anew", "two prompts are one group", "rollouts.sequences.group + self._groups",
     "rollouts.sequences.group"),
    ("rounds: places are numbered anew", "weights of other rollouts", "rollouts.places + self._responses",
     "rollouts.places"),
    ("rounds: a batch each time", "far more than lacks", "min(batch, -(-lacking * self._groups // len(groups)))",
     "batch"),
    ("rounds: as many as lack", "the rounds run out", "-(-lacking * self._groups // len(groups))", "lacking"),
    ("rounds: more than a step has", "steps of any size", "groups[:wanted])", "groups)"),
    ("rounds: of this rank alone", "ranks ask for other prompts", "for own in self.world.gather(_numbers(kept[-1]))",
     "for own in [_numbers(kept[-1])]"),
    ("rounds: every round must give something", "a small one ends the run", "needed=first", "needed=True"),
    ("rounds: one more", "off by one", "if len(judged) == most", "if len(judged) > most"),
    ("rounds: rewards of what is kept", "the policy looks as good as what it learns from",
     "spread(found.judged.rewards", "spread(found.kept.rewards"),
    ("rounds: prompts of the first round", "responses to other prompts", "prompt_of.append(part.prompt_of + before)",
     "prompt_of.append(part.prompt_of)"),
    ("rounds: nothing learnt is nothing said", "a run that does nothing", "if not groups:", "if False:"),
)  # fmt: skip

TAKEN = (
    ("ptx: while a critic warms up", "the policy moves", "parts.mixture if parts.algorithm.mixes else None",
     "parts.mixture"),
    ("ptx: where it was isn't kept", "a run that goes on takes other rows",
     'parts.mixture.load_state(state["mixture"])', "pass"),
    ("rounds: what was taken isn't kept", "a run that goes on samples other prompts",
     'self.step, self.taken = loop["step"], loop["taken"]', 'self.step = loop["step"]'),
)  # fmt: skip

MIXTURE = (
    ("ptx: sign", "what was known is unlearnt", "token_mean(-score(batch", "token_mean(score(batch"),
    ("ptx: its gradient isn't taken", "a number that is reported",
     "backend.backward(loss if weight else loss * 0.0, last)", "loss.detach()"),
    ("ptx: not in the loss that is reported", "half of it", '{"loss": loss.detach().cpu(), **batch.logged}',
     "batch.logged"),
    ("ptx: no weight", "ptx_coef does nothing", "return self.coef * part", "return part"),
    ("ptx: the same rows each time", "the rest is never learnt", "        self._updates += 1\n", ""),
    ("ptx: where it was isn't restored", "a run that goes on takes other rows",
     'self._updates = state["updates"]', "pass"),
)  # fmt: skip

RUN_DIRECTORY = (
    ("a run that goes on is still done", "killed, it is taken for done",
     '(self.path / "summary.json").unlink(missing_ok=True)', "pass"),
)  # fmt: skip

FIT = (
    ("nearest: the fewest changes", "adapters where smaller batches would do",
     "            nearest = min(", "            return min("),
    ("nearest: whatever changes", "the last that fits", "weight >= nearest.weight", "False"),
)  # fmt: skip

DIGEST = (
    ("what rewards see is no data", "a run goes on with other answers",
     'tokens.numpy().tobytes() + b"/" + extra.encode() + b"/"', 'tokens.numpy().tobytes() + b"/"'),
)  # fmt: skip

TABLES = (
    (f"{C}/rundir.py", (f"{T}/test_core_rundir.py",), RUN_DIRECTORY),
    (f"{C}/planning/fit.py", (f"{T}/planning/test_planning_fit.py",), FIT),
    (f"{C}/parts.py", (f"{T}/test_core_mixture.py",), DIGEST),
    (f"{C}/rounds.py", (f"{T}/test_core_rounds.py",), ROUNDS),
    (f"{C}/mixture.py", (f"{T}/test_core_mixture.py",), MIXTURE),
    (f"{C}/loop.py", (f"{T}/test_core_mixture.py", f"{T}/test_core_rounds.py"), TAKEN),
    (
        f"{C}/importance.py",
        (
            BY_HAND,
            GAME,
            OF_A_STEP,
            f"{T}/test_core_importance.py::test_tokens_that_are_not_the_policys_own_have_no_part_in_it",
        ),
        IMPORTANCE,
    ),
    (f"{C}/timeline.py", (TIMELINE_TESTS,), TIMELINE),
    (f"{C}/sequences.py", (f"{T}/test_core_sequences.py",), SEQUENCES),
    (f"{C}/experience.py", (f"{T}/test_core_sequences.py",), EXPERIENCE),
    (f"{C}/scores.py", (f"{T}/test_core_sequences.py",), SCORES),
    (f"{C}/models.py", (f"{T}/test_core_models.py",), MODELS),
    (f"{C}/scoring.py", (f"{T}/test_core_scoring.py",), SCORING),
    (f"{C}/loop.py", (LOOP, FAILURES, STOPS), LOOP_TABLE),
    (f"{C}/micro.py", (MICRO,), MICRO_TABLE),
    (f"{C}/shares.py", (f"{T}/test_core_shares.py",), SHARES),
    (f"{C}/offline.py", (f"{T}/test_core_offline.py",), OFFLINE),
    (f"{C}/rollouts.py", (f"{T}/test_core_rollouts.py",), ROLLOUTS),
    (f"{C}/data.py", (f"{T}/test_core_data.py",), DATA),
    (f"{C}/metrics.py", (f"{T}/test_core_models.py",), METRICS),
    (f"{C}/heldout.py", (STOPS,), HELDOUT),
)
