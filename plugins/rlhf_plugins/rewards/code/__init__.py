"""Programs in responses, run against tests in processes with limits."""
