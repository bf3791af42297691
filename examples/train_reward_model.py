"""Train a reward model on comparisons and score answers with it.

    python examples/train_reward_model.py                     comparisons made here, a small model
    python examples/train_reward_model.py MODEL_FOLDER comparisons.jsonl OUT

A line of comparisons.jsonl: {"prompt": [messages], "chosen": text, "rejected": text, "rating":
"better"}; `llama2rt check FILE --as comparison` says whether a file is good.
"""

import json
import sys
import tempfile
from pathlib import Path

import llama2rt
from llama2rt.data.readers import read, write
from llama2rt.data.records import Comparison
from llama2rt.rollout.scoring import score
from llama2rt.stages.reward import RewardRecipe, run

TOWNS = ["Bergen", "Cairo", "Delft", "Fez", "Genoa", "Hanoi", "Izmir", "Kyoto", "Lagos", "Oslo"]


def ask(town: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"How do I get to {town}?"}]


def make_data(path: Path) -> None:
    """A helpful answer is preferred, to a curt one slightly, to a rude one significantly."""
    write(
        path,
        [
            Comparison(ask(town), f"Gladly: take the train to {town}.", worse, rating)
            for town in TOWNS
            for worse, rating in (
                ("Take the train.", "slightly_better"),
                ("Why would you?", "significantly_better"),
            )
        ],
    )


def main() -> None:
    if len(sys.argv) == 4:
        start, data, out = map(Path, sys.argv[1:])
        held_out = len(read(data, "comparison")) // 10
        recipe = RewardRecipe(init=start, data=[data], held_out=held_out)
    else:
        work = Path(tempfile.mkdtemp())
        data, out = work / "comparisons.jsonl", work / "reward"
        make_data(data)
        llama2rt.Tokenizer.train([data.read_text()], 320, work / "tokenizer")
        recipe = RewardRecipe(
            data=[data],
            tokenizer=work / "tokenizer",
            model={"dim": 64, "layers": 2, "heads": 4},
            context=128,
            held_out=6,
            batch_size=8,
            epochs=20,
            train={"lr": 2e-3},
        )
    folder = run(recipe, out)
    print(json.dumps(json.loads((out / "report.json").read_text())["accuracy"], indent=2))

    model, tokenizer = llama2rt.load(folder)
    answers = ["Gladly: take the train to Turin.", "Take the train.", "Why would you?"]
    scores = score(model, tokenizer, [(ask("Turin"), answer) for answer in answers])
    for answer, value in zip(answers, scores, strict=True):
        print(f"{value:6.2f}  {answer}")


if __name__ == "__main__":
    main()
