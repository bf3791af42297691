"""Ghost Attention (section 3.3, appendix A.3.5): instructions that hold for a whole dialogue.

Phases, each resumable: the newest policy answers dialogues whose every user message repeats an
instruction; the instruction is then kept in the first turn alone, as the model will meet it, and
the model is fine-tuned on the last answer of each dialogue: the loss on all earlier answers is
zero, because they come of prompts that the model no longer sees. Then the multi-turn test: how many
answers of held-out dialogues still follow, of the policy and of what was trained. Left out: lists
of hobbies and figures that the model itself writes (the paper's), which are a file here.
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from llama2rt import atomic, planning, report
from llama2rt.data import instructions, readers
from llama2rt.data.instructions import Instruction
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.packing import Example, micro_batches
from llama2rt.data.readers import read
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import attention, recall
from llama2rt.evaluate.recall import RecallOptions
from llama2rt.generate import Engine
from llama2rt.generate.budget import least_bytes
from llama2rt.generate.remote import Remote
from llama2rt.model import Llama, LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, on_main, tensor_group
from llama2rt.planning import Count, Phase, Work
from llama2rt.rollout.sampling import SamplingOptions, derived_seed
from llama2rt.rollout.turns import Place, Turns
from llama2rt.run import Recipe, Run
from llama2rt.stages import adapters, instructed, loading, plans, sft, spread
from llama2rt.stages.instructed import Asked, Instructed
from llama2rt.stages.loading import Future, Opened, Outline, file_inputs, outlines
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.ghost_attention")

WITHOUT = "recall-without.json"
DIALOGUES = "dialogues.jsonl"


class GhostAttentionRecipe(Recipe):
    """Fine-tune a model to keep to the first turn's instruction."""

    policy: Path
    """the newest model: it answers the dialogues"""
    init: Path
    """the model that is fine-tuned (section 3.3: applied after RLHF-V3)"""
    data: list[Path]
    """dialogues whose user messages are asked"""
    validation: list[Path] = Field(default=[])
    """held-out dialogues; without them, held_out of the data"""
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """fraction of data, drawn from the seed, kept for the held-out loss and the test of recall"""
    limit: int | None = Field(default=None, gt=0)
    """use only this many dialogues, drawn from the seed"""
    dialogues: list[Path] = Field(default=[])
    """dialogues to train on besides, such as the SFT set, all of their answers"""
    attributes: Path | None = None
    """TOML file of what instructions are made of; None for a few hobbies, languages and figures"""
    terse: float = Field(default=0.5, ge=0, le=1)
    """share of instructions that are kept tersely (appendix A.3.5: half)"""
    place: Place = "system"
    """where the first turn keeps the instruction"""
    history: Literal["sampled", "given"] = "sampled"
    """what stands before the last answer: the policy's answers, or the data's own, which do not
    follow the instruction (the paper can be read either way)"""
    least_turns: int = Field(default=2, gt=0)
    """each dialogue is asked as far as a turn drawn between this one and its last"""
    followed_only: bool = False
    """whether dialogues are left out whose last answer does not follow, by its checks"""
    tokenizer: Path | None = None
    """None for the one of policy"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    temperature: float = Field(default=1.0, gt=0)
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take; a dialogue with a cut answer is left out"""
    context: int | None = Field(default=None, gt=1)
    """longest dialogue in tokens; None for the model's own"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues in an optimizer step (section 3.1)"""
    epochs: int = Field(default=2, gt=0)
    """section 3.1"""
    seed: int = Field(default=0, ge=0)
    # As in SFT, section 3.1: cosine, lr 2e-5, weight decay 0.1.
    train: TrainOptions = TrainOptions(lr=2e-5)
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()
    recall: RecallOptions = RecallOptions()
    """the multi-turn test on held-out dialogues"""

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _testable(self) -> Self:
        if self.recall.limit and not (self.validation or self.held_out):
            raise ValueError("recall: no dialogues are held out to test it on; recall.limit = 0")
        return self


@dataclass(frozen=True)
class GhostAttentionInputs(Opened):
    """What a run reads besides weights, and what model it will leave."""

    tokenizer: Tokenizer
    training: list[Asked]
    held_out: list[Asked]
    tested: list[tuple[Turns, Instruction]]
    """the held-out dialogues of the multi-turn test"""
    besides: list[Example]
    """other dialogues to train on"""
    context: int
    result: Outline

    @property
    def files(self) -> tuple[str, ...]:
        return (DIALOGUES,)


