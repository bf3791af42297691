"""Sample from a model: load a folder, or make a small model, and continue a few prompts.

python examples/sample.py                      a model trained here on four lines, in seconds
python examples/sample.py path/to/model "Hi"   any folder that llama2rt.load reads
"""

import sys
import tempfile

import torch

import llama2rt
from llama2rt.data.packing import Example, pack
from llama2rt.generate import Engine
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions

LINES = [
    "The owl looked at the moon and said nothing.",
    "The cat looked at the fish and said thank you.",
    "The fish looked at the cat and said goodbye.",
    "The moon looked at nobody and said nothing.",
]


def small_model() -> tuple[llama2rt.Llama, llama2rt.Tokenizer]:
    """The library's parts by hand: a tokenizer, a model, packed batches, a training loop."""
    tokenizer = llama2rt.Tokenizer.train(LINES, 300, tempfile.mkdtemp())
    config = llama2rt.LlamaConfig(
        dim=64, layers=2, heads=4, kv_heads=4, ffn_hidden=160, context=128, vocab_size=300
    )
    model = llama2rt.Llama(config, dtype=torch.float32).initialize(seed=0)
    optimizer = Optimizer(model, TrainOptions(lr=3e-3))
    batch = pack([Example.of(tokenizer.encode(line, bos=True, eos=True)) for line in LINES])
    for step in range(60):
        logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
        loss = -logprob.sum() / batch.weight
        loss.backward()
        optimizer.step(lr=3e-3)
        if step % 20 == 19:
            print(f"step {step + 1}: {loss.item():.3f} nats per token")
    return model, tokenizer


def main() -> None:
    if len(sys.argv) > 1:
        model, tokenizer = llama2rt.load(sys.argv[1])
    else:
        model, tokenizer = small_model()
    prompts = sys.argv[2:] or ["The owl", "The moon looked"]
    tokens = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    engine = Engine(model, tokenizer)
    for sample in engine.generate(tokens, n=3, temperature=0.8, top_p=0.9, max_tokens=40, seed=1):
        logprob = sum(sample.logprobs)
        print(f"{logprob:7.2f}  {prompts[sample.prompt_index]}|{sample.text}")


if __name__ == "__main__":
    main()
