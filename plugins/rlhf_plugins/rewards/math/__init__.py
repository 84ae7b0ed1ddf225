"""Mathematical answers, judged by math-verify in processes that can be ended."""
