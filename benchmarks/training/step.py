"""One training step of the 134M shape, ours and transformers': what `test_training_step` measures.

Same weights, same tokens, the same optimiser class on the same kind of state, in two settings:

    bf16      weights, gradients and moments in bf16: forward, backward, torch's fused AdamW.
              For users this is the "pure bf16" a Hugging Face script gets from dtype=bfloat16; we
              offer it in benchmarks only, because it stops learning at small learning rates.
    masters   bf16 compute, fp32 weights and moments, gradient clipping. Ours is train.Optimizer;
              theirs is what their Trainer does for bf16=True: fp32 weights under autocast, fused
              AdamW, clip_grad_norm_.

Run as a script it is one side alone in its own process, allocator as shipped: ours keeps its memory
as our command line does, theirs is left as Python starts it. A line on stdin asks for a step; its
seconds come back on stdout, the peak memory at the end.

    python benchmarks/training/step.py ours bf16 WEIGHTS_FOLDER
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import torch

SHAPE = {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn_hidden": 2048}
DOCUMENTS, LENGTH, VOCABULARY = 4, 512, 32000
LR = 1e-4


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
        adamw = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
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


def theirs(folder: str, setting: str) -> Callable[[], float]:
    from transformers import LlamaForCausalLM

    dtype = torch.bfloat16 if setting == "bf16" else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False).train()
    ids = tokens()
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "masters"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if setting == "masters":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        model.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    side, setting, folder = sys.argv[1:]
    if side == "ours":
        from llama2rt.train.allocator import keep_malloc

        keep_malloc()
    step = {"ours": ours, "theirs": theirs}[side](folder, setting)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}), flush=True)


if __name__ == "__main__":
    main()
