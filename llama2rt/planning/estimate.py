"""A dry run: a stage's `Work` on so many ranks of a named GPU, in numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from llama2rt.cluster import hardware
from llama2rt.cluster.estimate import Estimate
from llama2rt.cluster.hardware import Cluster
from llama2rt.errors import InputError
from llama2rt.parallel.mesh import check
from llama2rt.planning import duration, inference, memory
from llama2rt.planning.memory import Components, Setting, added
from llama2rt.planning.work import Model, Phase, Work
from llama2rt.train.moments import moment_dtype

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """What the run is planned for."""

    ranks: int | None = None
    """processes; None for as many as the recipe's [parallel] needs at least"""
    gpu: str = "a100-80gb"
    """a name of cluster/hardware"""
    fabric: str = "ib"
    """between nodes"""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise InputError(f"ranks: expected at least 1, got {self.ranks}")
        hardware.gpu(self.gpu), hardware.fabric(self.fabric)


@dataclass(frozen=True)
class Plan:
    """What a run would ask for."""

    stage: str
    work: Work
    degrees: dict[str, int]
    gpu: hardware.Gpu
    memory: dict[str, Components]
    """bytes a rank by phase and component"""
    step_seconds: Estimate | None
    sampling_seconds: Estimate | None
    gpu_hours: Estimate | None
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        total = 1
        for degree in self.degrees.values():
            total *= degree
        return total

    @property
    def parameters(self) -> int:
        """Of all models that the stage holds."""
        return sum(model.parameters for model in self.work.models)

    @property
    def trainable(self) -> int:
        return sum(model.trainable for model in self.work.trained)

    @property
    def peak_bytes(self) -> float:
        """Of the fullest phase."""
        return max((sum(parts.values()) for parts in self.memory.values()), default=0.0)

    @property
    def usable_bytes(self) -> float:
        """Of the GPU, the reserve taken off."""
        return self.gpu.memory_bytes * (1 - memory.RESERVE)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def tokens(self) -> float | None:
        """That the whole run trains on."""
        if self.work.batch is None or self.work.steps is None:
            return None
        return self.work.batch.tokens * self.work.steps.value

    def as_json(self) -> dict[str, Any]:
        """One JSON object, bytes and seconds."""
        batch, steps = self.work.batch, self.work.steps
        return {
            "stage": self.stage,
            "ranks": self.ranks,
            "gpu": self.gpu.name,
            "mesh": self.degrees,
            "parameters": {
                "total": self.parameters,
                "trainable": self.trainable,
                "models": {model.name: model.parameters for model in self.work.models},
            },
            "memory_bytes": self.memory,
            "peak_bytes": self.peak_bytes,
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "tokens": {
                "step": None if batch is None else batch.tokens,
                "total": self.tokens,
                "how": None if batch is None else batch.how,
            },
            "steps": None if steps is None else {"value": steps.value, "how": steps.how},
            "epochs": self.work.epochs,
            "step_seconds": _json(self.step_seconds),
            "sampling_seconds": _json(self.sampling_seconds),
            "gpu_hours": _json(self.gpu_hours),
            "notes": self.notes,
        }


def _json(estimate: Estimate | None) -> dict[str, object] | None:
    return None if estimate is None else estimate.as_json()


def dry_run(stage: str, work: Work, options: Options) -> Plan:
    """The plan of `work`. InputError where the mesh does not divide the ranks or a model."""
    gpu = hardware.gpu(options.gpu)
    ranks = options.ranks or work.parallel.least_ranks
    work = work.among(ranks)
    degrees = work.parallel.degrees(ranks)
    if work.train is None:
        # What trains nothing is whole on every rank, which answers its share of the prompts.
        degrees |= {"data": ranks, "shard": 1}
    else:
        work.train.check(ranks, "cuda")
    pipelined = any(phase.pipelined for phase in work.phases)
    for model in work.cut:  # all others are whole on every rank
        check(degrees, model.config, pipelined=pipelined, adapted=model.adapter > 0)
    setting = _setting(work, degrees)
    phases = {phase.name: _memory(phase, setting, gpu) for phase in work.phases}
    fabric = hardware.NVLINK if ranks <= 8 else hardware.fabric(options.fabric)
    cluster = Cluster(gpu, ranks, fabric, gpu.max_watts)
    return Plan(
        stage,
        work,
        degrees,
        gpu,
        phases,
        *_durations(work, setting, cluster),
        notes=_notes(work, setting),
    )


