"""One round of sampling, scoring and training, ours and TRL's: what `group_step.py` measures.

Same weights, same prompts by token ids, the same most tokens of a response, temperature 1, one
gradient step a round on everything sampled, activations kept, in fp32 or with products in bf16 and
fp32 weights (ours `train.precision`, TRL's `bf16`, its default). Two settings:

    grpo     8 responses a prompt, a reward model, a reference policy for the k3 KL in the loss.
             TRL's is GRPOTrainer with its own generation (transformers), scoring and loss.
    ppo      one response a prompt, and a critic that is trained too. TRL's is PPOTrainer, which
             left TRL after 1.12: that release, from a folder of its own.

Each side is what its users run: ours `collect` and `improve` of `llama2rt ppo`, TRL's a trainer at
work. Random weights end a response at the same rate on both sides; their mean lengths are recorded.

Run as a script it is one side alone in its own process, allocator as shipped. A line on stdin asks
for a round; its seconds, CPU seconds and mean length come back on stdout, with the peak memory.

    BENCH_PRECISION=bf16 python benchmarks/training/group_sides.py ours grpo FOLDER PROMPTS TOKENS
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))

from reward_sides import measured

GROUP = 8
BETA, LR = 0.04, 1e-6
SETTINGS = ("grpo", "ppo")
PRECISION: Any = os.environ.get("BENCH_PRECISION", "fp32")


class NoMore(Exception):
    """No further round is wanted."""


def ours(setting: str, folder: Path, prompts: int, tokens: int) -> None:
    """Rounds of `llama2rt ppo`."""
    from llama2rt.stages import ppo

    responses = prompts * (GROUP if setting == "grpo" else 1)
    changes = {"algorithm": "grpo", "group_size": GROUP, "average": "token"}
    recipe = ppo.PpoRecipe(
        init=folder / "policy",
        data=[folder / "prompts.jsonl"],
        rewards={"helpfulness": folder / "reward"},
        batch_size=responses,
        mini_batch_size=responses,
        beta=BETA,
        sampling={"max_tokens": tokens},
        train={"lr": LR, "precision": PRECISION},
        **(changes if setting == "grpo" else {}),
    )
    inputs = ppo.open_inputs(recipe)
    actors = ppo.load_actors(recipe, inputs)
    if recipe.has_critic:
        ppo.start_critic(recipe, inputs, actors)
    for number, _ in enumerate(sys.stdin):
        with measured() as result:
            rollout, numbers = ppo.collect(recipe, inputs, actors, number)
            ppo.improve(recipe, actors, rollout, number)
            result["tokens"] = numbers["response_tokens"]


def trl(setting: str, folder: Path, prompts: int, tokens: int) -> None:
    """Rounds of TRL's trainer at work."""
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(NoMore):
        {"grpo": trl_grpo, "ppo": trl_ppo}[setting](directory, folder, prompts, tokens)


def words(folder: Path) -> tuple[Any, list[list[int]]]:
    """(a tokenizer that has a word for each token of ours, "t17" for 17; the prompts' ids)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    given = json.loads((folder / "ids.json").read_text())
    plain = Tokenizer(models.WordLevel({f"t{i}": i for i in range(given["vocabulary"])}, "t0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.decoder = decoders.Fuse()
    names = {"unk_token": "t0", "pad_token": "t0", "eos_token": f"t{given['eos']}"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, padding_side="left", **names)
    return tokenizer, given["prompts"]


COMMON: dict[str, Any] = {
    "bf16": PRECISION == "bf16",
    "use_cpu": True,
    "gradient_checkpointing": False,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "weight_decay": 0.1,
    "temperature": 1.0,
    # Rounds, and nothing beside them.
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def trl_grpo(directory: str, folder: Path, prompts: int, tokens: int) -> None:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    class InTurn(TrainerCallback):
        """A step for a line."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise NoMore
            self.step = measured()
            self.result = self.step.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.result["tokens"] = trainer._metrics["train"]["completions/mean_length"][-1]
            self.step.__exit__(None, None, None)

    tokenizer, ids = words(folder)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        reward_funcs=reward.float(),
        args=GRPOConfig(
            directory,
            per_device_train_batch_size=prompts * GROUP,
            num_generations=GROUP,
            max_completion_length=tokens,
            beta=BETA,
            loss_type="bnpo",
            max_steps=1_000_000,
            logging_strategy="no",
            **COMMON,
        ),
        # The blank keeps the last word of a prompt apart from the first of a response.
        train_dataset=Dataset.from_list(
            [{"prompt": "".join(f"t{i} " for i in prompt)} for prompt in ids]
        ),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[InTurn()],
    )
    trainer.train()


def trl_ppo(directory: str, folder: Path, prompts: int, tokens: int) -> None:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class InTurn(TrainerCallback):
        """The end of an update."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rounds.result["tokens"] = float(tokens)  # it samples on behind the EOS
            rounds.step.__exit__(None, None, None)

    class Rounds:
        """The trainer's batches, one for a line: PPOTrainer begins an update by asking for one."""

        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            for batch in self.batches:
                if not sys.stdin.readline():
                    raise NoMore
                self.step = measured()
                self.result = self.step.__enter__()
                yield batch

    def scalar() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
        return model.float()

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    tokenizer, ids = words(folder)
    rows = Dataset.from_list([{"input_ids": prompt} for prompt in ids])
    trainer = PPOTrainer(
        args=PPOConfig(
            directory,
            per_device_train_batch_size=prompts,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=prompts,
            num_sample_generations=0,
            total_episodes=1_000_000,
            response_length=tokens,
            stop_token="eos",
            kl_coef=BETA,
            logging_steps=1_000_000,
            **COMMON,
        ),
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[InTurn()],
    )
    trainer.dataloader = rounds = Rounds(trainer.dataloader)
    trainer.train()


SIDES = {"trl": trl, "ours": ours}


def main() -> None:
    side, setting, folder, prompts, tokens = sys.argv[1:]
    if side == "ours":
        from llama2rt.train.allocator import keep_freed_memory

        keep_freed_memory()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    # What libraries print is no answer.
    with contextlib.redirect_stdout(sys.stderr):
        SIDES[side](setting, Path(folder), int(prompts), int(tokens))


if __name__ == "__main__":
    main()
