"""The model: its shape, the transformer, and the scalar head of reward models and critics.

Names load when they are used, so that whoever needs the shape alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2rt.model.config import LlamaConfig
    from llama2rt.model.heads import ScalarModel, last_token
    from llama2rt.model.llama import Llama
    from llama2rt.model.transformer import Transformer

__all__ = ["Llama", "LlamaConfig", "ScalarModel", "Transformer", "last_token"]

_MODULE_OF = {
    "Llama": "llama",
    "LlamaConfig": "config",
    "ScalarModel": "heads",
    "Transformer": "transformer",
    "last_token": "heads",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"llama2rt.model.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'llama2rt.model' has no attribute {name!r}")
