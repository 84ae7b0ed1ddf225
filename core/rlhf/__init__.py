"""RLHF and LLM post-training composed at run time from independent plugins. The public interface is `rlhf.api`."""

__version__ = "0.1.0"

API_VERSION = 1
"""The version of the plugin interface. An entry made for another one is reported, never loaded by luck."""
