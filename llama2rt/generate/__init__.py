"""Text from a model: `Engine` samples many prompts at once with a paged cache."""

from llama2rt.generate.engine import Completion, Engine

__all__ = ["Completion", "Engine"]
