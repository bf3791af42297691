"""`llama2rt quickstart`: the main job from the command line."""

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import tyro

from llama2rt.errors import InputError
from llama2rt.parallel import command, is_main
from llama2rt.quickstart import console, job
from llama2rt.quickstart.recipe import QuickstartRecipe, smoke


def quickstart(
    *,
    out: Path = Path("runs/quickstart"),
    seed: int = 0,
    resume: bool = False,
    smoke_test: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Pretrain, fine-tune and align a small chat model from nothing, and report on it: in minutes.

    Args:
        out: Run directory.
        seed: Of the data, the weights and every sample.
        resume: Go on with the job in out, or show its result if it is done.
        smoke_test: The same phases on next to nothing, to see whether all is in place.
        as_json: Print the numbers of report.json as one JSON object.
    """
    if seed < 0:
        raise InputError(f"seed: expected at least 0, got {seed}")
    recipe = smoke(seed) if smoke_test else QuickstartRecipe(seed=seed)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with command.joined() if several else contextlib.nullcontext():
        numbers = job.run(recipe, out, resume=resume or command.restarted())
        if is_main():
            console.summary(out, numbers)
    if as_json:
        print(json.dumps(numbers))
    if several:
        command.finish()
