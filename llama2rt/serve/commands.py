"""`llama2rt serve`: a model behind HTTP until SIGTERM or Ctrl-C."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from llama2rt.errors import InputError
from llama2rt.generate.commands import Opening
from llama2rt.generate.sampling import check_whole
from llama2rt.serve.address import is_loopback, listening
from llama2rt.serve.options import Limits

KEY_VARIABLE = "LLAMA2RT_API_KEY"
_LIMITS, _OPENING = Limits(), Opening()


def serve(
    model: tyro.conf.Positional[Path],
    /,
    limits: Annotated[Limits, tyro.conf.arg(name="")] = _LIMITS,
    opening: Annotated[Opening, tyro.conf.arg(name="")] = _OPENING,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    max_sequences: int = 64,
    cache_bytes: int | None = None,
    weights_from: Path | None = None,
) -> None:
    """Serve a model by OpenAI's API, with a page to talk to it at /. SIGTERM and Ctrl-C end it,
    once the answers under way are complete.

    Args:
        model: Folder of this project, Hugging Face or Meta; or a GGUF file.
        host: Address to listen at; another than a loopback one only with an API key.
        port: 0 takes a free one, and says which.
        api_key: What clients must send as Authorization: Bearer KEY. LLAMA2RT_API_KEY in the
            environment does the same and does not show in the list of processes.
        name: What clients call the model; by default the folder's name.
        max_sequences: Most sequences that decode together.
        cache_bytes: Most memory that sampling takes beside the model; by default half of what is
            free.
        weights_from: Folder below which clients may name other weights of this model, by
            POST /update_weights_from_disk; by default nowhere.
    """
    limits.check()
    check_whole("port", port, 0, 65535)
    check_whole("max-sequences", max_sequences, 1)
    if cache_bytes is not None:
        check_whole("cache-bytes", cache_bytes, 1, 2**63 - 1)
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    check_sender(host, key)
    try:
        from llama2rt.serve import process
        from llama2rt.serve.app import Server, build
        from llama2rt.serve.worker import Worker
    except ModuleNotFoundError as error:
        raise InputError(f"needs {error.name}: pip install 'llama2rt[serve]'") from None

    with listening(host, port) as listener:  # before the weights are read
        engine = opening.engine(model, cache_bytes=cache_bytes, at_once=max_sequences)
        shared = Server(
            Worker(engine), name or model.resolve().name, limits, weights_from=weights_from
        )
        process.run(build(shared, api_key=key), shared, listener, host)


def check_sender(host: str, key: str | None) -> None:
    """InputError where a host that others can reach goes with no API key, or the key is none."""
    if key is not None and (not key.strip() or not key.isascii() or key != key.strip()):
        raise InputError("api-key: expected ASCII text without spaces around it")
    if key is None and not is_loopback(host):
        raise InputError(
            f"host: {host} may be reached from other machines; give --api-key (or "
            f"{KEY_VARIABLE}), or listen at 127.0.0.1"
        )
