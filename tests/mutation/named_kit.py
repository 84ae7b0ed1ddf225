"""Named errors in the plugin author's kit: a contract that lets one through. Rows as in `named_algorithms`."""

from __future__ import annotations

K = "core/rlhf/testing"
T = "tests/core/testing"
ALGORITHMS = f"{T}/test_testing_broken_algorithms.py"
ONE = f"{ALGORITHMS}::test_each_fails_for_its_own_reason"
RUN = f"{ALGORITHMS}::test_those_that_only_a_run_finds"


def of(name: str) -> tuple[str, ...]:
    return (f"{ONE}[{name}]",)


TRIAL = (
    ("kit: nothing is masked", "tokens of a tool are learnt from", "own[1] = False", "own[1] = True", of("all-tokens")),
    ("kit: anything is near enough", "means of another count pass", "<= TOLERANCE * size + 1e-7", "<= size + 1e-7",
     of("batch-mean")),
    ("kit: a step's totals are a micro-batch's", "no cut is told", "Batch(prepared.select(rows), totals)",
     "Batch(prepared.select(rows), Totals(len(rows), len(rows), 1))", of("leaking")),
)  # fmt: skip
TABLE = (
    ("kit: masked tokens are scored alike", "what leaks isn't seen", "drawn = self._noise * torch.sin(",
     "drawn = 0.0 * torch.sin(", of("leaking")),
    ("kit: the same noise each time", "a ratio of two forwards hides it", "torch.sin(self._calls + torch.arange",
     "torch.sin(1 + torch.arange", of("leaking")),
)  # fmt: skip
NUMBERS = (
    ("kit: micro-batches are the whole", "nothing is cut", "return [[row] for row in reversed(rows)]",
     "return [rows]", of("batch-mean")),
    ("kit: both ranks have all", "no rank is without", "table, [0], world=world", "table, None, world=world",
     of("needs-rows")),
)  # fmt: skip
RUNS = (
    ("kit: it learns either way", "a turned sign passes", "require(end - start >= self.learns,",
     "require(abs(end - start) >= self.learns,", (f"{RUN}[turned]",)),
    ("kit: weights and metrics aren't compared", "two runs never differ", "if not same(one[name], other.get(name)):",
     "if False:", (f"{RUN}[clockwork]",)),
)  # fmt: skip
OPTIMIZERS = (
    ("kit: any fall will do", "uphill by a half", "bench.loss() <= 0.5 * start", "bench.loss() <= 5e9 * start",
     (f"{T}/test_testing_optimizers.py::test_each_fails_for_its_own_reason[uphill]",)),
)  # fmt: skip
BACKENDS = (
    ("kit: each tensor's norm", "clipping one by one passes", "float(gradient.square().sum())",
     "float(gradient.norm())", (f"{T}/test_testing_backends.py",)),
)  # fmt: skip
TABLES = (
    (f"{K}/trial.py", (ALGORITHMS,), TRIAL),
    (f"{K}/table.py", (ALGORITHMS,), TABLE),
    (f"{K}/algorithm_numbers.py", (ALGORITHMS,), NUMBERS),
    (f"{K}/algorithm_runs.py", (ALGORITHMS,), RUNS),
    (f"{K}/optimizers.py", (f"{T}/test_testing_optimizers.py",), OPTIMIZERS),
    (f"{K}/backends.py", (f"{T}/test_testing_backends.py",), BACKENDS),
)
"""(file, the tests that should notice, rows)"""
