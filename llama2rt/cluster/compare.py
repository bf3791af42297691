"""What a cheaper fabric under a lower power cap costs in throughput, and for which reasons.

Llama 2 was trained on InfiniBand at 400 W and on RoCE at 350 W, both at 2000 GPUs, and reports
that the second reaches about 90 % of the first (Touvron et al. 2023b, section 2.2). `compare` times
one layout on both clusters. To explain the gap, it gives the first cluster one property of the
second at a time; the residual is the part of the gap that these single changes do not add up to.
The distance from the published 90 % is printed beside it. Neither is fitted away.
"""

from dataclasses import dataclass, replace

from llama2rt.cluster import calibration, power_curve
from llama2rt.cluster.estimate import Estimate
from llama2rt.cluster.hardware import RANGES, Cluster, Fabric
from llama2rt.cluster.prediction import global_batch
from llama2rt.cluster.search import search
from llama2rt.cluster.step_time import Constants, step_time
from llama2rt.cluster.workload import Layout, Shape

PUBLISHED_RATIO = 0.90
PUBLISHED_WHERE = "Llama 2, section 2.2: RoCE at 350 W against InfiniBand at 400 W, 2000 GPUs"
CAUSES = ("power", "bandwidth", "latency", "congestion", "stragglers")


@dataclass(frozen=True)
class Comparison:
    """Two clusters on the same work."""

    first: Cluster
    second: Cluster
    layout: Layout
    ratio: Estimate
    """throughput of `second` over that of `first`, both under `layout`"""
    waterfall: dict[str, float]
    """share of `first`'s throughput that each cause takes; with "residual" they sum to 1 - ratio"""
    own_layouts: float
    """the ratio when `second` takes the layout that is fastest on it"""

    @property
    def gap(self) -> float:
        return 1 - self.ratio.value

    def as_json(self) -> dict[str, object]:
        return {
            "gpus": self.first.gpus,
            "first": {"fabric": self.first.fabric.name, "watts": self.first.watts},
            "second": {"fabric": self.second.fabric.name, "watts": self.second.watts},
            "layout": {**vars(self.layout)},
            "ratio": self.ratio.as_json(),
            "ratio_with_own_layouts": self.own_layouts,
            "waterfall": [
                {"cause": cause, "share": share} for cause, share in self.waterfall.items()
            ],
            "published": {"ratio": PUBLISHED_RATIO, "source": PUBLISHED_WHERE},
            "unexplained": self.ratio.value - PUBLISHED_RATIO,
            "note": power_curve.NO_SWEEP,
        }


def compare(
    shape: Shape,
    first: Cluster,
    second: Cluster,
    *,
    seq: int = 4096,
    layout: Layout | None = None,
    constants: Constants = calibration.FITTED,
) -> Comparison:
    """Both clusters under one layout, by default the fastest on `first`.

    The range spans the published figures of each fabric, and the matrix-bound and the mixed curve
    of the power cap. Two equal clusters give exactly 1, low and high too.
    """
    best = None
    if layout is None:
        batch = global_batch(first.gpus)
        layout = search(shape, first, seq, batch, constants=constants)[0].layout
        best = search(shape, second, seq, batch, constants=constants)[0].layout
    layout.check(shape, first)
    layout.check(shape, second)

    def seconds(cluster: Cluster, curve: power_curve.Workload = "matmul") -> float:
        return step_time(shape, layout, cluster, constants, curve).seconds

    reference = seconds(first)
    ratio = reference / seconds(second)
    ends = [
        seconds(_at(first, end), curve) / seconds(_at(second, end), curve)
        for end in (0, 1)
        for curve in ("matmul", "mixed")
    ]
    single = {cause: 1 - reference / seconds(_with(first, second, cause)) for cause in CAUSES}
    waterfall = {**single, "residual": (1 - ratio) - sum(single.values())}
    return Comparison(
        first,
        second,
        layout,
        Estimate(
            ratio,
            min(ratio, *ends),
            max(ratio, *ends),
            "fabrics at the ends of published reports, cap by matrix-bound and mixed curves",
        ),
        waterfall,
        ratio if best is None else reference / step_time(shape, best, second, constants).seconds,
    )


def _at(cluster: Cluster, end: int) -> Cluster:
    """The cluster with its fabric at the low (0) or high (1) end of its range."""
    ends = RANGES.get(cluster.fabric.name)
    if ends is None or cluster.fabric != ends[1]:
        return cluster
    return replace(cluster, fabric=ends[2 * end])


def _with(first: Cluster, second: Cluster, cause: str) -> Cluster:
    """`first` with one property of `second`."""
    if cause == "power":
        return replace(first, watts=second.watts)
    return replace(first, fabric=_mixed(first.fabric, second.fabric, cause))


def _mixed(first: Fabric, second: Fabric, cause: str) -> Fabric:
    fields: dict[str, dict[str, float]] = {
        "bandwidth": {
            "line_rate_share": second.line_rate_share,
            "rate_scale": second.rate_scale,
        },
        "latency": {"extra_hop_seconds": second.extra_hop_seconds},
        "congestion": {"collisions": second.collisions},
        "stragglers": {"jitter": second.jitter},
    }
    return replace(first, **fields[cause])  # type: ignore[arg-type]
