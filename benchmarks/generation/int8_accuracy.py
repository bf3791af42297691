"""What int8 weights cost: perplexity of a text, and agreement of greedy tokens, beside the model's.

Both run through the engine's own forward passes (`generate.runner`). Perplexity is over documents
of one length cut from the end of the text, every token but the first of each. Agreement is the
share of those positions at which both find the same token likeliest, and the tokens that greedy
answers to beginnings of documents share before they part.

    python benchmarks/generation/int8_accuracy.py MODEL --text tinyshakespeare.txt
    python benchmarks/generation/int8_accuracy.py MODEL --text FILE --dtype float32 --documents 64
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2rt.checkpoint import load
from llama2rt.generate import Engine
from llama2rt.generate.kv_cache import Addresses, KVCache
from llama2rt.generate.runner import Runner
from llama2rt.model import Llama

BATCH = 4  # documents of a forward pass


def logprobs(runner: Runner, documents: np.ndarray) -> Tensor:
    """documents [B, N] -> fp32 [B, N, V], each document a prompt of one forward pass."""
    count, length = documents.shape
    cache = KVCache(runner.model.config.layers, count, length)
    every = torch.arange(count * length)
    cache.addresses = Addresses(
        slots=every,
        prompt_cu_seqlens=torch.arange(0, count * length + 1, length, dtype=torch.int32),
        prompt_tokens=count * length,
        longest_prompt=length,
        block_table=torch.empty(0, 0, dtype=torch.int32),
        lengths=torch.empty(0, dtype=torch.int32),
        cu_seqlens_q=None,
    )
    tokens = torch.from_numpy(documents.astype(np.int64)).flatten()
    logits = runner.forward(tokens, every % length, cache, slice(None))
    return logits.log_softmax(-1).view(count, length, -1)


@torch.inference_mode()
def compare(model: Llama, tokenizer: Any, documents: np.ndarray, new: int) -> dict[str, Any]:
    runners = {"same": Runner(model), "int8": Runner(model, "int8")}
    losses, equal = {"same": 0.0, "int8": 0.0}, 0
    for runner in runners.values():
        runner.refresh()
    for begin in range(0, len(documents), BATCH):
        part = documents[begin : begin + BATCH]
        targets = torch.from_numpy(part[:, 1:].astype(np.int64))[..., None]
        likeliest = []
        for name, runner in runners.items():
            found = logprobs(runner, part)[:, :-1]
            losses[name] -= found.gather(2, targets).double().sum().item()
            likeliest.append(found.argmax(-1))
        equal += int((likeliest[0] == likeliest[1]).sum())
    count = documents[:, 1:].size
    prompts = [document[:16].tolist() for document in documents[:32]]
    answers = [
        [
            c.tokens
            for c in Engine(model, tokenizer, weights=name).generate(  # type: ignore[arg-type]
                prompts, temperature=0, max_tokens=new
            )
        ]
        for name in runners
    ]
    shared = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        for x, y in zip(*answers, strict=True)
    ]
    perplexity = {name: math.exp(loss / count) for name, loss in losses.items()}
    return {
        "tokens": count,
        "perplexity": perplexity,
        "ratio": perplexity["int8"] / perplexity["same"],
        "likeliest_token_equal": equal / count,
        "greedy_tokens_shared": float(np.mean(shared)),
        "greedy_tokens": new,
        "weights_bytes": {name: runner.nbytes for name, runner in runners.items()},
        "paths": {name: runner.path for name, runner in runners.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of a document")
    parser.add_argument("--new", type=int, default=32, help="tokens of a greedy answer")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    assert isinstance(model, Llama) and tokenizer is not None, f"{options.model} writes no text"
    wanted = options.documents * options.tokens
    # Enough characters for so many tokens, from the text's end: what a training run validates on.
    text = options.text.read_text(encoding="utf-8")[-8 * wanted :]
    tokens = np.array(tokenizer.encode(text))[-wanted:]
    count = len(tokens) // options.tokens
    documents = tokens[: count * options.tokens].reshape(count, options.tokens)
    row = compare(model, tokenizer, documents, options.new) | {"dtype": options.dtype}
    print(json.dumps(row, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
