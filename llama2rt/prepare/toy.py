"""The quickstart's world as the plan `v1-v5-toy` reads it.

data/documents.jsonl ...     as the quickstart's (`quickstart.data`)
data/careful.jsonl           demonstrations that a pre-prompt changes
data/adversarial.jsonl       requests for the secret, with their risk categories
data/instructed.jsonl        demonstrations that an instruction changes, of up to twenty turns
data/instructed-few.jsonl    the first of them, to be mixed into every version
data/turns.jsonl, data/turns-held-out.jsonl, data/attributes.toml
                             what Ghost Attention asks, and with which instructions
judge/keys.json              what no model may see
tokenizer/, init/            before any training; twenty turns fit into the context
"""

from dataclasses import dataclass
from pathlib import Path

from llama2rt import atomic
from llama2rt.data import readers
from llama2rt.quickstart import careful_world, data, ghost_world
from llama2rt.quickstart.recipe import QuickstartRecipe
from llama2rt.quickstart.recipe import smoke as quickstart_smoke

CONTEXT = 1024


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is beside what `quickstart` says."""

    quickstart: QuickstartRecipe
    careful: int = 2_000
    careful_safety_share: float = 0.5
    adversarial: int = 400
    instructed: int = 800
    instructed_few: int = 200
    turns: int = 160
    turns_held_out: int = 48


def sizes(seed: int) -> Sizes:
    """Of the plan; its five batches of comparisons ask different prompts of one file."""
    return Sizes(
        QuickstartRecipe(
            seed=seed, batches=1, preference_prompts=5_000, reward_test_prompts=400,
            training_prompts=1_200, validation_prompts=128,
        )
    )  # fmt: skip


def smoke(seed: int) -> Sizes:
    """Next to nothing, to see whether all is in place."""
    recipe = quickstart_smoke(seed).model_copy(update={"batches": 1})
    return Sizes(
        recipe, careful=64, adversarial=12, instructed=24, instructed_few=8, turns=8,
        turns_held_out=4,
    )  # fmt: skip


def write(directory: Path, wanted: Sizes) -> None:
    """All of it, or what is not there yet; one seed, one text."""
    recipe, seed = wanted.quickstart, wanted.quickstart.seed
    files = data.write(recipe, directory)
    data.initialise(recipe, files["documents"], files["dialogues"], directory, CONTEXT)
    folder = directory / "data"
    careful = careful_world.dialogues(wanted.careful, seed, wanted.careful_safety_share)
    readers.write(folder / "careful.jsonl", careful)
    adversarial, _ = careful_world.prompts(
        "adversarial", "train", seed, {"safety": wanted.adversarial}
    )
    readers.write(folder / "adversarial.jsonl", adversarial)
    shown = ghost_world.demonstrations(wanted.instructed, seed)
    readers.write(folder / "instructed.jsonl", shown)
    readers.write(folder / "instructed-few.jsonl", shown[: wanted.instructed_few])
    for name, split, count in (
        ("turns", "train", wanted.turns),
        ("turns-held-out", "evaluation", wanted.turns_held_out),
    ):
        readers.write(folder / f"{name}.jsonl", ghost_world.dialogues(count, split, seed))
    atomic.write(folder / "attributes.toml", ghost_world.ATTRIBUTES)
