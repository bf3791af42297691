"""gloo over emulated links of 1 and 2 Gb/s, as a share of their line rate.

Skips with the reason where the machine does not let links be emulated. pytest-benchmark times the
whole of it; the shares are in extra_info.

    pytest -s benchmarks/cluster
"""

import pytest

from llama2rt.cluster import emulate, namespaces

OPTIONS = ["--ops", "all_reduce", "broadcast", "--min-bytes", "32MiB", "--max-bytes", "32MiB"]


@pytest.mark.parametrize("rate", ["1gbit", "2gbit"])
def test_share_of_line_rate(benchmark, capsys, rate):
    fabrics = []

    def run() -> None:
        with namespaces.link(namespaces.parse_rate(rate)) as link:
            fabrics.append(emulate.summarise(link, emulate.measure(link, OPTIONS, 600.0)))

    try:
        benchmark.pedantic(run, rounds=1)
    except namespaces.NotPossible as error:
        pytest.skip(f"links cannot be emulated here: {error}")
    (fabric,) = fabrics
    for row in fabric["rows"]:
        benchmark.extra_info[row["op"]] = {
            key: value for key, value in row.items() if key not in ("op", "seconds")
        }
    with capsys.disabled():
        print("\n" + "\n".join(emulate.describe(fabric)))
