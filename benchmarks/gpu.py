"""Everything a machine with a GPU can show, in one command, one archive and under nine minutes.

Made for a rented machine without a network: it uses this Python and what is installed beside it,
and of the project's requirements only torch, pytest and pytest-benchmark must be there. Phases run
in order, each with a budget in seconds; one that overruns is cut and said so, one that fails does
not stop the rest, and the exit status is 1 if any did not end well.

    wheels      what lies in a folder `wheels/`: peers to measure against that are not installed
    install     the package with its native modules, without a network
    doctor      what is built and what each op runs on
    kernels     what the compiler made of the CUDA kernels (csrc/cuda/resources.py)
    tests       tests/gpu; a run in which every test was skipped counts as failed
    benchmarks  benchmarks/ops; records go to benchmarks/results/GPU
    figures     a figure per op from these records
    memcheck    compute-sanitizer, where it is installed, over every op at small sizes
    racecheck   the same for races in the shared memory of `_cuda`'s kernels

    python3 -P benchmarks/gpu.py [--out FOLDER] [--phases tests benchmarks]

Writes FOLDER/llama2rt-gpu.tar.gz: each phase's output, summary.json, records and figures.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530
"""Of all phases together; packing takes the few that are left of nine minutes."""
GRACE_SECONDS = 5
"""Between asking a phase to stop, so that it can write what it has, and killing it."""
PYTHON = (sys.executable, "-P")  # -P: this folder holds a `kernels/` that is not ours to import


@dataclass(frozen=True)
class Phase:
    name: str
    budget_s: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    """Why it cannot run here; "" if it can."""
    check: Callable[[], str] = lambda: ""
    """What is wrong with a run that ended with status 0; "" if nothing is."""


@dataclass(frozen=True)
class Outcome:
    phase: str
    result: str
    """done, failed, cut or skipped"""
    seconds: float
    why: str = ""


def stop(process: subprocess.Popen) -> None:
    """Ask the phase and all that it started to stop, then make them."""
    for number, patience_s in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(phase: Phase, seconds: float, log: Path) -> Outcome:
    """Run `phase` for at most `seconds`; its output goes to `log` and, at its end, to stdout."""
    if phase.skip:
        return Outcome(phase.name, "skipped", 0.0, phase.skip)
    if seconds <= 0:
        return Outcome(phase.name, "cut", 0.0, "no time was left for it")
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            phase.command,
            cwd=ROOT,
            env=os.environ | phase.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            result, why = ("done", phase.check()) if status == 0 else ("failed", f"status {status}")
        except subprocess.TimeoutExpired:
            result, why = "cut", f"after {seconds:.0f} s"
        finally:
            stop(process)
    if result == "done" and why:
        result = "failed"
    return Outcome(phase.name, result, time.monotonic() - started, why)


def gpu_name() -> str:
    """ "NVIDIA H200" as the name of a folder, "nvidia-h200"; "no-gpu" without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", said.splitlines()[0].lower()).strip("-")


def all_skipped(report: Path) -> str:
    """What is wrong with a JUnit report in which no test ran; "" if one did."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    tests, skipped = (
        int(suite.get(key, 0)) if suite is not None else 0 for key in ("tests", "skipped")
    )
    return "" if tests > skipped else f"nothing was tested: {skipped} of {tests} tests were skipped"


def phases(folder: Path, records: Path) -> list[Phase]:
    """All of them; `folder` takes logs and reports, `records` the measurements."""
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = "" if sanitizer else "compute-sanitizer is not on PATH"
    pip = [*PYTHON, "-m", "pip", "install", "--no-index", "--no-deps"]
    pytest = [*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    report = folder / "tests.xml"
    # Each tensor in an allocation of its own, whose ends the sanitizer knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitize(tool: str, *options: str) -> list[str]:
        start = [sanitizer or "", "--tool", tool, "--error-exitcode", "9"]
        return [*start, *pytest, "tests/gpu/test_every_op.py", *options]

    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    return [
        Phase("wheels", 15, [*pip, *wheels], skip="" if wheels else "there is no wheels/*.whl"),
        Phase("install", 180, [*pip, "--no-build-isolation", "--force-reinstall", "."]),
        Phase("doctor", 40, [*PYTHON, "-m", "llama2rt.doctor", "--json"]),
        Phase("kernels", 40, [*PYTHON, "csrc/cuda/resources.py"]),
        Phase(
            "tests",
            100,
            [*pytest, "-ra", f"--junitxml={report}", "tests/gpu"],
            check=lambda: all_skipped(report),
        ),
        Phase("benchmarks", 185, [*pytest, "-s", "benchmarks/ops"], {"BENCH_OUT": str(records)}),
        Phase(
            "figures",
            20,
            [*PYTHON, "benchmarks/helpers/figures.py", str(records)],
            skip="" if find_spec("matplotlib") else "matplotlib is not installed",
        ),
        Phase("memcheck", 30, sanitize("memcheck"), uncached, no_sanitizer),
        Phase("racecheck", 30, sanitize("racecheck", "-k", "cuda"), uncached, no_sanitizer),
    ]


def pack(folder: Path, archive: Path) -> None:
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:gz") as tar:
        tar.add(folder, arcname="llama2rt-gpu")
    unfinished.replace(archive)


def run_all(chosen: list[Phase], folder: Path, total_s: float = TOTAL_SECONDS) -> list[Outcome]:
    """Run the phases one after another; `folder` takes their logs and summary.json."""
    deadline, outcomes = time.monotonic() + total_s, []
    for phase in chosen:
        log = folder / f"{phase.name}.txt"
        outcome = run(phase, min(phase.budget_s, deadline - time.monotonic()), log)
        outcomes.append(outcome)
        if log.exists():
            print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
        print(
            f"== {phase.name}: {outcome.result} {outcome.why} ({outcome.seconds:.0f} s)", flush=True
        )
        # Written each time: whoever cuts this script short still finds what was done.
        summary = json.dumps([asdict(each) for each in outcomes], indent=1)
        (folder / "summary.json").write_text(summary + "\n", encoding="utf-8")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="where the archive goes")
    names = [phase.name for phase in phases(Path(), Path())]
    parser.add_argument("--phases", nargs="+", choices=names, default=names, metavar="PHASE")
    arguments = parser.parse_args()

    folder = ROOT / "build/gpu"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = ROOT / "benchmarks/results" / gpu_name()
    every = phases(folder, records)
    outcomes = run_all([phase for phase in every if phase.name in arguments.phases], folder)
    if records.is_dir():
        shutil.copytree(records, folder / "results" / records.name)
    pack(folder, arguments.out / "llama2rt-gpu.tar.gz")
    print("\n".join(f"{each.phase:<11} {each.result:<8} {each.why}" for each in outcomes))
    sys.exit(any(outcome.result in ("failed", "cut") for outcome in outcomes))


if __name__ == "__main__":
    main()
