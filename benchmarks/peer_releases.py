"""The tests that touch transformers, on every release of it that we name; a record of each run.

Our code reaches into transformers twice: `patch_transformers` replaces parts of its Llama, and
checkpoints are exported for it and read from it. CI runs the one release of constraints.txt; this
runs the others, before each release of ours and after each of theirs:

    make peers                                    all of RELEASES; benchmarks/results/peers.json
    .venv/bin/python -P benchmarks/peer_releases.py --releases 5.23.0 --record build/peers.json

For each release an environment of its own is laid over the one that runs this: a venv that holds
transformers and the packages whose versions it bounds, exactly as named here, and finds everything
else (torch, our package, pytest) where this Python finds it. An environment that is there already
is used again. Needs a package index the first time. Exit status 1 if a test failed, or if a run
tested nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/helpers"))

from records import commit, processor, versions  # noqa: E402

TESTS = ("tests/integrations", "tests/checkpoint")
HUB_5 = ("huggingface_hub==2.4.0", "tokenizers==0.23.3")
HUB_4 = (
    "huggingface_hub==0.36.0",
    "tokenizers==0.22.1",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.3",
    "certifi==2026.10.19.post1",
)
# Release -> what it needs in versions of its own; 4.57 for exported folders alone, which it loads.
RELEASES: dict[str, tuple[str, ...]] = {
    "4.57.1": HUB_4,
    "5.22.2": HUB_5,
    "5.23.0": HUB_5,
    "5.24.0": HUB_5,
}
RECORDED = ("torch", "transformers", "huggingface-hub", "tokenizers", "safetensors", "accelerate")


def environment(release: str, folder: Path) -> Path:
    """The Python of `release`'s environment, which is made unless it is there."""
    home = folder / release
    python = home / "bin/python"
    made = home / ".installed"
    wanted = (f"transformers=={release}", *RELEASES[release])
    if made.is_file() and made.read_text(encoding="utf-8").split() == list(wanted):
        return python
    venv.create(home, clear=True, with_pip=False, symlinks=True)
    variables = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))
    beneath = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Lines of a .pth come after the folder that holds it: what is installed here is found first.
    (packages / "beneath.pth").write_text("\n".join(sorted(beneath)) + "\n", encoding="utf-8")
    # --no-deps: every version is named, so a resolver would only find others than these.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    pip.append("--no-compile")  # most of transformers is never imported
    subprocess.run([*pip, *wanted], check=True)
    made.write_text("\n".join(wanted), encoding="utf-8")
    return python


def outcome(report: Path) -> dict[str, Any]:
    """Counts of a JUnit report, the tests that failed and why others were skipped."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed, skipped = [], {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = len(cases) - len(failed) - sum(skipped.values())
    return {
        "passed": passed,
        "failed": len(failed),
        "skipped": sum(skipped.values()),
        "failures": failed,
        "skips": skipped,
    }


def versions_in(python: Path) -> dict[str, str]:
    """Of RECORDED, as the tests of that environment import them."""
    program = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "import transformers; assert transformers.__version__ == found['transformers']\n"
        "print(json.dumps(found))"
    )
    said = subprocess.run(
        [python, "-P", "-c", program, *RECORDED], check=True, capture_output=True, text=True
    )
    return json.loads(said.stdout)


def run(release: str, folder: Path, tests: list[str]) -> dict[str, Any]:
    """One release's row of the record."""
    python = environment(release, folder)
    report = folder / f"{release}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *tests]
    started = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {"SEED": "0"}).returncode
    row: dict[str, Any] = {"release": release, "versions": versions_in(python)}
    if not report.is_file():
        return row | {"passed": 0, "failed": 0, "skipped": 0, "status": status}
    return row | {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "seconds": round(time.monotonic() - started),
        "status": status,
        **outcome(report),
    }


def write(record: Path, rows: list[dict[str, Any]], tests: list[str]) -> None:
    """The record, with former rows of releases that were not run this time."""
    begun = {
        "what": f"pytest {' '.join(tests)}, once a release of transformers (make peers)",
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": versions(())["python"],
        "runs": rows,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(begun, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES))
    parser.add_argument("--record", type=Path, default=ROOT / "build/peers.json")
    parser.add_argument("--environments", type=Path, default=ROOT / "build/peers")
    parser.add_argument("tests", nargs="*", default=list(TESTS), help=f"default: {TESTS}")
    arguments = parser.parse_args()

    rows = []
    for release in arguments.releases:
        print(f"== transformers {release}", flush=True)
        rows.append(run(release, arguments.environments.resolve(), arguments.tests))
        write(arguments.record, rows, arguments.tests)
    for row in rows:
        counts = (f"{row[key]} {key}" for key in ("passed", "failed", "skipped"))
        print(f"transformers {row['release']}: {', '.join(counts)}")
    sys.exit(any(row["status"] or row["failed"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    main()
