"""The model: its shape, the transformer, and the scalar head of reward models and critics."""

from llama2rt.model.config import LlamaConfig
from llama2rt.model.heads import ScalarModel, last_token
from llama2rt.model.llama import Llama

__all__ = ["Llama", "LlamaConfig", "ScalarModel", "last_token"]
