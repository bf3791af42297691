"""LLaMA-2-family models trained, aligned and run on custom kernels.

Importing this package is cheap: nothing here pulls in torch until a name is used, so that the
command line answers `--help` at once and build tools can read the version.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2rt import ops
    from llama2rt.checkpoint.load import load
    from llama2rt.model import Llama, LlamaConfig
    from llama2rt.text import Tokenizer

try:
    __version__ = version("llama2rt")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.1.0"

__all__ = ["Llama", "LlamaConfig", "Tokenizer", "__version__", "load", "ops"]

_HOME = {
    "Llama": "llama2rt.model",
    "LlamaConfig": "llama2rt.model",
    "Tokenizer": "llama2rt.text",
    "load": "llama2rt.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("llama2rt.ops")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'llama2rt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
