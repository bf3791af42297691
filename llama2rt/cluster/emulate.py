"""`llama2rt cluster emulate`: gloo for real over links of a known rate, on one machine.

Two processes in two network namespaces run `cluster bench` across a link that tc holds to a rate,
so that the benchmark's numbers can be compared with a known line rate. Fabrics are measured one
after the other, since side by side they would share the CPU. The result checks the benchmark and
gloo, not a network: a rate is emulated and, where the kernel has netem, a delay; congestion, loss
and RDMA are not.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from llama2rt import atomic
from llama2rt.cluster import bench, host, namespaces, operations, records
from llama2rt.cluster.namespaces import Link, NotPossible
from llama2rt.cluster.sizes import bytes_text
from llama2rt.errors import InputError

_PORT = 29500  # inside the namespaces, where nobody else is
_POLL_SECONDS = 0.05
_RANKS = 2
_DATA_SHARE = 1448 / 1514  # of an Ethernet frame: the rest is TCP's, IP's and Ethernet's headers


def emulate(
    *,
    rate: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="RATE")] = (),
    size: str = "32MiB",
    ops: tuple[bench.Name, ...] = ("all_reduce",),
    iterations: int = bench.FEWEST_ITERATIONS,
    delay_ms: float = 0.0,
    timeout_seconds: float = 600.0,
    out: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure gloo between two network namespaces over links held to a rate.

    Needs Linux, ip and tc, and network namespaces (root, or user namespaces for ordinary users);
    says what is missing and ends with status 1 otherwise. Leaves nothing behind.

    Args:
        rate: Rate of a link, such as 1gbit; give it again for another. 1gbit and 2gbit if absent.
        size: Total buffer of a call; at 1 Gb/s, 32MiB take 0.27 s.
        ops: Operations to measure.
        iterations: Timed calls, at least 20.
        delay_ms: One-way delay added by netem.
        timeout_seconds: Time for one link, after which it is given up.
        out: Also write the result to this file.
        as_json: Print one JSON object.
    """
    rates = [namespaces.parse_rate(text) for text in rate or ("1gbit", "2gbit")]
    bench.Plan.of(ops, size, size, bench.FEWEST_WARMUP, iterations)
    if delay_ms < 0 or timeout_seconds <= 0:
        raise InputError(
            f"--delay-ms {delay_ms:g} --timeout-seconds {timeout_seconds:g}: expected a delay of "
            "at least 0 and a time above 0"
        )
    options = ["--ops", *ops, "--min-bytes", size, "--max-bytes", size]
    options += ["--iterations", str(iterations)]
    stream = sys.stderr if as_json else sys.stdout
    result = new_result()
    with _sigterm_is_interrupt():
        for bits_per_s in rates:
            try:
                with namespaces.link(bits_per_s, delay_ms / 1e3) as link:
                    record = measure(link, options, timeout_seconds)
            except NotPossible as error:
                if as_json:
                    print(json.dumps({**result, "not_possible": str(error)}))
                raise NotPossible(f"links cannot be emulated here: {error}") from None
            fabric = summarise(link, record)
            result["fabrics"].append(fabric)
            print(*describe(fabric), sep="\n", file=stream, flush=True)
    if out is not None:
        atomic.write(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result))


def new_result() -> dict[str, Any]:
    """What is said of the machine once, however many links are measured."""
    return {
        "what": "llama2rt cluster emulate: gloo between two network namespaces, links held by tbf",
        "versions": host.versions(),
        "congestion_control": _sysctl("tcp_congestion_control"),
        "fabrics": [],
    }


def measure(link: Link, options: Sequence[str], timeout_seconds: float) -> dict[str, Any]:
    """The record of `cluster bench` with `options`, of one process at each end of `link`.

    OSError with the last lines of what a process printed if one fails, or if they take longer.
    """
    with tempfile.TemporaryDirectory(prefix="llama2rt-") as folder:
        out = Path(folder, "bench.json")
        command = [sys.executable, "-P", "-m", "llama2rt.cli", "cluster", "bench", *options]
        command += ["--backend", "gloo", "--out", str(out)]
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(_ending(link.start(end, command, _environment(end))))
                for end in (0, 1)
            ]
            _wait(processes, timeout_seconds)
        return records.read(out)


def summarise(link: Link, record: Mapping[str, Any]) -> dict[str, Any]:
    """Bus bandwidth against the line rate, per operation, with the calls it was read from.

    full_share: the share of line rate that the operation has where the link is never idle.
    """
    return {
        "rate_bits_per_s": link.rate_bits_per_s,
        "delay_seconds": link.delay_seconds,
        "rows": [
            {
                "op": row["op"],
                "bytes": row["bytes"],
                "median_seconds": row["median_seconds"],
                "p99_seconds": row["p99_seconds"],
                "bus_bandwidth_bytes_per_s": row["bus_bandwidth_bytes_per_s"],
                "share_of_line_rate": row["bus_bandwidth_bytes_per_s"] / link.bytes_per_s,
                "full_share": _DATA_SHARE / operations.gloo_excess(row["op"], _RANKS),
                "seconds": row["seconds"],
            }
            for row in record["rows"]
        ],
    }


def describe(fabric: Mapping[str, Any]) -> list[str]:
    """One line an operation: achieved against line rate."""
    rate = fabric["rate_bits_per_s"] / 1e9
    delay = f" + {fabric['delay_seconds'] * 1e3:g} ms" if fabric["delay_seconds"] else ""
    return [
        f"{rate:g} Gb/s{delay}: {row['op']} of {bytes_text(row['bytes'])} at "
        f"{row['bus_bandwidth_bytes_per_s'] * 8 / 1e9:.3f} Gb/s, "
        f"{row['share_of_line_rate']:.1%} of line rate where {row['full_share']:.1%} is full "
        f"(median {row['median_seconds']:.4g} s, p99 {row['p99_seconds']:.4g} s)"
        for row in fabric["rows"]
    ]


def _environment(end: int) -> dict[str, str]:
    """What torchrun would set, for one rank at each end."""
    return {
        **os.environ,
        "RANK": str(end),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(_RANKS),
        "LOCAL_WORLD_SIZE": str(_RANKS),  # they share one host's memory
        "MASTER_ADDR": namespaces.ADDRESSES[0],
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": namespaces.INTERFACE,
    }


def _wait(processes: "Sequence[subprocess.Popen[str]]", timeout_seconds: float) -> None:
    """Until all have ended well; OSError as soon as one has not."""
    until = time.monotonic() + timeout_seconds
    while True:
        states = [process.poll() for process in processes]
        for end, (process, state) in enumerate(zip(processes, states, strict=True)):
            if state:
                assert process.stdout
                last = "\n".join(process.stdout.read().splitlines()[-10:])
                raise OSError(f"the process at end {end} failed with status {state}:\n{last}")
        if all(state == 0 for state in states):
            return
        if time.monotonic() > until:
            raise TimeoutError(f"the link was not measured within {timeout_seconds:g} s")
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _ending(process: "subprocess.Popen[str]") -> "Iterator[subprocess.Popen[str]]":
    """`process`, which does not outlive the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@contextlib.contextmanager
def _sigterm_is_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys/net/ipv4", name).read_text().strip()
    except OSError:
        return "not readable"
