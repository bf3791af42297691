"""Models on disk in three formats, and the atomic store that training resumes from."""

from llama2rt.checkpoint.convert import convert
from llama2rt.checkpoint.load import load
from llama2rt.checkpoint.store import Store

__all__ = ["Store", "convert", "load"]
