"""32 prompts sampled at once, ours against `transformers.generate`: same weights, dtype, number of
new tokens and sampling settings, EOS disabled. Prompts are of one length, the peer's best case (it
pads, we do not). The peer runs before each of our rounds, so the two are interleaved; the figure is
the ratio of medians. Allocator as the process has it: `make bench` sets the same for both.

    pytest benchmarks/generation --benchmark-columns=median,rounds
"""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from llama2rt import energy
from llama2rt.checkpoint import hf
from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig

PROMPTS, PROMPT_TOKENS, ROUNDS = 32, 64, 5
SHAPES = {
    "tiny": (
        LlamaConfig(dim=192, layers=6, heads=6, kv_heads=6, ffn_hidden=512, vocab_size=512),
        128,
    ),
    "134M": (
        LlamaConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn_hidden=2048),
        32,
    ),
}
TOKENIZER = SimpleNamespace(bos=1, eos=-1, stop_ids=(-1,), vocab_size=32000, decode=lambda ids: "")


# int8: our weights alone; theirs are bf16 then.
KINDS = {
    "bf16": (torch.bfloat16, "same"),
    "fp32": (torch.float32, "same"),
    "int8": (torch.bfloat16, "int8"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_32_prompts(benchmark, capsys, tmp_path, shape, kind):
    dtype, weights = KINDS[kind]
    config, new_tokens = SHAPES[shape]
    ours = Llama(config, dtype=dtype).initialize(seed=0)
    hf.save(ours, None, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    prompts = torch.randint(3, config.vocab_size, (PROMPTS, PROMPT_TOKENS))
    engine = Engine(ours, TOKENIZER, weights=weights)
    their_seconds = []
    used = []
    meter = energy.of_device(torch.device("cpu"))

    def run_theirs():
        started = time.perf_counter()
        out = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        their_seconds.append(time.perf_counter() - started)
        assert out.shape == (PROMPTS, PROMPT_TOKENS + new_tokens)
        meter.lap()

    def run_ours():
        completions = engine.generate(prompts.tolist(), max_tokens=new_tokens)
        used.append(meter.lap())
        assert all(len(completion.tokens) == new_tokens for completion in completions)

    with meter:
        benchmark.pedantic(run_ours, setup=run_theirs, rounds=ROUNDS, warmup_rounds=1)
    peer = statistics.median(their_seconds[1:])
    median = benchmark.stats.stats.median
    tokens = PROMPTS * new_tokens
    drawn = energy.in_turn(used[1:])
    joules = drawn.joules_per(tokens * ROUNDS)
    row = {
        "tokens_per_s": tokens / median,
        "transformers_tokens_per_s": tokens / peer,
        "ratio": peer / median,
        "joules_per_token": joules,
        "energy": drawn.record(),
        "threads": torch.get_num_threads(),
    }
    benchmark.extra_info.update(row)
    with capsys.disabled():
        print(
            f"\nsampling 32 prompts, {shape} {kind}: {row['tokens_per_s']:.0f} tokens/s, "
            f"transformers {row['transformers_tokens_per_s']:.0f}, ratio {row['ratio']:.2f} "
            f"({row['threads']} threads), "
            + (drawn.describe() if joules is None else f"{joules:.3g} J/token")
        )
