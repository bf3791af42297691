"""A plan carried out: order, checks, resumption, and how long each step took."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from llama2rt import atomic
from llama2rt.errors import naming
from llama2rt.parallel import is_main, on_main, world
from llama2rt.pipeline.plan import Resolved, Step, check, resolve

_console = Console(stderr=True, highlight=False)


def prepare(
    steps: Sequence[Step],
    directory: Path,
    check: Callable[[Sequence[Resolved]], None] = check,
) -> list[Resolved]:
    """The plan of `steps` below `directory`, with all recipes and inputs checked; those of steps
    that are complete are not read again. InputError naming the step, also where the processes
    there are cannot share it as it says. Every rank calls this, and rank 0 reads. `check`: reads
    and checks what the steps name, and may look at more of it than `plan.check` does."""
    plan = resolve(steps, directory)
    for step in plan:
        # Not by `check`, where rank 0 takes itself to be alone.
        parallel, train = (getattr(step.recipe, key, None) for key in ("parallel", "train"))
        if parallel is not None and train is not None:
            with naming(f"steps: {step.name}"):
                parallel.degrees(world().size)
                train.check(world().size, world().device.type)
    on_main(lambda: check(plan))
    return plan


def run(plan: Sequence[Resolved], clock: "Clock") -> None:
    """Carry out a plan that `prepare` has checked, or what is left of it; every rank walks all of
    it. InputError naming the step."""
    for step in plan:
        with clock.phase(step.name, step.purpose), naming(f"steps: {step.name}"):
            step.stage.run(step.recipe, step.directory, resume=True)


class Clock:
    """Seconds and peak memory by phase, kept in a file so that a resumed job adds up. Of several
    ranks, rank 0 writes it and announces; what it counts is its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.peak: int = kept.get("peak_memory_bytes", 0)
        self._running: tuple[str, float] | None = None

    @contextmanager
    def phase(self, name: str, purpose: str) -> Iterator[None]:
        """Announce a phase and add the time it takes, also where it is interrupted."""
        if is_main():
            _console.print(f"[bold cyan]{name:<22}[/]{purpose}")
        begin = time.monotonic()
        self._running = name, begin
        try:
            yield
        finally:
            self._running = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin
            self.peak = self.peak_memory_bytes()
            kept = {"seconds": self.seconds, "peak_memory_bytes": self.peak}
            # Not by on_main: where a phase has failed on this rank alone, no other comes here.
            if is_main():
                atomic.write(self.path, json.dumps(kept, indent=2))
        if is_main():
            _console.print(f"[dim]{'':<22}{self.seconds[name]:.0f} s[/]")

    def total(self) -> float:
        """Seconds of all phases so far, the running one included."""
        running = time.monotonic() - self._running[1] if self._running else 0.0
        return sum(self.seconds.values()) + running

    def peak_memory_bytes(self) -> int:
        """Largest resident size of this process, or of one that it resumes."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self.peak, now if sys.platform == "darwin" else now * 1024)
