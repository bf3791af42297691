"""A plan for people: a dozen lines, figures in units that one reads."""

from llama2rt.cluster.estimate import Estimate
from llama2rt.planning.estimate import GIB, Plan
from llama2rt.planning.memory import RESERVE

_WIDTH = 12


def lines(plan: Plan) -> list[str]:
    """What `--dry-run` prints."""
    shape = " x ".join(f"{name} {n}" for name, n in plan.degrees.items() if n > 1) or "one process"
    ranks = f"{plan.ranks} x {plan.gpu.name}"
    found = [f"{plan.stage}: dry run on {ranks}; nothing is allocated, nothing is written"]
    for model in plan.work.models:
        what = "frozen"
        if model in plan.work.trained:
            part = model.trainable / model.parameters
            what = "trained" if part == 1 else f"{model.trainable:,} of them trained ({part:.2%})"
        found.append(_row(model.name, f"{model.parameters:,} parameters, {what}"))
    if len(plan.work.models) > 1:
        found.append(_row("parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained"))
    found.append(_row("mesh", shape))
    found += _memory(plan)
    found += _course(plan)
    found += [_row("time", text) for text in _time(plan)]
    found += [_row("note", note) for note in plan.notes]
    return found


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}}  {text}"


def _memory(plan: Plan) -> list[str]:
    if not plan.memory:
        return []
    rows = []
    for phase, components in plan.memory.items():
        parts = ", ".join(f"{name} {_gib(n)}" for name, n in components.items() if n >= GIB / 100)
        parts = parts or "under 0.01 each"
        rows.append(_row(f"{phase}", f"{_gib(sum(components.values()))} GiB a rank: {parts}"))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows.append(
        _row(
            "memory",
            f"{_gib(plan.peak_bytes)} of {_gib(plan.usable_bytes)} GiB a rank, after "
            f"{RESERVE:.0%} for what libraries take: {verdict}",
        )
    )
    return rows


def _course(plan: Plan) -> list[str]:
    work, rows = plan.work, []
    if work.batch is not None:
        noun = "a step"
        text = f"{work.batch.tokens:,.0f} {noun} ({work.batch.how})"
        if plan.tokens is not None and work.steps is not None:
            text += f", {plan.tokens:.4g} in all ({work.steps.how})"
        rows.append(_row("tokens", text))
    if work.steps is not None:
        text = f"{work.steps.value:,.0f} optimizer steps ({work.steps.how})"
        if work.epochs is not None:
            text += f", {work.epochs:g} epochs"
        rows.append(_row("steps", text))
    elif work.train is not None:
        epochs = "" if work.epochs is None else f"; {work.epochs:g} epochs"
        rows.append(_row("steps", f"known once the data is read{epochs}"))
    return rows


def _time(plan: Plan) -> list[str]:
    rows = []
    if plan.step_seconds is not None:
        rows.append(f"{_range(plan.step_seconds, 's')} a step")
    if plan.sampling_seconds is not None:
        rows.append(f"{_range(plan.sampling_seconds, 's')} of sampling in all")
    elif any(phase.sampling and phase.sampling.served for phase in plan.work.phases):
        rows.append("a server samples; neither its time nor its memory is counted")
    if plan.gpu_hours is not None:
        days = plan.gpu_hours.value / plan.ranks / 24
        rows.append(f"{_range(plan.gpu_hours, 'GPU-hours')}, {days:.3g} days")
    return rows


def _range(estimate: Estimate, unit: str) -> str:
    value, low, high = (_number(n) for n in (estimate.value, estimate.low, estimate.high))
    return f"{value} {unit} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}"
