"""The command line: `llama2rt VERB RECIPE.toml [--key value] --out DIR [--resume] [--json]`.

A stage's verb reads a recipe (a path, or the name of one that is shipped), takes any of its keys as
an option, and runs the stage. The other verbs are functions whose arguments become options. Verbs
import their code when they are called, so that `--help` answers at once; one whose module is not
there is not offered. Exit status: 0 done, 2 bad input, 75 saved and stopped because a scheduler
asked for it (SIGTERM, SIGUSR1), 1 anything else (Ctrl-C included).

Stages and `iterate` run under torchrun: every rank reads the command, then they meet. What they say
alike is said once, by rank 0; what one of them says alone begins with its rank.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import textwrap
import time
import tomllib
import traceback
import typing
import warnings
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import llama2rt
from llama2rt.errors import InputError
from llama2rt.stages import STAGES

if TYPE_CHECKING:
    from llama2rt.run import Recipe

_PACKAGE = Path(llama2rt.__file__).parent

# Verbs that read a recipe and leave a run directory, as a stage's does, but are none: a module with
# `run`, and what it does.
PLANS = {
    "corpus": ("corpus.job", "raw text cleaned, deduplicated, cut into shards of tokens"),
    "iterate": ("pipeline.iterate", "RLHF-V1 to Vn as one resumable command"),
    "study": ("pipeline.study", "reward models or policies trained and compared in tables"),
    "safety-study": ("pipeline.safety_study", "chat models by their share of safety data"),
}
# Subcommands of `cluster`: (module, function, what it does).
CLUSTER = {
    "bench": ("cluster.bench", "bench", "measure collectives under torchrun; compare two runs"),
    "carbon": ("cluster.commands", "carbon", "carbon of training, the paper's table to the digit"),
    "collective": ("cluster.commands", "collective", "time of a collective by NCCL's cost model"),
    "compare": (
        "cluster.training_commands",
        "compare",
        "two clusters on the same work, and why they differ",
    ),
    "ecmp": ("cluster.commands", "ecmp", "what colliding flows leave of a RoCE fabric"),
    "emulate": ("cluster.emulate", "emulate", "gloo between namespaces over links of a set rate"),
    "power": ("cluster.commands", "power", "throughput and energy under a power cap"),
    "power-sweep": ("cluster.power_sweep", "power_sweep", "throughput and energy under power caps"),
    "search": ("cluster.training_commands", "search", "the fastest layouts of a model that fit"),
    "validate": ("cluster.training_commands", "validate", "predicted against published runs"),
}
# Verb -> (module in llama2rt, function, what it does). A stage's verb is in `stages.STAGES`.
COMMANDS = {
    "quickstart": ("quickstart.command", "quickstart", "the whole pipeline on a toy, reported"),
    "prepare": ("prepare.command", "prepare", "data that the plans v1-v5-toy, v1-v5-gsm8k read"),
    "generate": ("generate.commands", "generate", "sample answers to prompts"),
    "chat": ("generate.commands", "chat", "talk to a model"),
    "serve": ("serve.commands", "serve", "a model behind OpenAI's API, and a page to talk to it"),
    "evaluate": ("evaluate.commands", "command", "reward models, win rates, lm-eval's tasks"),
    "safety": ("pipeline.safety", "command", "violations and false refusals of files of samples"),
    "recall": ("evaluate.recall_command", "command", "who keeps to an instruction over turns"),
    "judge": ("evaluate.judges.commands", "command", "which version answers better, by any judges"),
    "benchmark": ("evaluate.chat_benchmarks.commands", "command", "AlpacaEval, MT-Bench and so on"),
    "compare": ("pipeline.comparison", "command", "one page about versions, judged and measured"),
    "rewardbench": ("evaluate.rewardbench.commands", "command", "who ranks pairs best, in a table"),
    "contamination": ("evaluate.contamination.commands", "command", "test data in training data"),
    "people": ("people.commands", "command", "a page on which people compare two responses"),
    "check": ("data.commands", "check", "validate a file of records and describe it"),
    "tokenizer": ("data.commands", "tokenizer", "train a tokenizer in LLaMA's settings"),
    "convert": ("checkpoint.commands", "convert", "a model folder into another format"),
    "cluster": ("cluster.commands", "", "measure collectives and links, predict clusters"),
    "doctor": ("doctor", "doctor", "what is built, what is missing and how to get it"),
}
# They need tensors now and then, and load torch no sooner.
WITHOUT_TENSORS = ("cluster", "people")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `llama2rt` command; leaves through SystemExit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if _rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end: stdout is rank 0's
    verbs = available()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(verbs))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"llama2rt {llama2rt.__version__}")
        sys.exit(0)
    verb, rest = arguments[0], arguments[1:]
    if verb not in verbs:
        _fail(f"unknown verb {verb!r}: expected one of {', '.join(verbs)}", status=2)
    # An address of pydantic's below each wrong value helps nobody who runs a command.
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    _listen()

    if verb not in WITHOUT_TENSORS:
        from llama2rt.train.allocator import keep_freed_memory

        keep_freed_memory()
    try:
        if verb in with_recipe():
            _run_stage(verb, rest)
        elif verb == "cluster":
            _run_cluster(rest)
        elif _ranks() > 1 and verb != "quickstart":
            raise InputError(
                f"works in one process, and WORLD_SIZE is {_ranks()}: start it without torchrun"
            )
        else:
            _run_command(verb, rest)
    except SystemExit as end:  # help, or bad options, which all ranks have read
        if _rank() and end.code:
            time.sleep(10)  # until rank 0 has said so: torchrun ends all when the first one ends
        raise
    except BrokenPipeError:
        sys.exit(1)  # the reader of our output has left
    except BaseException as error:
        _end(error, verb)


def _end(error: BaseException, verb: str) -> typing.NoReturn:
    """Leave with what is to be said of `error`; a defect of the program keeps its traceback."""
    known = _explained(error)
    if _ranks() > 1 and verb != "cluster":  # which knows of ranks by itself
        from llama2rt.parallel import command

        command.leave(error, *(known or (traceback.format_exc().rstrip(), 1)), verb)
    if known is None:
        raise error
    message, status = known
    _fail(f"{verb}: {message}", status)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    """How many processes torchrun has started of this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _listen() -> None:
    """Where what is logged and warned of is said: on stderr. Other ranks than 0 say only what other
    libraries warn of there: what this one warns of, all have read, or rank 0 says for all."""
    who = f"rank {_rank()}: " if _rank() else ""
    level = logging.WARNING if _rank() else logging.INFO
    logging.basicConfig(level=level, format=f"{who}%(message)s", stream=sys.stderr)
    if _rank():
        logging.getLogger("llama2rt").setLevel(logging.ERROR)
    # A hint for those who write collectives, once a rank where weights are put together for a file.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: print(
        f"{who}warning: {message}", file=sys.stderr
    )


