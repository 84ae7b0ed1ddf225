"""The first-party plugins of `rlhf`, registered through the same entry points as anybody's."""
