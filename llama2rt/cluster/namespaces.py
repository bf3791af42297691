"""Two network namespaces joined by a link of a set rate, for as long as a block lasts.

The namespaces have no name: a process of ours holds each of them, waiting for its input to end,
and the kernel removes a namespace, with its links and addresses, when its last process is gone.
So nothing is left behind even by SIGKILL, two runs cannot collide, and no address is visible
outside. The link is a veth pair whose two ends tc's token bucket filter (tbf) holds to the rate.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2rt.errors import InputError

ADDRESSES = ("10.0.0.1", "10.0.0.2")
INTERFACE = "veth0"
# The bucket holds what the rate delivers in 1 ms, at least one segment as large as the kernel
# hands over in one piece (64 KiB and headers). A larger one lets transfers start above the rate.
_BURST_SECONDS, _LEAST_BURST_BYTES = 1e-3, 80_000
_QUEUE_MS = 50
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_PR_SET_PDEATHSIG = 1
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 1 << 12, 1 << 21


class NotPossible(OSError):
    """This machine does not let links be emulated; the message says what is missing."""


@dataclass(frozen=True)
class Link:
    """A link between two namespaces."""

    rate_bits_per_s: int
    """each way"""
    delay_seconds: float
    """one way"""
    holders: tuple[int, int]
    """process ids that hold the namespaces"""

    @property
    def bytes_per_s(self) -> float:
        return self.rate_bits_per_s / 8

    def start(
        self, end: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> "subprocess.Popen[str]":
        """`command` in the namespace of `end` (0 or 1); it dies with this process."""
        return subprocess.Popen(
            [*_inside(self.holders[end]), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_die_with_parent,
        )


def parse_rate(text: str) -> int:
    """1gbit, 250mbit ... (tc's units, powers of ten) in bits/s; InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg])bit", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise InputError(f"--rate {text}: expected a rate such as 1gbit or 250mbit")
    return round(float(match[1]) * {"k": 10**3, "m": 10**6, "g": 10**9}[match[2]])


@contextlib.contextmanager
def link(rate_bits_per_s: int, delay_seconds: float = 0.0) -> Iterator[Link]:
    """Two namespaces and the link between them; NotPossible where this machine refuses."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise NotPossible(f"{tool} is not installed (package {package})")
    with _namespace(_own()) as first, _namespace(_inside(first)) as second:
        pair = f"type veth peer name {INTERFACE} netns {second}"
        _command(f"ip link add {INTERFACE} {pair}", _inside(first))
        for holder, address in zip((first, second), ADDRESSES, strict=True):
            inside = _inside(holder)
            _command(f"ip address add {address}/30 dev {INTERFACE}", inside)
            _command("ip link set lo up", inside)
            _command(f"ip link set {INTERFACE} up", inside)
            _shape(inside, rate_bits_per_s, delay_seconds)
        yield Link(rate_bits_per_s, delay_seconds, (first, second))


def _shape(inside: Sequence[str], rate_bits_per_s: int, delay_seconds: float) -> None:
    burst = max(_LEAST_BURST_BYTES, round(rate_bits_per_s / 8 * _BURST_SECONDS))
    add = f"tc qdisc add dev {INTERFACE}"
    bucket = f"rate {rate_bits_per_s}bit burst {burst}b latency {_QUEUE_MS}ms"
    _command(f"{add} root handle 1: tbf {bucket}", inside)
    if delay_seconds:
        # As many packets as the rate puts on the way, and some.
        packets = 1000 + round(rate_bits_per_s * delay_seconds / 8 / 1000)
        microseconds = round(delay_seconds * 1e6)
        _command(f"{add} parent 1: netem delay {microseconds}us limit {packets}", inside)


def _own() -> list[str]:
    """The command that enters a user namespace, in which an ordinary user may make network
    namespaces (where the kernel lets ordinary users have one); empty where this process may."""
    status = Path("/proc/self/status").read_text()
    held = int(re.findall(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)[0], 16)
    if held & _CAP_SYS_ADMIN and held & _CAP_NET_ADMIN:
        return []
    return ["unshare", "--user", "--map-root-user", "--"]


@contextlib.contextmanager
def _namespace(inside: Sequence[str]) -> Iterator[int]:
    """The process id that holds a new network namespace; it ends with its input, thus with us."""
    holder = subprocess.Popen(
        [*inside, "unshare", "--net", "--", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for us to handle
        preexec_fn=_die_with_parent,
    )
    assert holder.stdin and holder.stdout and holder.stderr
    try:
        if holder.stdout.readline() != "ready\n":
            raise NotPossible(f"no network namespace: {holder.stderr.read().strip()}")
        yield holder.pid
    finally:
        with contextlib.suppress(BrokenPipeError):
            holder.stdin.close()
        holder.stdout.close()
        holder.stderr.close()
        holder.wait()


def _inside(holder: int) -> list[str]:
    spaces = [f"--net=/proc/{holder}/ns/net"]
    if os.readlink(f"/proc/{holder}/ns/user") != os.readlink("/proc/self/ns/user"):
        spaces += [f"--user=/proc/{holder}/ns/user", "--preserve-credentials"]
    return ["nsenter", *spaces, "--"]


def _command(command: str, inside: Sequence[str] = ()) -> None:
    done = subprocess.run([*inside, *command.split()], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise NotPossible(f"{command}: {reason[-1]}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
