"""The mathematics of alignment as pure functions: tensors in, tensors out.

No models, no tokenizers, no files: whoever trains with their own loop can use these alone.
"""

from llama2rt.algorithms import advantages, losses, rewards

__all__ = ["advantages", "losses", "rewards"]
