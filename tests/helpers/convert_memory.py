"""How much memory a conversion takes: a folder in the shape of a 70B one, small in width and large
in count, through all three formats.

    python tests/helpers/convert_memory.py FOLDER

prints JSON: the size of a file, how many there are, and each conversion's highest resident memory
beyond that before it, as Linux counts it (mapped files included).
"""

import json
import logging
import sys
from pathlib import Path

import torch

from llama2rt import Llama, LlamaConfig
from llama2rt.checkpoint import convert, hf, native
from llama2rt.checkpoint.files import weights
from llama2rt.checkpoint.weight import Weight

FILE_BYTES = 8 << 20
# 40 of everything that model-parallel ranks share, as there are to be 40 of them.
CONFIG = LlamaConfig(
    dim=640, layers=38, heads=40, kv_heads=40, ffn_hidden=1280, vocab_size=1280, context=4096
)
WARM_UP = LlamaConfig(dim=16, layers=1, heads=2, kv_heads=2, ffn_hidden=16, vocab_size=16)
CONVERSIONS = (("hf", "native", 1), ("native", "meta", 40), ("meta", "hf", 1))


def resident(kind: str) -> int:
    """Bytes: VmRSS now, VmHWM at the highest point."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{kind}:"))


def made(name: str, shape: torch.Size) -> Weight:
    """A weight that is made when it is read: the model is never in memory."""

    def fetch(area: tuple[slice, ...]) -> torch.Tensor:
        seed = sum(name.encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).bfloat16()[area]

    return Weight(shape, torch.bfloat16, fetch)


def main() -> None:
    logging.disable(logging.WARNING)  # neither folder has a tokenizer
    folder = Path(sys.argv[1])
    native.save(Llama(WARM_UP).initialize(), None, folder / "warm-native")
    convert(folder / "warm-native", folder / "warm-meta", "meta", shards=2)
    convert(folder / "warm-meta", folder / "warm-hf", "hf")
    with torch.device("meta"):
        model = Llama(CONFIG, dtype=torch.bfloat16)
    values = {name: made(name, p.shape) for name, p in weights(model).items()}
    hf.save(model, None, folder / "hf", weights=values, shard_bytes=FILE_BYTES)
    found: dict[str, int] = {"files": len(list((folder / "hf").glob("model-*.safetensors")))}
    for source, to, shards in CONVERSIONS:
        target = folder / (to if to != "hf" else "again")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
        convert(folder / source, target, to, shards=shards)
        found[f"{source} to {to}"] = resident("VmHWM") - before
    found["meta files"] = len(list((folder / "meta").glob("*.pth")))
    found["largest"] = max(p.stat().st_size for p in folder.glob("[hm]*/*-of-*.safetensors"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
