"""Distillation: smaller models learn what a larger one answered (section 3.2.3), or how likely it
found every token.

Only the paper's largest model sampled; its selected answers fine-tuned the smaller ones too. So
here: one set of samples, such as rejection sampling leaves, and any number of students, each with a
directory of its own below the run's, where it resumes. `loss` says what they learn: the answers
themselves (sequence-level distillation, arXiv 1606.07947), or at each of their tokens the teacher's
distribution (`ops.divergence`). The report has the students beside their teacher, on the same
held-out prompts.

Left out: answers that the student draws while it is trained (GKD's lambda, arXiv 2306.13649;
MiniLLM, arXiv 2306.08543). A set that it drew before, by rejection sampling with the student as the
policy, can be named in `data` as well as the teacher's.
"""

import functools
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt import report
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.readers import read
from llama2rt.data.sources import Source
from llama2rt.errors import naming
from llama2rt.model import Llama
from llama2rt.parallel import Mesh, ParallelOptions, on_main
from llama2rt.planning import Batch, Count, Model, Phase, Work
from llama2rt.report.single_run import read_metrics
from llama2rt.rollout.reward import RewardOptions
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.run import Recipe, Run, manifest
from llama2rt.run.no_option import NO_OPTION
from llama2rt.stages import adapters, evaluate, loading, plans, sft, spread, students
from llama2rt.stages.loading import Future, Opened, Outline
from llama2rt.stages.pretrain import next_token
from llama2rt.stages.students import StudentInputs, Teacher
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import Objective, fit
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

TEACHER = "teacher"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
COMPARISON = "evaluate"
# beta of `ops.divergence`, of losses that have only one.
KL = {"forward_kl": 0.0, "reverse_kl": 1.0}


class Student(BaseModel):
    """A model that learns; what is left out is as the recipe says for all."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    init: Path
    """the model folder to start from; the teacher's tokenizer serves one that holds none"""
    batch_size: int | None = Field(default=None, gt=0)
    """answers an optimizer step"""
    epochs: int | None = Field(default=None, gt=0)
    """through the samples"""
    lr: float | None = Field(default=None, gt=0)
    """peak learning rate: the smaller the model, the larger"""


class MeasuringOptions(BaseModel):
    """The models that score the answers to held-out prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    helpfulness: Path | None = None
    """a helpfulness reward model"""
    safety: Path | None = None
    """a safety reward model"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """below this safety score the safety reward replaces helpfulness (section 3.2.3)"""


class DistillRecipe(Recipe):
    """Fine-tune smaller models on a larger one's selected answers."""

    students: Annotated[dict[str, Student], *NO_OPTION] = Field(default={})
    """by name, a [students.NAME] table each: {init, batch_size, epochs, lr}"""
    data: list[Path]
    """the selected samples: run directories of rejection sampling (their samples/best.jsonl), or
    such files"""
    dialogues: list[Path] = Field(default=[])
    """dialogues to train on besides, such as the SFT set"""
    teacher: Path | None = None
    """the larger model: the first row of the comparison, and whose distributions are learned with
    any loss but samples"""

    loss: Literal["samples", "forward_kl", "reverse_kl", "jsd"] = "samples"
    """samples: cross-entropy of the answers, whatever the tokenizers (section 3.2.3); at each of
    their tokens KL(teacher || student) (Hinton et al., arXiv 1503.02531), KL(student || teacher)
    (MiniLLM, arXiv 2306.08543), or the generalised Jensen-Shannon divergence (GKD, arXiv
    2306.13649, eq. 1), for which teacher and students must share the tokenizer"""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """of jsd: the teacher's share of the mixture. Near 0 and 1 the loss is beta, or 1 - beta, times
    the forward, or reverse, KL, so that a small beta learns slowly"""
    temperature: float = Field(default=1.0, gt=0)
    """of both softmaxes in a divergence; gradients fall with its square, not made up for here"""

    validation: list[Source] = Field(default=[])
    """held-out prompts, which the teacher and all students answer"""
    rewards: MeasuringOptions = MeasuringOptions()
    """what scores those answers"""
    sampling: SamplingOptions = SamplingOptions()
    """length of those answers, and what sampling may take"""

    batch_size: int = Field(default=64, gt=0)
    """answers an optimizer step (section 3.1)"""
    epochs: int = Field(default=2, gt=0)
    """through the samples (section 3.1)"""
    seed: int = Field(default=0, ge=0)
    """of the order of batches, and of sampling"""
    # As in SFT, section 3.1: cosine, lr 2e-5, weight decay 0.1.
    train: TrainOptions = TrainOptions(lr=2e-5)
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta: only with loss jsd, not {self.loss}")
        if self.loss == "samples" and self.temperature != 1.0:
            raise ValueError("temperature: only with a loss on distributions, not samples")
        if self.loss != "samples":
            if self.teacher is None:
                raise ValueError(f"teacher: missing: loss {self.loss} is taken from it")
            for name in ("tensor", "context"):
                if getattr(self.parallel, name) > 1:
                    raise ValueError(
                        f"parallel.{name}: loss {self.loss} needs every token's whole "
                        "distribution on one rank: leave it out, or take loss samples"
                    )
        if self.validation and (self.teacher is None or self.rewards.helpfulness is None):
            raise ValueError(
                "validation: students are compared with their teacher by a reward model: name "
                "teacher and rewards.helpfulness"
            )
        if not self.validation and self.rewards != MeasuringOptions():
            raise ValueError("rewards: only with validation, whose answers they score")
        return self

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.students:
            raise ValueError("students: name at least one: a [students.NAME] table with init")
        taken = Counter(name.lower() for name in [TEACHER, *self.students])
        for name in self.students:
            if not NAME.fullmatch(name) or taken[name.lower()] > 1:
                raise ValueError(
                    f"students: {name!r}: expected letters, digits, '.', '_' and '-', another "
                    f"name than {TEACHER!r} and than any other student's but for case"
                )
        return self

    def alone(self, name: str) -> "DistillRecipe":
        """Of one student, and what its training depends on: its table's keys in place of the
        recipe's."""
        student = self.students[name]
        changes: dict[str, Any] = {
            "students": {name: Student(init=student.init)},
            "validation": [],
            "rewards": MeasuringOptions(),
            "sampling": SamplingOptions(),
            "batch_size": student.batch_size or self.batch_size,
            "epochs": student.epochs or self.epochs,
        }
        if student.lr is not None:
            changes["train"] = self.train.model_copy(update={"lr": student.lr})
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class DistillInputs(Opened):
    """What a run reads besides weights; its models are the students'."""

    students: dict[str, StudentInputs]
    result: None = None

    @property
    def models(self) -> Mapping[str, Outline]:
        return {f"{folder(n)}/model": student.outline for n, student in self.students.items()}


