"""Models on disk: three kinds of folders, GGUF files, the store that training resumes from."""

from llama2rt.checkpoint.convert import convert
from llama2rt.checkpoint.load import load
from llama2rt.checkpoint.store import Store

__all__ = ["Store", "convert", "load"]