def run(recipe: GhostAttentionRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Sample, fine-tune, test; returns the model folder."""
    run = Run.open(directory, recipe, inputs=file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)

    # The newest policy answers, and is tested as the baseline.
    sampler = recipe.sampling.engine(policy(recipe, mesh), inputs.tokenizer)
    training = instructed.sample(
        recipe, sampler, run.samples_directory / "training", inputs.training
    )
    held_out = instructed.sample(
        recipe, sampler, run.samples_directory / "held-out", inputs.held_out
    )
    before = recalled(recipe, inputs, sampler, run.samples_directory / WITHOUT)
    maps = {"without": attention_of(sampler.model, inputs, held_out)}
    del sampler

    # Fine-tune on the last answer of each dialogue.
    dialogues = instructed.kept(training, "training")
    on_main(functools.partial(readers.write, run.directory / DIALOGUES, dialogues))
    model, result = fine_tune(recipe, inputs, run, mesh, dialogues, held_out)
    adapters.save(model, inputs.tokenizer, run, recipe.init)

    # The same test of what was trained.
    model.eval()  # an adapter may have dropout
    with tensor_group.gathered(model, mesh, recipe.train.dtype) as whole:
        sampler = recipe.sampling.engine(whole, inputs.tokenizer)
        after = recalled(recipe, inputs, sampler, run.samples_directory / "recall-with.json")
        maps["with"] = attention_of(whole, inputs, held_out)
    numbers = {**result, **instructed.account(training)}
    if before is not None:
        numbers["recall"] = {"without": before, "with": after}
    if maps["with"] is not None:
        numbers["attention"] = maps
    report.finish(run, numbers)
    return run.model_directory


def fine_tune(
    recipe: GhostAttentionRecipe,
    inputs: GhostAttentionInputs,
    run: Run,
    mesh: Mesh,
    dialogues: list[Dialogue],
    held_out: list[Instructed],
) -> tuple[Llama, dict[str, Any]]:
    """(the trained model, what `fit` says of it), as in SFT."""
    options = recipe.train
    examples = sft.encode(dialogues, inputs.tokenizer, inputs.context) + inputs.besides
    loader = ExampleLoader(
        examples, recipe.batch_size, options.micro_tokens, recipe.seed, share=mesh.share
    )
    some = any(item.dialogue is not None for item in held_out)
    if held_out and not some:
        logger.warning("no held-out dialogue is left to measure the loss on: all were cut")
    apart = instructed.kept(held_out, "held-out") if some else []
    batches = micro_batches(
        sft.encode(apart, inputs.tokenizer, inputs.context), options.micro_tokens
    )
    build = functools.partial(loading.chat_model, recipe)
    model = spread.from_folder(build, recipe.init, mesh, options)
    steps = recipe.epochs * loader.steps_per_epoch
    result = sft.fit_measured(run, model, loader, batches, options, steps, mesh)
    return model, {**result, "dialogues": len(examples)}


def policy(recipe: GhostAttentionRecipe, mesh: Mesh) -> Llama:
    """The model that samples, in the compute dtype, frozen."""

    def build(device: torch.device | str) -> Llama:
        return loading.load_llama(recipe.policy, recipe.tokenizer, recipe.train.dtype, device)[0]

    return spread.to_sample(build, recipe.policy, mesh).requires_grad_(False)


def recalled(
    recipe: GhostAttentionRecipe,
    inputs: GhostAttentionInputs,
    engine: Engine | Remote,
    path: Path,
) -> dict[str, Any] | None:
    """`recall.measure` of the engine's model, kept in the file `path`; None without a test."""
    if not inputs.tested:
        return None
    # A run that is made longer has trained another model since.
    if path.name != WITHOUT or not on_main(path.exists):
        dialogues, told = zip(*inputs.tested, strict=True)
        found = recall.measure(
            engine,
            dialogues,
            told,
            recipe.recall,
            place=recipe.place,
            max_tokens=recipe.sampling.max_tokens,
            seed=derived_seed(recipe.seed, "recall"),
        )
        on_main(functools.partial(atomic.write, path, json.dumps(found)))
    read: dict[str, Any] = json.loads(on_main(functools.partial(path.read_text, encoding="utf-8")))
    return read


def attention_of(
    model: Llama, inputs: GhostAttentionInputs, held_out: Sequence[Instructed]
) -> dict[str, Any] | None:
    """Figure 9's numbers of the held-out dialogue with the most turns; None without one."""
    items = [item for item in held_out if item.dialogue is not None]
    if not items:
        return None
    longest = max(items, key=lambda item: len(item.plain))
    assert longest.dialogue is not None
    return attention.of_dialogue(model, inputs.tokenizer, longest.dialogue.messages, longest.plain)


def open_inputs(recipe: GhostAttentionRecipe, future: Future | None = None) -> GhostAttentionInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError where
    something does not fit."""
    recipe.lora.check()
    recipe.sampling.check_server(
        "the model that is trained answers in the test of recall" if recipe.recall.limit else None,
        adapter=recipe.lora.rank is not None,
    )
    folders = {"policy": recipe.policy, "init": recipe.init}
    tokenizer, models = outlines(recipe.tokenizer, folders, future)
    config = models["init"].config
    spread.check(recipe.parallel, config, recipe.train, recipe.lora)
    with naming("policy"):
        spread.check(recipe.parallel, models["policy"].config, recipe.train)
    context = recipe.context or config.context
    if context > config.context:
        raise InputError(f"context: {context} exceeds the model's {config.context}")
    parts = sft.divide(recipe, read(recipe.data, "dialogue", recipe.skip_invalid))
    if recipe.validation and future is None:  # else the step's own run says it
        loading.warn_of_shared(*((d.messages[:-1] for d in part) for part in parts))
    training, held_out = (
        instructed.asked(recipe, part, name)
        for part, name in zip(parts, ("training", "held-out"), strict=True)
    )
    if not training:
        raise InputError(f"data: no dialogue has least_turns = {recipe.least_turns}")
    tested = []
    if recipe.recall.limit:
        asked = recall.questions([Turns.of(dialogue) for dialogue in parts[1]], recipe.recall)
        told = recall.draw(instructions.read(recipe.attributes), len(asked), recipe.seed)
        tested = list(zip(asked, told, strict=True))
    require_room(recipe, tokenizer, models, [*training, *held_out, *(Asked(*t) for t in tested)])
    known = loading.readable(recipe.dialogues, future)
    besides = read(known, "dialogue") if known else []
    return GhostAttentionInputs(
        tokenizer,
        training,
        held_out,
        tested,
        sft.encode(besides, tokenizer, context),
        context,
        Outline(config, tokenizer),
    )


def require_room(
    recipe: GhostAttentionRecipe,
    tokenizer: Tokenizer,
    models: dict[str, Outline],
    items: Sequence[Asked],
) -> None:
    """InputError where no dialogue's first turn leaves room for an answer, where sampling may not
    take what one sequence of the policy's context needs, and for a message, or an instruction, that
    cannot stand in a dialogue."""
    config, longest = models["policy"].config, recipe.sampling.max_tokens
    lengths = []
    for item in items:
        with naming(f"dialogue that begins {item.turns.users[0][:60]!r}"):
            once = item.turns.opened(item.instruction.text, recipe.place)
            again = item.turns.repeated(item.instruction.full_text)
            for first in (once.messages([]), again.messages([])):
                lengths.append(len(chat.encode_prompt(tokenizer, first)))
    if min(lengths) + longest > config.context:
        raise InputError(
            f"sampling.max_tokens: the policy's context of {config.context} tokens has no room for "
            f"any dialogue's first turn, {min(lengths)} tokens at least, and {longest} of an answer"
        )
    if recipe.sampling.cache_bytes is not None:
        dtype, tensor = recipe.train.dtype, recipe.parallel.tensor
        needed = least_bytes(config, dtype, config.context, tensor)
        if needed > recipe.sampling.cache_bytes:
            raise InputError(
                f"sampling.cache_bytes: expected at least {needed} for a dialogue that fills the "
                f"policy's context of {config.context} tokens, got {recipe.sampling.cache_bytes}"
            )


def plan(
    recipe: GhostAttentionRecipe,
    inputs: GhostAttentionInputs | None,
    shape: Callable[[Path], LlamaConfig],
) -> Work:
    """For `--dry-run`: dialogues count as if every answer were as long as one of the data's."""
    sampler = planning.Model("policy", shape(recipe.policy))
    trained = planning.Model("model", shape(recipe.init), lora=recipe.lora)
    how = "about: answers as long as those of data"
    prompts = tests = steps = None
    batch = planning.Batch.at_most(recipe.context or trained.config.context, recipe.batch_size)
    if inputs is not None:
        built, tested = [*inputs.training, *inputs.held_out], [Asked(*t) for t in inputs.tested]
        prompts = prompt_lengths(recipe.history, inputs.tokenizer, built)
        tests = prompt_lengths("sampled", inputs.tokenizer, tested)
        lengths = [
            len(chat.encode_prompt(inputs.tokenizer, item.turns.messages(item.turns.given)))
            for item in inputs.training
        ] + [len(example.tokens) for example in inputs.besides]
        count = min(recipe.batch_size, len(lengths))
        batch = replace(planning.Batch.of(lengths, count), how=how)
        steps = Count(recipe.epochs * -(-len(lengths) // recipe.batch_size), "at most")

    def answering(model: planning.Model, lengths: list[int] | None) -> planning.Sampling:
        answers = None if lengths is None else len(lengths)
        return plans.sampling_of(model, recipe.sampling, lengths, answers, [])

    asked = None if prompts is None or tests is None else prompts + tests
    phases = [
        Phase("sampling", frozen=[sampler], sampling=answering(sampler, asked)),
        Phase("training", [trained], training=True),
    ]
    if recipe.recall.limit:
        lent = replace(trained, lent=True)
        phases.append(Phase("measuring", [trained], sampling=answering(lent, tests)))
    return Work(phases, recipe.train, recipe.parallel, batch, steps, recipe.epochs)


def prompt_lengths(history: str, tokenizer: Tokenizer, items: Sequence[Asked]) -> list[int]:
    """Tokens of every prompt that is answered, were each turn of a dialogue as long as another."""
    found = []
    for item in items:
        dialogue = item.turns.repeated(item.instruction.full_text)
        whole = len(chat.encode_prompt(tokenizer, dialogue.messages(dialogue.given)))
        count = len(dialogue.users)
        first = count if history == "given" else 1
        found += [-(-whole * turn // count) for turn in range(first, count + 1)]
    return found
