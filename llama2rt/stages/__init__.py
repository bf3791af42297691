"""The papers' training stages, a page each, and the one registry of them.

A stage is a module with a recipe class, `run(recipe, directory, *, resume=False)`, which returns
the folder of what it leaves, and `open_inputs(recipe, future=None)`, which reads and checks all
that the recipe names before anything expensive and says in `.result` what model the run will leave.
It may have `plan(recipe, inputs, shape)`, which says for `--dry-run` what a run will do.
The command line, plans (`llama2rt.pipeline`), reports and the documentation's test read the list
below; nothing is imported before it is asked for.
"""

import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2rt.model import LlamaConfig
    from llama2rt.planning import Work
    from llama2rt.run import Recipe


@dataclass(frozen=True)
class Stage:
    """A stage by the name of its module in this package."""

    name: str
    """with hyphens for the module's underscores"""
    help: str
    """what it does, in one line"""
    verb: bool = True
    """whether the command line offers it; a step of a plan it may always be"""

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"llama2rt.{self.path}")

    @property
    def path(self) -> str:
        """The module's, below the package."""
        return f"stages.{self.name.replace('-', '_')}"

    @property
    def recipe(self) -> "type[Recipe]":
        """The class of its recipe."""
        found: type[Recipe] = typing.get_type_hints(self.run)["recipe"]
        return found

    @property
    def run(self) -> Callable[..., Path]:
        run: Callable[..., Path] = self.module.run
        return run

    @property
    def open_inputs(self) -> Callable[..., Any]:
        open_inputs: Callable[..., Any] = self.module.open_inputs
        return open_inputs

    def plan(
        self, recipe: "Recipe", inputs: Any | None, shape: "Callable[[Path], LlamaConfig]"
    ) -> "Work":
        """What a run of the recipe will do. `inputs`: from `open_inputs`, None where no file is
        read; `shape`: of the model in a folder."""
        from llama2rt.planning import Model, Phase, Work

        if own := getattr(self.module, "plan", None):
            work: Work = own(recipe, inputs, shape)
            return work
        result = getattr(inputs, "result", None)
        if result is None:
            return Work([])
        return Work([Phase("loaded", frozen=[Model("model", result.config, result.scalar)])])


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "train a language model on text"),
        Stage("sft", "fine-tune on dialogues, loss on the answers only"),
        Stage("annotate", "collect comparisons of a policy's answers"),
        Stage("reward", "train a reward model on comparisons"),
        Stage("preference", "train a model that reads two answers and says which is better"),
        Stage("rejection", "sample K answers, fine-tune on the best"),
        Stage("distill", "smaller models learn a larger one's samples or distributions"),
        Stage("ghost-attention", "keep to the first turn's instruction for a whole dialogue"),
        Stage("ppo", "PPO against two reward models"),
        Stage("dpo", "online DPO: best against worst of the model's own answers"),
        Stage("offline", "offline DPO: once through comparisons, without sampling"),
        Stage("context-distillation", "train on safer answers, given with a pre-prompt before"),
        # The verb `evaluate` measures a reward model, or files of samples.
        Stage("evaluate", "all versions' answers to the same held-out prompts", verb=False),
    )
}
