"""A run directory, which one process, or one group of ranks, at a time works in.

    recipe.toml      the resolved recipe
    manifest.json    versions, recipe, hashes of every input and model, parent runs
    metrics.jsonl    one line per logged step (also TensorBoard; W&B with WANDB_PROJECT set)
    checkpoints/     step-N, complete or absent
    model/           the final weights, readable by llama2rt.load
    adapter/         of a LoRA run: its adapter alone, readable by peft
    samples/         what the stage generated

Of a group every rank holds a `Run` and calls the same methods: rank 0 locks, hashes and writes, and
what it finds or what goes wrong there is everyone's.

Left out: any knowledge of stages. They open a run, read `complete`, and finish it.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.parallel import by_main, is_main, on_main
from llama2rt.parallel.checkpoint import open_store
from llama2rt.run import lock, manifest
from llama2rt.run.metrics import Metrics

Leave = Callable[[dict[str, Any]], object]


class Run:
    """One stage's directory. Make it with `Run.open`; leave it with `finish`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.store = open_store(directory / "checkpoints")
        self._metrics = Metrics(directory, manifest)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        recipe: BaseModel,
        *,
        inputs: Mapping[str, str | os.PathLike[str]] | None = None,
        parents: Iterable[str | os.PathLike[str]] = (),
        resume: bool = False,
    ) -> Self:
        """Start a run in an empty or new directory, or continue the one that is there.

        `inputs` are files or folders by name, hashed into the manifest; `parents` are run
        directories this one builds on. A directory in use needs `resume`, and then every input must
        be what it was: a run continued on other data is another run. So must the recipe, but for
        changes that lead to the result this recipe would have had from the start (`Recipe.change`,
        and another spelling of the same path): these are said, and recorded. A complete run that is
        to be longer goes on. Raises InputError naming what differs, and while another process is at
        work in the directory.
        """
        directory = Path(directory)
        return cls(directory, _begin_or_continue(directory, recipe, inputs or {}, parents, resume))

    @property
    def complete(self) -> bool:
        """True once `finish` has been called: the stage has nothing left to do."""
        return bool(self.manifest["complete"])

    @property
    def model_directory(self) -> Path:
        return self.directory / "model"

    @property
    def adapter_directory(self) -> Path:
        return self.directory / "adapter"

    @property
    def samples_directory(self) -> Path:
        return self.directory / "samples"

    def log(self, step: int, **metrics: float | int | str) -> None:
        """Add one line to metrics.jsonl and its numbers to TensorBoard (and W&B if asked)."""
        on_main(lambda: self._metrics.log(step, metrics))

    def truncate_metrics(self, step: int) -> None:
        """Drop lines after `step` (and one that a kill cut short), so that no step is twice."""
        on_main(lambda: self._metrics.truncate(step))

    def keep(self, **facts: Any) -> None:
        """Add JSON-able facts about what the run works on to its manifest."""
        self.manifest = on_main(lambda: self._keep(facts))

    def _keep(self, facts: dict[str, Any]) -> dict[str, Any]:
        kept = {**self.manifest, **facts}
        if kept != self.manifest:  # a resumed run finds them there
            manifest.write(self.directory, kept)
        return kept

    def finish(self, leave: Leave | None = None, /, **summary: Any) -> None:
        """Mark the run complete, with what is worth knowing about it at a glance. `leave` is given
        the manifest and writes what a complete run has beside it, before: a run that was killed
        in between is not complete, and does it again."""
        self.manifest = on_main(lambda: self._finish(leave, summary))

    def _finish(self, leave: Leave | None, summary: dict[str, Any]) -> dict[str, Any]:
        self._metrics.close()
        finished = manifest.finished(self.manifest, summary)
        if leave is not None:
            leave(finished)
        manifest.write(self.directory, finished)
        lock.unlock(self.directory)
        return finished


@by_main
def _begin_or_continue(
    directory: Path,
    recipe: BaseModel,
    inputs: Mapping[str, str | os.PathLike[str]],
    parents: Iterable[str | os.PathLike[str]],
    resume: bool,
) -> dict[str, Any]:
    """The manifest of the run that `Run.open` opens, its directory locked."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: expected a directory, found a file")
    resolved = manifest.resolve(recipe)
    hashes = manifest.hash_inputs(inputs)
    if (directory / manifest.FILE).exists():
        if not resume:
            raise InputError(
                f"{directory}: holds a run already; continue it with --resume or choose "
                "another --out"
            )
        found, changes, longer = manifest.resume(directory, recipe, hashes)
        if longer or not found["complete"]:
            lock.lock(directory)
            _sweep(directory)
            if changes:
                found = manifest.changed(found, resolved, changes)
                manifest.write_with_recipe(directory, found)
        return found
    # A process killed while starting leaves at most recipe.toml and a half-written (hidden)
    # file of its own: nothing to protect.
    if {path.name for path in directory.glob("[!.]*")} - {manifest.RECIPE_FILE}:
        raise InputError(f"{directory}: not empty, and no run of llama2rt's; choose another")
    begun = manifest.begin(resolved, hashes, parents)
    directory.mkdir(parents=True, exist_ok=True)
    lock.lock(directory)
    _sweep(directory)
    manifest.write_with_recipe(directory, begun)
    return begun


def _sweep(directory: Path) -> None:
    """Runs inside may be another process's, and see to themselves."""
    atomic.sweep(directory, keep_out=(manifest.FILE, manifest.RECIPE_FILE))


def abandon(directory: Path) -> None:
    """Remove a run directory in which nothing has happened yet, and such directories inside it.

    For a command whose input turned out bad: the same command with better input finds its directory
    free. One that holds anything but a recipe and a manifest stays. Ranks other than 0 leave it
    to rank 0, and do not wait for it: it may have failed elsewhere.
    """
    if not is_main():
        return
    for child in directory.glob("*"):
        if (child / manifest.FILE).is_file():
            abandon(child)
    begun = {manifest.FILE, manifest.RECIPE_FILE, lock.FILE}
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= begun:
        lock.unlock(directory)
        for name in begun:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
