"""Text in, token ids out: the tokenizer and the Llama-2 chat format."""

from llama2rt.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
