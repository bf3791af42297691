"""What PPO's critic should start from, measured on the quickstart's models with PPO's defaults.

Each way of starting is tried on each quickstart folder: `llama2rt ppo`'s recipe as it stands, from
the SFT model or from RLHF-V2 (--init), with the SFT model as reference. Told are the critic's
explained variance, the length of responses, rewards and KL of every iteration. Ways:

- reward-head: the reward model as it is, at the policy's learning rate, which PPO did before
- zero-head: its layers under a head of zeros
- scaled-head: its head times the factor that explains the returns of a first rollout best
- fitted: its layers under the head that does (`llama2rt.stages.critic`), which PPO does now

    python -P benchmarks/rlhf/ppo_critic.py runs/seed-0 runs/seed-1 --out ppo-critic.json
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llama2rt.algorithms import advantages
from llama2rt.stages import ppo
from llama2rt.stages.inputs import RolloutInputs

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

TOLD = ("value_explained_variance", "response_tokens", "reward", "score", "kl_k1")


@torch.no_grad()
def set_head(actors: ppo.Actors, weight: torch.Tensor) -> None:
    actors.critic.head.weight.copy_(weight)
    actors.critic_optimizer.master["head.weight"].copy_(weight)


def reward_head(recipe: ppo.PpoRecipe, inputs: RolloutInputs, actors: ppo.Actors) -> float:
    return 0.0


def zero_head(recipe: ppo.PpoRecipe, inputs: RolloutInputs, actors: ppo.Actors) -> float:
    set_head(actors, torch.zeros_like(actors.critic.head.weight))
    return 0.0


def scaled_head(recipe: ppo.PpoRecipe, inputs: RolloutInputs, actors: ppo.Actors) -> float:
    rollout, _ = ppo.collect(recipe, inputs, actors, "warm-up")
    zeros = torch.zeros_like(rollout.rewards)
    returns, _ = advantages.gae(rollout.rewards, zeros, rollout.cu_responses, recipe.gamma, 1.0)
    values = rollout.values
    set_head(actors, actors.critic.head.weight * (values @ returns) / (values @ values))
    return 0.0


WAYS = {
    "reward-head": reward_head,
    "zero-head": zero_head,
    "scaled-head": scaled_head,
    "fitted": ppo.start_critic,
}


def newest_rewards(folder: Path) -> dict[str, Path]:
    """The reward models of a quickstart's last batch of comparisons."""
    batches = len(list(folder.glob("reward-safety-*")))
    return {
        kind: folder / f"reward-{kind}-{batches}" / "model" for kind in ("helpfulness", "safety")
    }


def course(folder: Path, init: str, way: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """The told metrics of each iteration."""
    ppo.start_critic = WAYS[way]
    if way == "reward-head":
        settings = {"critic_lr": None} | settings
    with tempfile.TemporaryDirectory() as scratch:
        recipe = ppo.PpoRecipe(
            init=folder / init / "model",
            reference=folder / "sft" / "model",
            rewards=newest_rewards(folder),
            data=[folder / "data" / "training.jsonl"],
            **settings,
        )
        ppo.run(recipe, Path(scratch) / "run")
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    iterations = [line for line in map(json.loads, lines) if "policy_loss" in line]
    return {name: [line[name] for line in iterations] for name in TOLD}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--init", nargs="+", choices=("sft", "rlhf-v2"), default=["rlhf-v2"])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--settings", type=json.loads, default={}, help="other recipe keys, JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = {"iterations": given.iterations, "train": {"checkpoint_every": 0}}
    settings |= given.settings
    rows = []
    for folder, init in itertools.product(given.folders, given.init):
        for way in given.ways:
            told = course(folder, init, way, settings)
            rows.append({"folder": folder.name, "init": init, "critic": way, **told})
            variance, length = told["value_explained_variance"], told["response_tokens"]
            print(
                f"{folder.name:8} {init:8} {way:12} explained variance "
                + " ".join(f"{v:6.2f}" for v in variance)
                + f"   length {length[0]:.1f} -> {length[-1]:.1f} "
                f"({min(length):.1f} to {max(length):.1f})",
                flush=True,
            )
    if given.out:
        record = records.header("cpu") | {"what": __doc__.splitlines()[0], "settings": settings}
        given.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
