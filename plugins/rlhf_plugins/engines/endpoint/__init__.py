"""An OpenAI-compatible endpoint as a rollout engine."""