def _explained(error: BaseException) -> tuple[str, int] | None:
    """(what to say instead of a traceback, exit status); None for a defect of the program."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", getattr(error, "status", 1)
    if isinstance(error, FloatingPointError | OSError | _checkpoint_error()):
        return str(error), 1
    return None


def with_recipe() -> dict[str, tuple[str, str]]:
    """Verbs that read a recipe: (module in llama2rt, what it does)."""
    stages = {name: (stage.path, stage.help) for name, stage in STAGES.items() if stage.verb}
    return stages | PLANS


def available() -> dict[str, str]:
    """Verbs of this installation and what they do."""
    verbs = {**with_recipe(), **COMMANDS}
    return {
        name: what
        for name, (module, *_, what) in verbs.items()
        if (_PACKAGE / f"{module.replace('.', '/')}.py").is_file()
    }


def usage(verbs: dict[str, str]) -> str:
    """The text of `llama2rt --help`."""

    def rows(names: Sequence[str]) -> str:
        width = max(12, *(len(name) + 2 for name in names))
        return "\n".join(f"  {name:<{width}}{verbs[name]}" for name in names if name in verbs)

    recipes = ", ".join(sorted(path.stem for path in (_PACKAGE / "recipes").glob("*.toml")))
    shipped = f"RECIPE is a TOML file or one of those shipped: {recipes}."
    shipped = textwrap.fill(shipped, 88, break_on_hyphens=False)
    return f"""\
usage: llama2rt VERB ...

Training stages: llama2rt VERB RECIPE [--key value ...] --out DIR [--resume] [--json]
{rows(list(with_recipe()))}

Everything else
{rows(list(COMMANDS))}

{shipped}
Keys of a recipe are options: --train.lr 1e-3 --data a.txt b.txt. Paths in a recipe are relative
to the working directory. DIR receives recipe.toml, manifest.json, metrics.jsonl, TensorBoard
files, checkpoints/ and model/. After Ctrl-C or a kill, the same command with --resume goes on.

  llama2rt VERB --help    all options of a verb
  llama2rt --version

