"""vLLM as a rollout engine: in the trainer's process, beside it, or as a server."""
