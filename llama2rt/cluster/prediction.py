"""What a training run would take: speed, memory, energy and carbon, each with a range."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama2rt.cluster import calibration, carbon, power_curve
from llama2rt.cluster.estimate import Estimate
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.step_time import Constants, StepTime, step_time
from llama2rt.cluster.workload import Layout, Shape, memory_bytes
from llama2rt.errors import InputError
from llama2rt.model.config import LlamaConfig

_BATCH_SEQUENCES = 1024  # of 4096 tokens: Llama 2's 4M
_MEMORY_RANGE = 0.10


@dataclass(frozen=True)
class Prediction:
    """What `predict` says of one layout; `step` is the time of a step by cause."""

    layout: Layout
    step: StepTime
    step_seconds: Estimate
    tokens_per_s_per_gpu: Estimate
    model_flops_utilisation: Estimate
    memory_bytes: Estimate
    gpu_watts: Estimate
    gpu_hours: Estimate

    @property
    def energy_kwh(self) -> Estimate:
        """Of the GPUs alone."""
        return product((self.gpu_hours, self.gpu_watts), 1e-3)

    @property
    def tco2eq(self) -> Estimate:
        """Of that energy, by Llama 2's PUE and carbon intensity."""
        return self.energy_kwh.times(carbon.KG_PER_KWH * carbon.PUE / 1000)

    def as_json(self) -> dict[str, object]:
        names = (
            "step_seconds tokens_per_s_per_gpu model_flops_utilisation memory_bytes gpu_watts "
            "gpu_hours energy_kwh tco2eq"
        )
        return {
            "layout": {**vars(self.layout), "gpus": self.layout.gpus},
            "step": {**vars(self.step)},
            **{name: getattr(self, name).as_json() for name in names.split()},
        }


def global_batch(gpus: int) -> int:
    """Sequences a step by default: Llama 2's 1024 of 4096 tokens, or the nearest number that every
    pair of GPUs can share evenly, which is more on large clusters."""
    pairs = max(1, gpus // 2)
    return pairs * max(1, round(_BATCH_SEQUENCES / pairs))


def preset(name: str) -> Shape:
    """One of this library's models; InputError (a ValueError) if there is none."""
    try:
        return Shape.of(name, LlamaConfig.preset(name))
    except ValueError as error:
        raise InputError(f"model: {str(error).removeprefix('preset: ')}") from None


def predict(
    shape: Shape,
    layout: Layout,
    cluster: Cluster,
    tokens: float,
    constants: Constants = calibration.FITTED,
) -> Prediction:
    """Speed of a layout, and what training on `tokens` costs.

    The range of a time is the model's error on published runs. The range of power is from three
    quarters of the predicted draw, which long jobs average, to the cap.
    """
    layout.check(shape, cluster)
    step = step_time(shape, layout, cluster, constants)
    seconds = Estimate(
        step.seconds,
        step.seconds * (1 - calibration.FASTER),
        step.seconds * (1 + calibration.SLOWER),
        f"step-time model: published runs take {calibration.FASTER:.0%} less to "
        f"{calibration.SLOWER:.0%} more",
    )
    step_tokens = layout.global_batch * layout.seq
    rate = _inverse(seconds, step_tokens / cluster.gpus)
    flops = shape.step_flops(step_tokens, layout.seq, "none")
    used = _inverse(seconds, flops / cluster.gpus / cluster.gpu.peak_flops_per_s)
    hours = seconds.times(tokens / step_tokens * cluster.gpus / 3600)
    return Prediction(
        layout,
        step,
        seconds,
        rate,
        used,
        around(
            memory_bytes(shape, layout, cluster.gpus_per_node),
            _MEMORY_RANGE,
            "states and activations counted; fragments and buffers of libraries are not",
        ),
        _draw(step, cluster),
        hours,
    )


def around(value: float, share: float, provenance: str) -> Estimate:
    return Estimate(value, value * (1 - share), value * (1 + share), provenance)


def product(factors: Sequence[Estimate], unit: float = 1.0) -> Estimate:
    """The product of positive estimates; the range assumes that all err to the same side."""
    value, low, high = unit, unit, unit
    for factor in factors:
        value, low, high = value * factor.value, low * factor.low, high * factor.high
    return Estimate(value, low, high, "; ".join(factor.provenance for factor in factors))


def _inverse(estimate: Estimate, numerator: float) -> Estimate:
    return Estimate(
        numerator / estimate.value,
        numerator / estimate.high,
        numerator / estimate.low,
        estimate.provenance,
    )


def _draw(step: StepTime, cluster: Cluster) -> Estimate:
    """Mean power of a GPU over a step: near the cap while computing, less while it waits."""
    computing = step.compute / step.seconds
    busy = power_curve.draw_watts("matmul", cluster.watts, cluster.gpu)
    waiting = power_curve.draw_watts("memory", cluster.watts, cluster.gpu)
    value = computing * busy + (1 - computing) * waiting
    return Estimate(
        value,
        0.75 * value,
        cluster.watts,
        "GPU alone: at the cap while it computes; no public trace, hence the range",
    )
