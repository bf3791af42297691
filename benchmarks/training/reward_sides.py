"""One step of reward modelling, ours and TRL's: what `reward_step.py` measures.

Same weights, same pairs, same margins, one batch a step, in fp32 or with products in bf16 and
fp32 weights (ours `train.precision`, TRL's `bf16`, its default). Each side is what its users run:
ours the loader, objective and optimizer of `llama2rt reward` (a pair's prompt computed once, or
"whole", once a side), TRL's a RewardTrainer with its own collator, loop, fused AdamW and clipping.
Three settings:

    default       as shipped: ours keeps activations, TRL computes each block's again
    kept          both keep them: TRL with gradient_checkpointing=False
    recomputed    both compute them again: ours with train.activation_checkpointing = "full"

Run as a script it is one side alone in its own process, allocator as shipped. A line on stdin asks
for a step; its seconds, CPU seconds and loss come back on stdout, with the peak memory so far.

    python benchmarks/training/reward_sides.py ours default WEIGHTS_FOLDER 16 fp32
"""

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))

from step import SMOKE, VOCABULARY, peak_bytes

PAIRS = 2 if SMOKE else 16
"""in a batch; as a script, the last argument but one"""
PROMPT = 24 if SMOKE else 256
RESPONSES = (2, 8) if SMOKE else (16, 128)
"""fewest and most tokens of a response, drawn evenly"""
PAD, LR = 0, 1e-5
SETTINGS = ("default", "kept", "recomputed")
PRECISION = "fp32"
"""as a script, the last argument"""

Pair = tuple[list[int], list[int], float]


def pairs() -> list[Pair]:
    """(chosen, rejected, margin): two responses behind a prompt of `PROMPT` tokens; random ids
    cost what real ones do."""
    generator = np.random.default_rng(1)

    def ids(count: int) -> list[int]:
        return generator.integers(3, VOCABULARY, count).tolist()

    found = []
    for number in range(PAIRS):
        prompt = ids(PROMPT)
        lengths = generator.integers(RESPONSES[0], RESPONSES[1] + 1, 2)
        chosen, rejected = (prompt + ids(length) for length in lengths)
        found.append((chosen, rejected, (number % 4) / 3))
    return found


def ours(folder: str, setting: str, share: bool | None = None) -> None:
    """Steps of `llama2rt reward`."""
    from llama2rt.checkpoint import load
    from llama2rt.data.loader import PairLoader
    from llama2rt.data.packing import Example, at_ends
    from llama2rt.data.shared import packing
    from llama2rt.stages import reward
    from llama2rt.train import Optimizer, TrainOptions
    from llama2rt.train.recompute import recompute_blocks

    model, _ = load(folder, dtype=torch.float32)
    examples = [
        tuple(Example.of(side, np.arange(len(side)) >= PROMPT) for side in pair[:2])
        for pair in pairs()
    ]
    margins = {"margin": [margin for *_, margin in pairs()]}
    tokens = sum(len(side.tokens) for pair in examples for side in pair)
    loader = PairLoader(examples, margins, PAIRS, tokens, 0, packed=at_ends(packing(share)))
    objective = reward.objective(reward.RewardRecipe(init=folder, data=["pairs.jsonl"]))
    optimizer = Optimizer(model, TrainOptions(lr=LR, precision=PRECISION))
    with recompute_blocks(model, "full" if setting == "recomputed" else "none"):
        for _ in sys.stdin:
            with measured() as result:
                (micro,) = loader.next()
                total, _ = objective(model, micro)
                (total / micro.weight).backward()
                optimizer.step(LR)
                result["loss"] = float(total.detach()) / micro.weight
                del total


def whole(folder: str, setting: str) -> None:
    """Ours, where every document has its prompt for itself."""
    ours(folder, setting, share=False)


def trl(folder: str, setting: str) -> None:
    """Steps of TRL's trainer at work."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import RewardConfig, RewardTrainer

    class Trainer(RewardTrainer):
        last_loss = float("nan")

        def compute_loss(self, *inputs: Any, **options: Any) -> Any:
            loss = super().compute_loss(*inputs, **options)
            self.last_loss = float(loss.detach())
            return loss

    class NoMore(Exception):
        """No further step is wanted."""

    class InTurn(TrainerCallback):
        """A step for a line."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise NoMore
            self.step = measured()
            self.result = self.step.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.result["loss"] = trainer.last_loss
            self.step.__exit__(None, None, None)

    names = ("chosen_ids", "rejected_ids", "margin")
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "</s>": 2}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(NoMore):
        trainer = Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
            args=RewardConfig(
                directory,
                per_device_train_batch_size=PAIRS,
                bf16=PRECISION == "bf16",
                **TRL,
                **({"gradient_checkpointing": False} if setting == "kept" else {}),
            ),
            train_dataset=Dataset.from_list(
                [dict(zip(names, pair, strict=True)) for pair in pairs()]
            ),
            processing_class=tokenizer,
            callbacks=[InTurn()],
        )
        trainer.train()


TRL = {
    # As ours.
    "use_cpu": True,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "weight_decay": 0.1,
    # Steps, and nothing beside them.
    "max_steps": 1_000_000,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
SIDES = {"trl": trl, "whole": whole, "ours": ours}


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """What a step took, printed when it has been taken; whoever takes it adds its loss."""
    result: dict[str, float] = {}
    start, used = time.perf_counter(), cpu_seconds()
    yield result
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - used}
    print(json.dumps({**result, "peak": peak_bytes()}), file=ANSWERS, flush=True)


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


ANSWERS = sys.stdout


def main() -> None:
    global PAIRS, PRECISION, VOCABULARY
    side, setting, folder, PAIRS, PRECISION = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5]
    VOCABULARY = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    if side != "trl":
        from llama2rt.train.allocator import keep_freed_memory

        keep_freed_memory()
    # What libraries print is no answer.
    with contextlib.redirect_stdout(sys.stderr):
        SIDES[side](folder, setting)


if __name__ == "__main__":
    main()
