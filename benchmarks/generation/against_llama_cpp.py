"""Decoding of one sequence against llama.cpp: the same weights, greedy, 32 tokens in and 64 out.

Both read weights of one kind: bf16 and BF16, or int8 (a scale a row) and Q8_0 (a scale a block).
Before anything is timed both must give the same greedy tokens on fp32 weights. Rounds of the two
alternate, llama.cpp first; the figure is the ratio of medians of tokens a second, prompt excluded.
Time to the first token of a 512-token prompt is measured the same way. llama.cpp keeps its
keys and values in F16, as it does by default.

    pip install llama-cpp-python==0.3.36 gguf
    python benchmarks/generation/against_llama_cpp.py --out build/against-llama-cpp.json
    python benchmarks/generation/against_llama_cpp.py --shapes 24M --rounds 3
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig
from llama2rt.train.allocator import keep_freed_memory

SHAPES = {
    "24M": LlamaConfig(dim=288, layers=6, heads=6, kv_heads=6, ffn_hidden=768, context=1024),
    "134M": LlamaConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn_hidden=2048, context=1024),
}
PROMPT, NEW, LONG = 32, 64, 512
KINDS = {"bf16": ("same", "BF16"), "int8": ("int8", "Q8_0")}


class Ids:
    """A tokenizer for token ids without text; no id ends a sequence."""

    bos, eos, vocab_size, stop_ids = 1, -1, 32000, (-1,)

    def decode(self, ids: list[int]) -> str:
        return ""


# Our names -> llama.cpp's.
_NAMES = {
    "output.weight": "output.weight",
    "transformer.embedding.weight": "token_embd.weight",
    "transformer.norm.weight": "output_norm.weight",
}
_BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def their_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, module, _ = name.split(".")
    return f"blk.{layer}.{_BLOCK_NAMES[module]}.weight"


def their_rows(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp turns neighbouring elements of a head together, we halves: rows change places."""
    if not name.endswith(("query.weight", "key.weight")):
        return weight
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(model: Llama, path: Path, kind: str) -> None:
    """The model with a vocabulary of meaningless words. kind: F32, BF16 or Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    words += [f"w{i}" for i in range(len(words), config.vocab_size)]
    types += [gguf.TokenType.NORMAL] * (config.vocab_size - len(types))
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.named_parameters():
        weight = their_rows(name, parameter.detach(), config.head_dim).float().contiguous().numpy()
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(their_name(name), weight)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(weight, quantised)
            writer.add_tensor(their_name(name), data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Theirs:
    """llama.cpp: greedy tokens after a prompt, and the seconds from its first token to its last."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=1024,
            n_batch=512,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )

    def tokens(self, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
        """(tokens, the time at which each was there)."""
        self.llama.reset()
        found, at = [], []
        for token in self.llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            at.append(time.perf_counter())
            if len(found) == new:
                break
        return found, at


class Ours:
    """The engine, the same way."""

    def __init__(self, model: Llama, weights: Any) -> None:
        self.engine = Engine(model, Ids(), weights=weights)

    def tokens(self, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
        at: list[float] = []
        record = self.engine.runner.forward

        def forward(*inputs: Any) -> torch.Tensor:
            at.append(time.perf_counter())
            return record(*inputs)

        self.engine.runner.forward = forward  # type: ignore[method-assign]
        try:
            (completion,) = self.engine.generate([prompt], temperature=0, max_tokens=new)
        finally:
            self.engine.runner.forward = record  # type: ignore[method-assign]
        at.append(time.perf_counter())
        return completion.tokens, at[-new:]


def tokens_per_s(side: Ours | Theirs, prompt: list[int]) -> float:
    _, at = side.tokens(prompt, NEW)
    return (len(at) - 1) / (at[-1] - at[0])


def seconds_to_first(side: Ours | Theirs, prompt: list[int]) -> float:
    started = time.perf_counter()
    side.tokens(prompt, 1)
    return time.perf_counter() - started


def compare(shape: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    config = SHAPES[shape]
    model = Llama(config).initialize(0)
    with torch.no_grad():
        model.output.weight.mul_(15)  # it prefers some tokens to others
    generator = np.random.default_rng(0)
    short, long = (generator.integers(300, 32000, n).tolist() for n in (PROMPT, LONG))
    write_gguf(model, folder / "F32.gguf", "F32")
    ours, theirs = Ours(model, "same"), Theirs(folder / "F32.gguf")
    same = ours.tokens(short, NEW)[0], theirs.tokens(short, NEW)[0]
    assert same[0] == same[1], f"greedy tokens on fp32 weights differ: {same}"
    del ours, theirs
    model.to(torch.bfloat16)
    rows = []
    for kind, (weights, their_kind) in KINDS.items():
        path = folder / f"{their_kind}.gguf"
        write_gguf(model, path, their_kind)
        ours, theirs = Ours(model, weights), Theirs(path)
        speeds: dict[str, list[float]] = {"theirs": [], "ours": []}
        first: dict[str, list[float]] = {"theirs": [], "ours": []}
        for number in range(rounds + 1):
            for name, side in (("theirs", theirs), ("ours", ours)):
                speed = tokens_per_s(side, short)
                seconds = seconds_to_first(side, long)
                if number:  # the first round is a warm-up
                    speeds[name].append(speed)
                    first[name].append(seconds)
        row = {
            "shape": shape,
            "weights": kind,
            "tokens_per_s": statistics.median(speeds["ours"]),
            "llama_cpp_tokens_per_s": statistics.median(speeds["theirs"]),
            "ratio": statistics.median(speeds["ours"]) / statistics.median(speeds["theirs"]),
            "first_token_s": statistics.median(first["ours"]),
            "llama_cpp_first_token_s": statistics.median(first["theirs"]),
            "rounds": speeds,
            "threads": torch.get_num_threads(),
            "llama_cpp_python": llama_cpp.__version__,
        }
        rows.append(row)
        print(
            f"{shape} {kind}: {row['tokens_per_s']:.1f} tokens/s, llama.cpp ({their_kind}) "
            f"{row['llama_cpp_tokens_per_s']:.1f}, ratio {row['ratio']:.2f}; first token of {LONG} "
            f"{row['first_token_s'] * 1e3:.0f} ms, llama.cpp "
            f"{row['llama_cpp_first_token_s'] * 1e3:.0f} ms",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(shape, options.rounds, Path(folder))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
