"""Fine-tune on a JSONL file of dialogues, then ask the result a question.

python examples/fine_tune.py                              a small file and model, made here
python examples/fine_tune.py MODEL_FOLDER dialogues.jsonl OUT
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import llama2rt
from llama2rt.checkpoint import native
from llama2rt.generate import Engine
from llama2rt.stages.sft import SftRecipe, run

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}


def make_data(path: Path) -> None:
    """One JSON object a line: {"messages": [{"role", "content"}, ...]}."""
    with open(path, "w") as file:
        for country, capital in CAPITALS.items():
            question = f"What is the capital of {country}?"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"It is {capital}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_model(folder: Path, data: Path) -> None:
    """A random model and a tokenizer; start from a pretrained one whenever there is one."""
    tokenizer = llama2rt.Tokenizer.train([data.read_text()], 320, folder)
    config = llama2rt.LlamaConfig(
        dim=64, layers=2, heads=4, kv_heads=4, ffn_hidden=160, context=128, vocab_size=320
    )
    model = llama2rt.Llama(config, dtype=torch.float32).initialize(seed=0)
    native.save(model, tokenizer, folder.with_name("model"))


def main() -> None:
    if len(sys.argv) == 4:
        start, data, out = map(Path, sys.argv[1:])
        recipe = SftRecipe(init=start, data=[data])
    else:
        work = Path(tempfile.mkdtemp())
        start, data, out = work / "model", work / "dialogues.jsonl", work / "sft"
        make_data(data)
        make_model(work / "tokenizer", data)
        recipe = SftRecipe(
            init=start, data=[data], held_out=0, batch_size=4, epochs=60, train={"lr": 3e-3}
        )
    folder = run(recipe, out)

    model, tokenizer = llama2rt.load(folder)
    question = [{"role": "user", "content": "What is the capital of Kenya?"}]
    [answer] = Engine(model, tokenizer).generate([question], temperature=0, max_tokens=32)
    print(f"{folder}: {answer.text}")


if __name__ == "__main__":
    main()
