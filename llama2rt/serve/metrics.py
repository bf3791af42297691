"""What a server counts, as the text that Prometheus reads (exposition format 0.0.4).

Written by the event loop's thread alone, but for what `Worker` hands over between two steps.
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

# From a small model's token on a CPU to an answer of thousands of them.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of seconds by bucket, their number and sum."""

    def __init__(self, edges: Sequence[float] = _SECONDS) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """`times` observations of `seconds`."""
        self.counts[bisect.bisect_left(self.edges, seconds)] += times
        self.sum += seconds * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def mean(self) -> float:
        """0 where nothing was observed."""
        return self.sum / self.count if self.count else 0.0

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for edge, count in zip((*self.edges, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{edge}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


COUNTERS = {
    "requests": "HTTP requests by path and status",
    "prompt_tokens": "Tokens of prompts that were accepted",
    "generated_tokens": "Tokens generated",
    "dropped": "Requests whose client left before the answer was complete",
    "fields_without_effect": "Fields of requests that were read and change nothing here",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token",
    "time_per_token_seconds": "Between a sequence's tokens after the first",
    "request_seconds": "From a request's arrival to the end of its answer",
}


class Metrics:
    """Counters, histograms and, given when they are asked for, gauges."""

    def __init__(self) -> None:
        self.counters: dict[str, Counter[Labels]] = defaultdict(Counter)
        self.histograms = {name: Histogram() for name in HISTOGRAMS}

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        self.counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        self.histograms[name].observe(seconds, times)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it; `gauges` are values of this moment by name, each with its help."""
        lines = []
        for name, (what, value) in gauges.items():
            lines += [*_head(name, what, "gauge"), f"llama2rt_{name} {value:.12g}"]
        for name, what in COUNTERS.items():
            lines += _head(f"{name}_total", what, "counter")
            for labels, total in (self.counters[name] or Counter({(): 0})).items():
                lines.append(f"llama2rt_{name}_total{_braced(labels)} {total}")
        for name, what in HISTOGRAMS.items():
            lines += _head(name, what, "histogram")
            lines += self.histograms[name].lines(f"llama2rt_{name}")
        return "\n".join(lines) + "\n"


def _head(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP llama2rt_{name} {what}", f"# TYPE llama2rt_{name} {kind}"]


def _braced(labels: Labels) -> str:
    if not labels:
        return ""
    written = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, value in labels
    )
    return "{" + ",".join(written) + "}"
