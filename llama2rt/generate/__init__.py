"""Text from a model: `Engine` samples many prompts at once with a paged cache."""

from llama2rt.generate.engine import Completion, Engine
from llama2rt.generate.request import SamplingOptions, Statistics, Update
from llama2rt.generate.session import Session

__all__ = ["Completion", "Engine", "SamplingOptions", "Session", "Statistics", "Update"]
