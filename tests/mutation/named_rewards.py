"""Named errors in rewards. A row: name, what it is, the text, what replaces it, tests."""

from __future__ import annotations

R = "plugins/rlhf_plugins/rewards"
T = "tests/plugins/rewards"
CHEATS = f"{T}/test_rewards_code_sandbox.py::test_a_cheat_does_not_pass"

HTTP = (
    ("http: any number of scores will do", "scores are given to the wrong completions",
     "if len(scores) != count:", "if len(scores) > count:"),
    ("http: NaN is a score", "one NaN ends the run later, and nobody says whose", "if not math.isfinite(number):",
     "if math.isinf(number):"),
    ("http: true is 1", "a flag is taken for a score", "isinstance(value, bool) or not", "not"),
)  # fmt: skip

ASKING = (
    ("asking: pauses don't grow", "a busy server is asked as fast as ever", "FIRST_PAUSE * 2**attempt",
     "FIRST_PAUSE * 2**0", ("tests/plugins/engines/test_engines_endpoint.py",)),
    ("asking: one try more", "retries are off by one", "if attempt == self._retries or",
     "if attempt == self._retries + 1 or", (f"{T}/test_rewards_http.py",)),
    ("asking: a refusal is asked again", "a wrong token is sent again and again",
     "raise Refused(reply.status, why)", "raise Unusable(why)", (f"{T}/test_rewards_http.py",)),
    ("asking: the token is told", "an error holds the token",
     '(text.replace(self._token, "***") if self._token else text)', "text", (f"{T}/test_rewards_http.py",)),
)  # fmt: skip

TOKENS = (
    ("token: any name with localhost in it is this host", "a token goes to a stranger",
     'host.endswith(".localhost")', '"localhost" in host', (f"{T}/test_rewards_http.py",)),
)  # fmt: skip

JUDGE = (
    ("judge: the second order counts as the first", "who stands first wins",
     "share = (ahead + 1.0 - behind) / 2.0", "share = (ahead + behind) / 2.0"),
    ("judge: one order alone", "a judge who likes the first decides", "share = (ahead + 1.0 - behind) / 2.0",
     "share = ahead"),
    ("judge: the loser is given the winner's share", "both of a pair win",
     "won[pair.two].append(1.0 - share)", "won[pair.two].append(share)"),
    ("judge: no verdict is a zero", "a shy judge punishes",
     "return [failed.get(key, again) if one is None else one", "return [0.0 if one is None else one"),
)  # fmt: skip

JUDGE_ANSWERS = (
    ("judge: the first object counts", "an example of the format is the verdict", "json.loads(found[-1])",
     "json.loads(found[0])"),
    ("judge: scores out of range", "11 of 10", "if low <= value <= high else None", "if low <= value else None"),
)  # fmt: skip

CASES = (
    ("code: a comparison turned round as it is", "2 < f() becomes f() < 2", "ast.Lt: ast.Gt, ast.LtE: ast.GtE",
     "ast.Lt: ast.Lt, ast.LtE: ast.LtE"),
    ("code: not forgotten", "assert not f() passes where f()", "lambda value: not holds(value)",
     "lambda value: holds(value)"),
    ("code: definitions alone are a test", "every program passes",
     "if not any(_does_something(node) for node in tree.body):", "if not tree.body:"),
    ("code: what comes before an assert is left out", "a name that its setup defines isn't there",
     "before.append(node)", "before.append(ast.Pass())"),
)  # fmt: skip

SANDBOX = (
    ("code: leaving with an error passes", "the exit code isn't looked at", "if ran.code != 0:\n                return",
     "if ran.code < 0:\n                return"),
    ("code: whoever writes to the report passes", "the secret isn't compared",
     'if not secrets.compare_digest(told["secret"], secret):', 'if told["secret"] is None:', (CHEATS,)),
    ("code: a test without an end passes", "no value is a good value",
     'return Verdict("failed", "no value")', 'return Verdict("passed", "no value")', (CHEATS,)),
)  # fmt: skip

JAIL = (
    ("code: what the program did to Python stays", "abs returns 0 in its own test",
     'vars(sys.modules["builtins"]).update(own)', "own.copy()", (CHEATS,)),
    ("code: a tuple is a list", "(1, 2) == [1, 2]", '(tuple, "t")', '(tuple, "l")',
     (f"{T}/test_rewards_code_cases.py",)),
)  # fmt: skip

CODE = (
    ("code: all or nothing by one", "one test of many is enough",
     "return float(outcome.passed == outcome.count)", "return float(outcome.passed > 0)"),
    ("code: what couldn't be run is a zero", "a full process table punishes", "if outcome.broken:",
     "if not outcome.count:"),
)  # fmt: skip

MATH = (
    ("math: undecided is right", "an endless formula wins", 'isinstance(verdict, dict) and verdict["equal"]',
     'not isinstance(verdict, dict) or verdict["equal"]'),
    ("math: the bonus is for right answers alone", "form isn't taught", "else self.config.wrong) + bonus",
     "else self.config.wrong) + bonus * right"),
    ("math: any box", "the first box is the answer", "[last_boxed(text) for text in rollouts.texts]",
     '[last_boxed(text.split("}")[0] + "}") for text in rollouts.texts]'),
)  # fmt: skip

TABLES = (
    (f"{R}/http/protocol.py", (f"{T}/test_rewards_http.py",), HTTP),
    ("plugins/rlhf_plugins/engines/asking.py", (), ASKING),
    (f"{R}/remote.py", (), TOKENS),
    (f"{R}/judge/reward.py", (f"{T}/test_rewards_judge.py",), JUDGE),
    (f"{R}/judge/questions.py", (f"{T}/test_rewards_judge.py",), JUDGE_ANSWERS),
    (f"{R}/code/cases.py", (f"{T}/test_rewards_code_cases.py",), CASES),
    (f"{R}/code/sandbox.py", (f"{T}/test_rewards_code_sandbox.py",), SANDBOX),
    (f"{R}/code/jail.py", (f"{T}/test_rewards_code_sandbox.py",), JAIL),
    (f"{R}/code/reward.py", (f"{T}/test_rewards_code.py",), CODE),
    (f"{R}/math/reward.py", (f"{T}/test_rewards_math.py",), MATH),
)
