"""One training step, ours and the peers': what `test_training_step` measures.

Same weights, same tokens, the same optimiser class on the same kind of state, in two settings:

    bf16      weights, gradients and moments in bf16: forward, backward, torch's fused AdamW.
              For users this is the "pure bf16" a Hugging Face script gets from dtype=bfloat16 and
              litgpt calls bf16-true; we offer it in benchmarks only, because it stops learning at
              small learning rates.
    masters   bf16 compute, fp32 weights and moments, gradient clipping. Ours is train.Optimizer;
              the peers' is what transformers' Trainer does for bf16=True and litgpt's pretrain for
              bf16-mixed: fp32 weights under autocast, fused AdamW, clip_grad_norm_.

Run as a script it is one side alone in its own process, allocator as shipped: ours keeps its memory
as our command line does, a peer's is left as Python starts it. A line on stdin asks for a step; its
seconds come back on stdout, the peak memory at the end.

    python benchmarks/training/step.py ours bf16 WEIGHTS_FOLDER
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# 24M is the shape of llama2.c's stories15M, which counts its embedding and output matrix once.
SHAPES = {
    "134M": {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn_hidden": 2048},
    "24M": {"dim": 288, "layers": 6, "heads": 6, "kv_heads": 6, "ffn_hidden": 768},
}
DOCUMENTS, LENGTH, VOCABULARY = 4, 512, 32000
LR = 1e-4
# Llama 2's (section 2.2), for all sides: TrainOptions' defaults, but not torch's.
ADAMW = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1, "fused": True}
SMOKE = os.environ.get("BENCH_SMOKE") == "1"
if SMOKE:  # it runs, and the sides agree; nothing is measured
    SHAPES = {"smoke": {"dim": 64, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_hidden": 96}}
    LENGTH, VOCABULARY = 16, 128


def tokens() -> torch.Tensor:
    """[4, 512] ids; random ones cost what real ones do."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (DOCUMENTS, LENGTH), generator=generator)


def ours(folder: str, setting: str) -> Callable[[], float]:
    """A function that takes one step and returns its mean loss in nats per predicted token."""
    from llama2rt.checkpoint import load
    from llama2rt.train import Optimizer, TrainOptions

    model, _ = load(folder, dtype=torch.bfloat16 if setting == "bf16" else torch.float32)
    ids = tokens()
    positions = torch.arange(LENGTH).repeat(DOCUMENTS)
    cu_seqlens = torch.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=torch.int32)
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    packed = ids.flatten(), positions, cu_seqlens, targets.flatten()
    if setting == "bf16":
        adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
        update = adamw.step
    else:
        optimizer = Optimizer(model, TrainOptions(lr=LR, precision="bf16"))

        def update() -> float:
            return optimizer.step(LR)

    def step() -> float:
        loss = -model(*packed).sum() / (DOCUMENTS * (LENGTH - 1))
        loss.backward()
        update()
        model.zero_grad()
        return float(loss.detach())

    return step


def transformers(folder: str, setting: str) -> Callable[[], float]:
    from transformers import LlamaForCausalLM

    dtype = torch.bfloat16 if setting == "bf16" else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False).train()
    ids = tokens()
    return _peer_step(model, setting, lambda: model(input_ids=ids, labels=ids).loss)


def litgpt(folder: str, setting: str) -> Callable[[], float]:
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    known = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = Config(
        block_size=LENGTH,
        n_layer=known["num_hidden_layers"],
        n_head=known["num_attention_heads"],
        n_query_groups=known["num_key_value_heads"],
        n_embd=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        vocab_size=known["vocab_size"],
        padded_vocab_size=known["vocab_size"],
        norm_eps=known["rms_norm_eps"],
        # What its own configurations of Llama 2 have in common.
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(folder) / "model.safetensors"))
    model = GPT(config)
    model.load_state_dict(weights)
    model.to(torch.bfloat16 if setting == "bf16" else torch.float32)
    ids = tokens()
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    return _peer_step(model, setting, lambda: chunked_cross_entropy(model(ids), targets))


def _peer_step(
    model: torch.nn.Module, setting: str, mean_loss: Callable[[], torch.Tensor]
) -> Callable[[], float]:
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "masters"):
            loss = mean_loss()
        loss.backward()
        if setting == "masters":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        model.zero_grad()
        return float(loss.detach())

    return step


SIDES = {"transformers": transformers, "litgpt": litgpt, "ours": ours}


def missing() -> dict[str, str]:
    """Peer -> why it cannot be imported."""
    reasons = {}
    for name, module in {"transformers": "transformers", "litgpt": "litgpt.model"}.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # versions that do not fit each other fail in many ways
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def peak_bytes() -> int:
    """The most memory this program has held; getrusage would begin with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    side, setting, folder = sys.argv[1:]
    if side == "ours":
        from llama2rt.train.allocator import keep_freed_memory

        keep_freed_memory()
    step = SIDES[side](folder, setting)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