def run(recipe: DistillRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Teach every student, then compare them; returns the run directory, which holds a
    student-NAME/model for each."""
    parents = [path for path in recipe.data if (path / manifest.FILE).is_file()]
    run = Run.open(directory, recipe, inputs=files(recipe), parents=parents, resume=resume)
    if run.complete:
        return run.directory
    inputs = open_inputs(recipe)
    teacher = students.Teacher(recipe.teacher, recipe.train.dtype)
    numbers: dict[str, Any] = {
        "students": [
            teach(recipe.alone(name), name, own, teacher, directory)
            for name, own in inputs.students.items()
        ]
    }
    if recipe.validation:
        del teacher  # which answers by itself now
        trained = {name: directory / folder(name) / "model" for name in recipe.students}
        evaluate.run(comparison(recipe, trained), directory / COMPARISON, resume=True)
        compared = on_main(lambda: manifest.read(directory / COMPARISON / manifest.FILE))
        numbers |= compared["summary"]
    report.finish(run, numbers)
    return run.directory


def teach(
    recipe: DistillRecipe, name: str, inputs: StudentInputs, teacher: Teacher, directory: Path
) -> dict[str, Any]:
    """One student's run, and the row that the report has of it."""
    init = recipe.students[name].init
    run = Run.open(directory / folder(name), recipe, inputs={"init": init}, resume=True)
    if run.complete:
        return dict(run.manifest["summary"])
    # A run that is made longer has compared other models.
    on_main(lambda: shutil.rmtree(directory / COMPARISON, ignore_errors=True))
    mesh = Mesh.build(recipe.parallel, inputs.outline.config)
    build = functools.partial(initial_model, recipe, init, inputs.tokenizer)
    model = spread.from_folder(build, init, mesh, recipe.train)
    loader = ExampleLoader(
        inputs.examples,
        recipe.batch_size,
        recipe.train.micro_tokens,
        recipe.seed,
        share=mesh.share,
    )
    objective: Objective = next_token
    if recipe.loss != "samples":
        beta = KL.get(recipe.loss, recipe.beta)
        objective = teacher.objective(inputs.tokenizer, beta, recipe.temperature)
    steps = recipe.epochs * loader.steps_per_epoch
    fit(run, model, loader, objective, recipe.train, steps=steps, mesh=mesh)
    adapters.save(model, inputs.tokenizer, run, init)
    logged = on_main(lambda: read_metrics(run.directory / "metrics.jsonl"))
    row = {
        "name": name,
        "parameters": inputs.outline.config.parameters,
        "init": str(init),
        "samples": len(inputs.examples),
        "read_as": inputs.read_as,
        "batch_size": recipe.batch_size,
        "lr": recipe.train.lr,
        "steps": steps,
        "loss": logged[-1]["loss"],
    }
    report.finish(run, row)
    return row


def initial_model(
    recipe: DistillRecipe, init: Path, tokenizer: Tokenizer, device: loading.Device
) -> Llama:
    """The model to fine-tune, on `device`."""
    dtype = recipe.lora.load_dtype(recipe.train)
    model = loading.load_companion(init, tokenizer, dtype, device)
    recipe.lora.adapt(model, recipe.seed)
    return model


def open_inputs(recipe: DistillRecipe, future: Future | None = None) -> DistillInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError naming
    the student where one cannot learn from the samples, or not by the loss."""
    recipe.lora.check()
    teacher = None
    if recipe.teacher is not None:
        with naming(TEACHER):
            teacher = students.language_model(recipe.teacher, future)
    responses = students.read_samples(recipe.data, future)
    found = {}
    for name, student in recipe.students.items():
        with naming(f"students.{name}"):
            model = students.language_model(student.init, future)
            spread.check(recipe.parallel, model.config, recipe.train, recipe.lora)
            of_distributions = None if recipe.loss == "samples" else teacher
            found[name] = students.learn_from(responses, model, teacher, of_distributions)
            if dialogues := loading.readable(recipe.dialogues, future):
                records = read(dialogues, "dialogue")
                own = found[name]
                own.examples.extend(sft.encode(records, own.tokenizer, model.config.context))
    if recipe.validation:
        untrained = {name: student.init for name, student in recipe.students.items()}
        with naming("validation"):
            evaluate.open_inputs(comparison(recipe, untrained), future)
    return DistillInputs(found)


def files(recipe: DistillRecipe) -> dict[str, Path]:
    """What the recipe names, of a run directory its samples, which are all that is read of it."""
    named = loading.file_inputs(recipe)
    named |= {f"data.{i}": students.samples_file(path) for i, path in enumerate(recipe.data)}
    return named


def folder(student: str) -> str:
    """The name of a student's run directory below the stage's."""
    return f"student-{student}"


def comparison(recipe: DistillRecipe, models: Mapping[str, Path]) -> evaluate.EvaluateRecipe:
    """The stage `evaluate` of the teacher and students, the KL being that to the teacher."""
    assert recipe.teacher is not None and recipe.rewards.helpfulness is not None
    return evaluate.EvaluateRecipe(
        versions={TEACHER: recipe.teacher, **models},
        reference=recipe.teacher,
        rewards=RewardOptions(**recipe.rewards.model_dump()),
        data=recipe.validation,
        sampling=recipe.sampling,
        seed=recipe.seed,
    )


def plan(recipe: DistillRecipe, inputs: DistillInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: the students one after another, the teacher beside them where its
    distributions are wanted, and the comparison's phases."""
    frozen: list[Model] = []
    if recipe.loss != "samples" and recipe.teacher is not None:
        frozen.append(Model(TEACHER, shape(recipe.teacher)))
    phases: list[Phase] = []
    steps: list[int] = []
    batches: list[Batch] = []
    for name, student in recipe.students.items():
        own, config = recipe.alone(name), shape(student.init)
        trained = [Model(name, config, lora=recipe.lora)]
        phases.append(Phase(f"training {name}", trained, frozen, training=True))
        if inputs is not None and inputs.students[name].examples:
            lengths = [len(e.tokens) for e in inputs.students[name].examples]
            batches.append(Batch.of(lengths, min(own.batch_size, len(lengths))))
            steps.append(own.epochs * -(-len(lengths) // own.batch_size))
        else:
            batches.append(Batch.at_most(config.context, own.batch_size))
    if recipe.validation:
        untrained = {name: student.init for name, student in recipe.students.items()}
        phases += evaluate.plan(comparison(recipe, untrained), None, shape).phases
    whole = len(steps) == len(recipe.students)
    return Work(
        phases,
        recipe.train,
        recipe.parallel,
        max(batches, key=lambda batch: batch.tokens),
        Count(max(steps), "of the student that takes most") if whole else None,
        recipe.epochs,
        notes=[f"{len(recipe.students)} students, one after another; steps and tokens of each"],
    )
