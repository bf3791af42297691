"""How long the cluster model takes to answer: a layout search must be a matter of seconds, a
comparison and a validation of well under one.

    pytest benchmarks/cluster/test_models.py --benchmark-columns=median,rounds
"""

import pytest

from llama2rt.cluster import compare, hardware, prediction, rows, search, step_time, validate
from llama2rt.cluster.hardware import Cluster

SEARCH_LIMIT_SECONDS = 5.0


def cluster(gpus, fabric=hardware.IB, watts=400.0):
    return Cluster(hardware.GPUS["a100-80gb"], gpus, fabric, watts)


@pytest.mark.parametrize("model", ["llama2-7b", "llama2-70b"])
def test_layout_search_on_2048_gpus(benchmark, model):
    shape = prediction.preset(model)
    batch = prediction.global_batch(2048)
    benchmark.extra_info |= {
        "gpus": 2048,
        "layouts": len(list(search.layouts(shape, cluster(2048), 4096, batch))),
        "limit_seconds": SEARCH_LIMIT_SECONDS,
    }
    best = benchmark.pedantic(
        lambda: search.search(shape, cluster(2048), 4096, batch)[0],
        setup=step_time._layer.cache_clear,  # a user's search is the first of its process
        rounds=5,
        warmup_rounds=1,
    )
    benchmark.extra_info["predicted_step_seconds"] = best.step_seconds
    if benchmark.stats is not None:  # None under --benchmark-disable
        assert benchmark.stats.stats.max < SEARCH_LIMIT_SECONDS


def test_comparison_of_70b_on_2048_gpus(benchmark):
    shape = prediction.preset("llama2-70b")
    second = cluster(2048, hardware.ROCE, 350.0)
    found = benchmark(lambda: compare.compare(shape, cluster(2048), second))
    benchmark.extra_info["predicted_ratio"] = found.ratio.value


def test_validation_of_all_published_runs(benchmark):
    published = rows.published()
    checked = benchmark(lambda: validate.check(published))
    benchmark.extra_info["rows"] = len(checked)
    benchmark.extra_info |= validate.errors(checked)