Exit status: 0 done, 2 bad input, 75 stopped by SIGTERM and saved, 1 anything else."""


def _run_stage(verb: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"llama2rt.{with_recipe()[verb][0]}")
    recipe_class = typing.get_type_hints(module.run)["recipe"]
    given = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if given is None and not {"-h", "--help"} & set(arguments):
        raise InputError(f"the recipe comes first: llama2rt {verb} RECIPE [--key value] --out DIR")
    values = read_recipe(find_recipe(given)) if given is not None else {}
    # All ranks read the same, and rank 0 says what is wrong with it.
    with contextlib.redirect_stderr(sys.stdout) if _rank() else contextlib.nullcontext():
        options = _stage_options(verb, recipe_class, given, values, arguments)
    if options.planned.dry_run:
        lines, values = options.planned.say(verb, options.recipe, options.out)
        if not _rank():
            print(json.dumps(values) if options.json else "\n".join(lines))
        return
    from llama2rt.parallel import command

    if _ranks() == 1:
        folder = _carry_out(module, options, options.resume)
    else:
        with command.joined():
            folder = _carry_out(module, options, options.resume or command.restarted())
    if options.json:
        manifest = json.loads((options.out / "manifest.json").read_text())
        result = {"out": str(options.out), "model": str(folder), "summary": manifest["summary"]}
        print(json.dumps(result))
    elif not _rank():
        print(f"{verb}: done, {folder}", file=sys.stderr)
    if _ranks() > 1:
        command.finish()


def _carry_out(module: Any, options: Any, resume: bool) -> Path:
    """What the stage's `run` leaves; a new directory in which nothing has happened goes where its
    input was bad."""
    fresh = not options.out.exists()
    try:
        folder: Path = module.run(options.recipe, options.out, resume=resume)
    except InputError:
        if fresh:
            from llama2rt.run import abandon

            abandon(options.out)
        raise
    return folder


def find_recipe(name: str) -> Path:
    """The file `name`, or the shipped recipe of that name; InputError if there is neither."""
    shipped = _PACKAGE / "recipes" / f"{name}.toml"
    if Path(name).is_file():
        return Path(name)
    if "/" not in name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(path.stem for path in shipped.parent.glob("*.toml")))
    raise InputError(f"{name}: no such recipe file, and not one of those shipped ({names})")


def read_recipe(path: Path) -> dict[str, Any]:
    """The TOML table in `path`; InputError with the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: {error}") from None


def _stage_options(
    verb: str,
    recipe_class: "type[Recipe]",
    given: str | None,
    values: dict[str, Any],
    arguments: list[str],
) -> Any:
    """`recipe`, `out`, `resume`, `json` and those of a dry run as the file and the options say."""
    import tyro
    from pydantic import ValidationError

    from llama2rt.pipeline.dry_run import DryRun
    from llama2rt.run.unfinished import first_problem, registry, unfinished

    dry = "--dry-run" in arguments
    source = given if given is not None else verb
    recipe = unfinished(recipe_class, values, source, arguments)
    command = make_dataclass(
        "Options",
        [
            (
                "out",
                Annotated[Path, tyro.conf.arg(help="run directory", metavar="DIR")],
                Path("OUT") if dry else tyro.MISSING,  # which a dry run does not touch
            ),
            (
                "resume",
                Annotated[
                    bool, tyro.conf.arg(help="go on with the run in DIR, or leave it if done")
                ],
                False,
            ),
            (
                "json",
                Annotated[bool, tyro.conf.arg(help="print one JSON object when done")],
                False,
            ),
            ("planned", Annotated[DryRun, tyro.conf.arg(name="")], DryRun()),
            ("recipe", Annotated[recipe_class, tyro.conf.arg(name="")], recipe),
        ],
    )
    try:
        return tyro.cli(
            command,
            prog=f"llama2rt {verb} {given or 'RECIPE'}",
            description=(recipe_class.__doc__ or "").strip(),
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=registry(),
        )
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error.errors(), recipe_class)}") from None


def _run_command(verb: str, arguments: list[str]) -> None:
    import tyro

    module, name, _ = COMMANDS[verb]
    known = None  # how options are read that are more than texts, numbers and paths
    if verb not in WITHOUT_TENSORS:
        from llama2rt.run.unfinished import registry

        known = registry()
    tyro.cli(
        getattr(importlib.import_module(f"llama2rt.{module}"), name),
        prog=f"llama2rt {verb}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=known,
    )


def _run_cluster(arguments: list[str]) -> None:
    import tyro

    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: llama2rt cluster SUBCOMMAND ...\n")
        print("\n".join(f"  {name:<12}{what}" for name, (*_, what) in CLUSTER.items()))
        print("\n  llama2rt cluster SUBCOMMAND --help    all its options")
        sys.exit(0 if arguments else 2)
    if verb not in CLUSTER:
        raise InputError(f"unknown subcommand {verb!r}: expected one of {', '.join(CLUSTER)}")
    module, name, _ = CLUSTER[verb]
    tyro.cli(
        getattr(importlib.import_module(f"llama2rt.{module}"), name),
        prog=f"llama2rt cluster {verb}",
        args=arguments[1:],
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _checkpoint_error() -> type[Exception]:
    from llama2rt.checkpoint.store import CheckpointError

    return CheckpointError


def _fail(message: str, status: int) -> typing.NoReturn:
    print(f"llama2rt {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
