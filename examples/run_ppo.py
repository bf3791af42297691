"""PPO from nothing: a policy, a reward model and 12 iterations, on a task made here.

The policy learns to greet by tossing a coin between two languages, the reward model that French is
preferred, and PPO brings the one in line with the other. With models of your own, only the last
step is needed: `llama2rt ppo RECIPE.toml --out DIR`.
"""

import json
import tempfile
from pathlib import Path

import torch

import llama2rt
from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.stages import ppo, reward, sft

NAMES = ["Ada", "Alan", "Donald", "Edsger", "Grace", "Hedy", "Ida", "John", "Kurt", "Leslie"]
SHAPE = {"dim": 64, "layers": 2, "heads": 4}


def ask(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Greet {name}."}]


def make_data(work: Path) -> None:
    answers = ("bonjour", "hello")
    dialogues = [
        Dialogue([*ask(name), {"role": "assistant", "content": answer}])
        for name in NAMES
        for answer in answers
    ]
    write(work / "dialogues.jsonl", dialogues)
    write(work / "comparisons.jsonl", [Comparison(ask(name), *answers) for name in NAMES])
    write(work / "prompts.jsonl", [Prompt(name, ask(name)) for name in NAMES[:5]])
    write(work / "held_out.jsonl", [Prompt(name, ask(name)) for name in NAMES[5:]])


def main() -> None:
    work = Path(tempfile.mkdtemp())
    make_data(work)
    text = (work / "dialogues.jsonl").read_text()
    tokenizer = llama2rt.Tokenizer.train([text], 320, work / "tokenizer")
    config = llama2rt.LlamaConfig(
        **SHAPE, kv_heads=4, ffn_hidden=160, context=64, vocab_size=tokenizer.vocab_size
    )
    base = llama2rt.Llama(config, dtype=torch.float32).initialize(seed=0)
    native.save(base, tokenizer, work / "base")

    policy = sft.run(
        sft.SftRecipe(
            init=work / "base",
            data=[work / "dialogues.jsonl"],
            held_out=0,
            batch_size=10,
            epochs=80,
            train={"lr": 3e-3},
        ),
        work / "sft",
    )
    helpfulness = reward.run(
        reward.RewardRecipe(
            init=policy,
            data=[work / "comparisons.jsonl"],
            held_out=2,
            batch_size=8,
            epochs=8,
            train={"lr": 2e-3},
        ),
        work / "reward",
    )
    ppo.run(
        ppo.PpoRecipe(
            init=policy,
            rewards={"helpfulness": helpfulness},
            data=[work / "prompts.jsonl"],
            validation=[work / "held_out.jsonl"],
            iterations=12,
            batch_size=32,
            mini_batch_size=16,
            sampling={"max_tokens": 16},
            beta=0.1,
            missing_eos_penalty=1.0,
            critic_lr=2e-3,
            train={"lr": 4e-4, "validate_every": 4},
        ),
        work / "ppo",
    )
    for path in sorted((work / "ppo" / "samples").glob("*.jsonl")):
        answers = [json.loads(line)["response"] for line in path.read_text().splitlines()]
        print(f"iteration {int(path.stem)}: {', '.join(answers)}")
    print(f"{work}/ppo/model")


if __name__ == "__main__":
    main()