def _notes(work: Work, setting: Setting) -> list[str]:
    notes = list(work.notes)
    away = sum(
        inference.frozen(model, setting) for model in work.models if model.held == "offloaded"
    )
    if away:
        notes.append(f"offloaded models: {away / GIB:.1f} GiB of the CPU's memory a rank, pinned")
    if any(model.adapter for model in work.trained):
        notes.append("time: counted as if all weights were trained; adapters save a third of it")
    if work.train is not None and work.train.precision == "fp32":
        notes.append("time: the cluster model counts bf16 products; fp32 takes several times that")
    return notes


def _setting(work: Work, degrees: dict[str, int]) -> Setting:
    """How every model of a stage lies on a rank."""
    train, batch = work.train, work.batch
    if train is None:
        return Setting(degrees, memory.FP32, 0, 0)
    micro, count = train.micro_tokens, 2
    if batch is not None:
        share = batch.tokens / (degrees["data"] * degrees["shard"])
        # A longer sequence than micro_tokens passes alone (data/loader.py).
        micro = max(batch.longest, min(micro, ceil(share)))
        count = max(1, ceil(share / micro))
    return Setting(
        degrees,
        train.dtype.itemsize,
        micro,
        count,
        recompute=train.activation_checkpointing,
        all_targets=batch is not None and batch.all_targets,
        moment_bytes=moment_dtype(train.moments).itemsize,
        optimizer_away=train.optimizer_device is not None,
    )


def _memory(phase: Phase, setting: Setting, gpu: hardware.Gpu) -> Components:
    """Bytes of a rank in a phase. A model that waits in the CPU's memory comes alone, to read, when
    the cache of a policy that samples is gone; the policy is still there. One in shards is there at
    all times, and a block of it gathered as it reads."""
    readers = [model for model in phase.frozen if model.held != "resident"]
    staying = sum(inference.frozen(m, setting) for m in phase.frozen if m.held != "offloaded")
    always: Components = {"frozen": staying} if staying else {}
    trained = phase.trained
    if phase.training and trained:
        # One model works at a time; the others keep their states and summed gradients.
        return added(always, _fullest(_training(model, trained, setting) for model in trained))
    always = added(always, *(memory.states(model, setting) for model in trained))
    moments = [always]
    policy: Components = {}
    if phase.sampling is not None:
        free = gpu.memory_bytes * (1 - memory.RESERVE) - sum(always.values())
        moments.append(added(always, inference.rollout(phase.sampling, setting, free)))
        policy = inference.answering(phase.sampling, setting)
    moments += [added(always, policy, inference.reading(model, setting)) for model in readers]
    return _fullest(moments)


def _fullest(moments: Iterable[Components]) -> Components:
    return max(moments, key=lambda moment: sum(moment.values()))


def _training(model: Model, trained: Sequence[Model], setting: Setting) -> Components:
    others = [other for other in trained if other is not model]
    waiting = [
        {**memory.states(other, setting), "gradients": memory.summed_gradients(other, setting)}
        for other in others
    ]
    return added(memory.training(model, setting), *waiting)


def _durations(
    work: Work, setting: Setting, cluster: Cluster
) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """(a step, all sampling, GPU-hours of the run)."""
    step = sampling = hours = None
    if work.train is not None and work.batch is not None and work.trained:
        batch = work.batch
        seconds = sum(
            duration.step_seconds(model, batch, setting, cluster) for model in work.trained
        )
        step = duration.ranged(seconds)
    drawn = [phase.sampling for phase in work.phases if phase.sampling is not None]
    if drawn and all(one.answers is not None and not one.served for one in drawn):
        seconds = sum(duration.sampling_seconds(one, setting.tensor, cluster) for one in drawn)
        sampling = duration.floor(seconds)
    parts = []
    if work.batch is not None:
        if step is None or work.steps is None:
            return step, sampling, None
        parts.append(step.times(work.steps.value))
    if drawn:
        if sampling is None:
            return step, sampling, None
        parts.append(sampling)
    if parts:
        hours = duration.total(parts).times(cluster.gpus / 3600)
    return step, sampling, hours
