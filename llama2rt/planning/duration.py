"""How long a run takes on a named cluster: steps by the step-time model, answers by a roofline.

Steps are `cluster.step_time`'s, fitted to published runs. Sampling has no such fit: a decoding step
reads the weights and the cache of the sequences that run, or multiplies, whichever takes longer,
and reaches what long copies reach; a real engine also waits for its host, so that this is a floor.
"""

from collections.abc import Sequence
from math import ceil

from llama2rt.cluster import calibration, step_time
from llama2rt.cluster.estimate import Estimate
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.workload import BF16_BYTES, Layout, Shape
from llama2rt.planning import inference, memory
from llama2rt.planning.memory import Setting
from llama2rt.planning.work import Batch, Model, Sampling

# What long copies reach of the data sheet's bandwidth, as in cluster/step_time.
_HBM_SHARE = 0.85
# An assumption, wide on purpose: no engine's share of the roofline has been measured here.
_SAMPLING_SLOWER = 2.0


def layout(batch: Batch, setting: Setting) -> Layout:
    """The run's division as the cluster model describes one."""
    degrees = setting.degrees
    sequence = max(1, round(batch.sequence))
    ranks = degrees["data"] * degrees["shard"]
    sharding = "none"
    if degrees["shard"] * degrees["context"] > 1:
        sharding = "hybrid" if degrees["data"] > 1 else "zero3"
    return Layout(
        seq=sequence,
        micro_batch=max(1, min(setting.micro_tokens // sequence, ceil(batch.tokens / sequence))),
        # A rank without a sequence of its own works on a filler: as long as one with.
        global_batch=max(ranks, round(batch.tokens / sequence)),
        tp=degrees["tensor"],
        pp=degrees["pipeline"],
        dp=ranks,
        cp=degrees["context"],
        sharding=sharding,  # type: ignore[arg-type]
        # Of "selective" only cheap work is done again, which the cluster model does not count.
        recompute="full" if setting.recompute == "full" else "none",
        stack="2024",
    )


def step_seconds(model: Model, batch: Batch, setting: Setting, cluster: Cluster) -> float:
    """Of one optimizer step of `model`. The cluster model knows language models; a regression head
    saves their output layer, a few per cent."""
    shape = Shape.of(model.name, model.config)
    plan = layout(batch, setting)
    plan.check(shape, cluster)
    return step_time.step_time(shape, plan, cluster, calibration.FITTED).seconds


def ranged(seconds: float) -> Estimate:
    """With the error that the step-time model has on published runs."""
    return Estimate(
        seconds,
        seconds * (1 - calibration.FASTER),
        seconds * (1 + calibration.SLOWER),
        f"step-time model in bf16: published runs take {calibration.FASTER:.0%} less to "
        f"{calibration.SLOWER:.0%} more",
    )


def floor(seconds: float) -> Estimate:
    """Of sampling, which this model can only place from below."""
    return Estimate(
        seconds,
        seconds,
        _SAMPLING_SLOWER * seconds,
        "sampling: every answer at its longest, decoded at the memory's bandwidth; not calibrated",
    )


def total(parts: Sequence[Estimate]) -> Estimate:
    """The sum; the range assumes that all err to the same side."""
    return Estimate(
        sum(part.value for part in parts),
        sum(part.low for part in parts),
        sum(part.high for part in parts),
        "; ".join(dict.fromkeys(part.provenance for part in parts)),
    )


def sampling_seconds(sampling: Sampling, tensor: int, cluster: Cluster) -> float:
    """Of all answers, each as long as it may get, and of the models that read them. `tensor` ranks
    share the weights and the sequences; what they say to each other is not counted."""
    assert sampling.answers is not None
    gpu = cluster.gpu
    # Each group has the whole model and its own prompts.
    share = sampling.answers * tensor / cluster.gpus
    together = max(1.0, min(sampling.at_once, share))
    rounds = ceil(share / together)
    weights = memory.parts(sampling.policy).total / tensor
    bandwidth = gpu.memory_bandwidth_bytes_per_s * _HBM_SHARE
    rate = gpu.peak_flops_per_s * gpu.matmul_share_of_a100 * calibration.FITTED.gemm_share_of_peak
    middle = round(sampling.prompt + sampling.most / 2)
    cache = inference.kv_cache_bytes(sampling.policy.config, BF16_BYTES, middle) / tensor
    read = (weights * BF16_BYTES + together * cache) / bandwidth
    computed = 2 * weights * together / rate
    decoding = rounds * sampling.most * max(read, computed)
    prefill = share * sampling.prompt * 2 * weights / rate
    tokens = sampling.answers / cluster.gpus * (sampling.prompt + sampling.most)
    scoring = sum(tokens * 2 * memory.parts(reader).total / rate for reader in sampling.readers)
    return decoding + prefill + scoring
