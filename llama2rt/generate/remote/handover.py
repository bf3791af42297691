"""Weights that have changed, on their way to a server: a Hugging Face folder, and a word to it."""

import hashlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama2rt.checkpoint import files, hf
from llama2rt.errors import InputError
from llama2rt.generate.remote.client import Client
from llama2rt.model.adapters import layers
from llama2rt.model.llama import Llama

FOLDER_VARIABLE = "LLAMA2RT_WEIGHTS"
# Server -> digest of the weights that this process gave it last, whichever sampler did.
_HELD: dict[str, str] = {}
_COMMAND_SECONDS = 3600


@dataclass(frozen=True)
class Handover:
    """Where the weights are written, and how the server is told: `reload` is a URL, to which
    `{"model_path": FOLDER}` is posted (SGLang's /update_weights_from_disk, and `llama2rt serve`'s),
    or a command, which has the folder in LLAMA2RT_WEIGHTS and ends when the server has read it."""

    folder: Path
    reload: str

    def __post_init__(self) -> None:
        if not self.reload.strip():
            raise InputError("reload: expected a URL or a command")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"weights: expected a folder, {self.folder} is a file")

    def hand_over(self, model: Llama, tokenizer: Any, client: Client) -> None:
        """Write and tell, unless the server has these very weights already. InputError for a model
        under an adapter, which no plain folder holds; OSError where the command fails."""
        if layers(model):
            raise InputError("weights: a model under an adapter (lora) cannot be handed over")
        digest = weights_digest(model)
        if digest == _HELD.pop(client.url, None):
            _HELD[client.url] = digest
            return
        hf.save(model, tokenizer, self.folder)
        if self.reload.startswith(("http://", "https://")):
            client.post(self.reload, {"model_path": str(self.folder.resolve())})
        else:
            self._run()
        client.get("/v1/models")  # waits, with its attempts, for one that starts again
        _HELD[client.url] = digest

    def _run(self) -> None:
        environment = {**os.environ, FOLDER_VARIABLE: str(self.folder.resolve())}
        done = subprocess.run(
            shlex.split(self.reload),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
        )
        if done.returncode:
            raise OSError(
                f"reload: {self.reload!r} ended with status {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-500:]}"
            )


def weights_digest(model: Llama) -> str:
    """Of every weight's bytes, in order: equal weights have been handed over already. About a
    second a gigabyte, a fraction of what writing them takes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in files.weights(model).items():
        flat = weight.detach().cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
